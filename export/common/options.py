"""The options of an export; importing this needs no torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from flashpte.export.common.errors import Option, UsageError, wanted

Attention = Literal["flashpte", "executorch", "math"]
Format = Literal["pte", "pt2"]

DTYPE_NAMES = ("bfloat16", "float16", "float32")

PREFILL = "prefill"
DECODE = "decode"
TARGET_VERIFY = "target_verify"
DRAFT_DECODE = "draft_decode"
TARGET_METHODS = (PREFILL, DECODE, TARGET_VERIFY)
"""Methods of a language model; a draft adds one more."""
TEMPERATURE = "temperature"
"""Input of methods that sample, see :mod:`flashpte.export.models.runner_methods`."""
METHOD_NAMES = (*TARGET_METHODS, DRAFT_DECODE)

QUANTIZED_NAMES = ("4w", "8w")
"""Bits of quantized weights: 4 or 8; activations keep the export's dtype."""

QLINEAR_GROUP_SIZES = (32, 64, 128)
"""Numbers of columns that may share a scale."""

DEFAULT_QLINEAR_GROUP_SIZE = 32

QRECIPE_NAMES = ("default", "sensitive")
"""Recipes that need no file, see :mod:`flashpte.export.pipeline.weight_rules`."""

QALGORITHM_NAMES = ("rtn", "hqq")
"""How weights of 4 bits are chosen: round to nearest, or half-quadratic quantization."""

RUNNER, RUNNER_TEXT, RUNNER_GEMMA = "executorch", "executorch-text", "executorch-gemma"
RUNNERS = (RUNNER, RUNNER_TEXT, RUNNER_GEMMA)
"""ExecuTorch's runners, see :mod:`flashpte.export.models.executorch_runners`; the first is the target's choice."""

VERIFY_WINDOW_RANGE = (2, 16)
"""Fewest and most tokens of one target_verify call; the mid-M kernel takes at most 16."""

CHAIN_RANGE = (VERIFY_WINDOW_RANGE[0] - 1, VERIFY_WINDOW_RANGE[1] - 1)
"""Fewest and most tokens that a draft proposes at a time; target_verify takes one more."""

DEFAULT_CHAIN = 4
"""Default chain length, in tokens, of an export with a draft."""

DEFAULT_PREFILL_CHUNK = 2048
"""Most tokens of one prefill call of a model without a sliding window; with one, the most is the window."""


DEFAULT_CONTEXTS = (1024, 4096, 16384)
"""Numbers of tokens in the cache before the calls that a profile measures."""

DEFAULT_PROFILE_PREFILL = 2048
"""Number of tokens in the prefill that a profile measures."""


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
        target: name of a target, see :mod:`flashpte.export.models.registry`.
        checkpoint: Hugging Face folder to read config, weights and tokenizer from.
        gguf_file: a GGUF file; it gives config, weights and tokenizer.
        random_seed: seed of random weights, for an export without a checkpoint.
        config: a ``config.json`` that describes the model, for an export without a checkpoint.
        small: use the target's small config.
        layers: keep only this many layers, the first ones; ``None`` for all.
        dtype: one of :data:`DTYPE_NAMES`, for weights, caches and logits.
        max_seq_len: positions that the caches hold; ``None`` for the target's default.
        max_prefill_chunk: most tokens of one prefill call; ``None`` for the sliding window, or 2048 without one.
        verify_window: M, tokens of one ``target_verify`` call; ``None`` leaves that method out. A draft sets it to its
            chain plus one.
        method: export this method alone.
        attention: ``"flashpte"`` for the project's kernels; ``"executorch"`` leaves attention to ExecuTorch's own
            replacement and ``"math"`` decomposes it to plain arithmetic, for comparisons.
        draft: folder of an EAGLE-3 draft head; adds ``draft_decode``, and features to ``prefill`` and
            ``target_verify``.
        chain: K, tokens that the draft proposes at a time; ``None`` for 4 with a draft. With ``random_seed`` and no
            ``draft``, it adds a random draft that fits the target.
        with_decode: with a draft, also export ``decode``, which speculative decoding does not need.
        qlinear: one of :data:`QUANTIZED_NAMES`; ``None`` keeps the weights of linear layers in ``dtype``.
        qlinear_group_size: columns that share a scale, one of :data:`QLINEAR_GROUP_SIZES`; ``None`` for 32 with
            ``"4w"`` and one scale per row with ``"8w"``.
        qhead: the same as ``qlinear`` for the output projection, with its default group. A head that is tied to the
            embedding gets its own copy, unless ``qembedding`` is the same.
        qembedding: the same as ``qhead`` for the embedding. A tied head without ``qhead`` reads the same codes.
        qrecipe: one of :data:`QRECIPE_NAMES` or the path of a recipe file; it replaces the four options above.
        qalgorithm: one of :data:`QALGORITHM_NAMES`, for weights of 4 bits; 8 bits are always rounded to nearest.
        runner: one of :data:`RUNNERS`, for a file that ExecuTorch's own runner drives; ``None`` for ``run-model`` and
            programs that call the methods themselves.
        midm_sdpa: ``False`` leaves the attention of ``target_verify`` to plain arithmetic, for comparisons.
    """

    target: str
    checkpoint: Path | None = None
    random_seed: int | None = None
    config: Path | None = None
    small: bool = False
    layers: int | None = None
    dtype: str = "bfloat16"
    max_seq_len: int | None = None
    max_prefill_chunk: int | None = None
    verify_window: int | None = None
    method: str | None = None
    attention: Attention = "flashpte"
    draft: Path | None = None
    chain: int | None = None
    with_decode: bool = False
    qlinear: str | None = None
    qlinear_group_size: int | None = None
    qhead: str | None = None
    qembedding: str | None = None
    qrecipe: str | None = None
    qalgorithm: str = "rtn"
    runner: str | None = None
    midm_sdpa: bool = True
    gguf_file: Path | None = None

    @property
    def speculates(self) -> bool:
        """Whether a draft is exported with the target."""
        return self.draft is not None or self.chain is not None


def check_options(options: ExportOptions) -> None:
    """Checks the options as far as possible without the model.

    Raises:
        UsageError: a value is unknown or out of range, options conflict, or one needs another; the text names them.
    """
    if options.dtype not in DTYPE_NAMES:
        raise UsageError(f"unknown dtype {options.dtype!r}; known: {', '.join(DTYPE_NAMES)}")
    _check_quantization(options)
    _check_conflicts(options)
    _check_draft_options(options)
    _check_lengths(options)
    _check_method(options)
    _check_runner(options)


def check_has_weights(options: ExportOptions) -> None:
    """Raises a UsageError unless there is a checkpoint, a GGUF file or a seed of random weights."""
    if options.checkpoint is None and options.gguf_file is None and options.random_seed is None:
        raise UsageError(
            "no weights: give ", wanted("checkpoint"), ", ", wanted("gguf_file"), " or ", wanted("random_seed")
        )


def _check_quantization(options: ExportOptions) -> None:
    given = {name: getattr(options, name) for name in ("qlinear", "qhead", "qembedding")}
    for name, value in given.items():
        if value is not None and value not in QUANTIZED_NAMES:
            raise UsageError(Option(name, value), f": must be {' or '.join(QUANTIZED_NAMES)}")
        if value is not None and options.qrecipe is not None:
            raise UsageError(
                Option("qrecipe"),
                " and ",
                Option(name),
                " cannot be combined: the recipe names the format of each weight",
            )
    size = options.qlinear_group_size
    if size is not None:
        if options.qlinear is None:
            raise UsageError(Option("qlinear_group_size"), " belongs to ", wanted("qlinear"))
        if size not in QLINEAR_GROUP_SIZES:
            raise UsageError(Option("qlinear_group_size", size), ": must be 32, 64 or 128")
    if options.qalgorithm not in QALGORITHM_NAMES:
        raise UsageError(Option("qalgorithm", options.qalgorithm), f": must be {' or '.join(QALGORITHM_NAMES)}")
    if options.qalgorithm == "rtn" or options.qrecipe in QRECIPE_NAMES or "4w" in given.values():
        return
    if options.qrecipe is not None:
        raise UsageError(
            Option("qalgorithm"), " and a recipe file cannot be combined: the file names formats such as int4-g32-hqq"
        )
    raise UsageError(Option("qalgorithm", options.qalgorithm), " is for weights of 4 bits: add ", wanted("qlinear"))


def _check_conflicts(options: ExportOptions) -> None:
    given = {
        "checkpoint": options.checkpoint is not None,
        "gguf_file": options.gguf_file is not None,
        "random_seed": options.random_seed is not None,
        "config": options.config is not None,
        "small": options.small,
        "midm_sdpa": not options.midm_sdpa,
        "attention": options.attention != "flashpte",
        "draft": options.draft is not None,
        "chain": options.chain is not None,
        "verify_window": options.verify_window is not None,
    }
    for first, second, why in (
        ("checkpoint", "random_seed", "both name weights"),
        ("checkpoint", "config", "the folder's own config.json is used"),
        ("checkpoint", "small", "the folder's own config.json is used"),
        ("gguf_file", "checkpoint", "both name weights"),
        ("gguf_file", "random_seed", "both name weights"),
        ("gguf_file", "config", "the file describes its model"),
        ("gguf_file", "small", "the file describes its model"),
        ("small", "config", "both name a size"),
        ("midm_sdpa", "attention", "nothing is replaced"),
        ("draft", "verify_window", "target_verify takes the chain and one token more"),
        ("chain", "verify_window", "target_verify takes the chain and one token more"),
    ):
        if given[first] and given[second]:
            raise UsageError(Option(first), " and ", Option(second), f" cannot be combined: {why}")


def _check_draft_options(options: ExportOptions) -> None:
    trained = options.checkpoint is not None or options.gguf_file is not None
    if options.chain is not None and options.draft is None and trained:
        raise UsageError(
            Option("chain"), " needs ", wanted("draft"), "; only ", Option("random_seed"), " makes a random draft"
        )
    if options.with_decode and not options.speculates:
        raise UsageError(
            Option("with_decode"), " belongs to ", Option("draft"), "; without one, decode is always there"
        )
    if not options.midm_sdpa and not options.speculates and options.verify_window is None:
        raise UsageError(
            Option("midm_sdpa"),
            " belongs to target_verify: add ",
            wanted("draft"),
            " or ",
            wanted("verify_window"),
        )


def _check_lengths(options: ExportOptions) -> None:
    low, high = VERIFY_WINDOW_RANGE
    if options.verify_window is not None and not low <= options.verify_window <= high:
        raise UsageError(Option("verify_window", options.verify_window), f": must be {low}..{high}")
    low, high = CHAIN_RANGE
    if options.chain is not None and not low <= options.chain <= high:
        rows = f"target_verify takes one token more, its kernel {high + 1} rows"
        raise UsageError(Option("chain", options.chain), f": must be {low}..{high} ({rows})")
    for name, least in (("max_seq_len", 2), ("max_prefill_chunk", 2), ("layers", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(Option(name, value), f": must be at least {least}")
    for name in ("verify_window", "max_prefill_chunk"):
        value = getattr(options, name)
        if value is not None and options.max_seq_len is not None and value > options.max_seq_len:
            raise UsageError(Option(name, value), ": must not exceed ", Option("max_seq_len", options.max_seq_len))


def _check_method(options: ExportOptions) -> None:
    method = options.method
    if method is None:
        return
    if method not in METHOD_NAMES:
        raise UsageError(f"unknown method {method!r}; known: {', '.join(METHOD_NAMES)}")
    if method == DRAFT_DECODE and not options.speculates:
        raise UsageError(Option("method", method), " needs ", wanted("draft"))
    if method == TARGET_VERIFY and options.verify_window is None and not options.speculates:
        raise UsageError(Option("method", method), " needs ", wanted("verify_window"))
    for name, owner in (("verify_window", TARGET_VERIFY), ("max_prefill_chunk", PREFILL)):
        if getattr(options, name) is not None and method != owner:
            raise UsageError(
                Option(name), f" belongs to the method {owner}, which ", Option("method", method), " leaves out"
            )


def _check_runner(options: ExportOptions) -> None:
    if options.runner is None:
        return
    if options.runner not in RUNNERS:
        raise UsageError(Option("runner", options.runner), f": must be {', '.join(RUNNERS)}")
    for name in ("draft", "chain", "verify_window", "method"):
        if getattr(options, name) is not None:
            raise UsageError(
                Option("runner"),
                " and ",
                Option(name),
                " cannot be combined: ExecuTorch's runners call prefill and decode",
            )
