"""The flags of ``export-model``, and checks of them that need neither torch nor the model."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from flashpte.export.cli.entries import add_entry_flags
from flashpte.export.cli.parser import Parser, add_verbosity, check_least, new_parser, nonempty_path
from flashpte.export.cli.report_file import check_output_file
from flashpte.export.common.errors import ExportError, UsageError
from flashpte.export.common.options import (
    CHAIN_RANGE,
    DEFAULT_CHAIN,
    DEFAULT_PREFILL_CHUNK,
    DEFAULT_QLINEAR_GROUP_SIZE,
    DTYPE_NAMES,
    METHOD_NAMES,
    QALGORITHM_NAMES,
    QLINEAR_GROUP_SIZES,
    QRECIPE_NAMES,
    QUANTIZED_NAMES,
    RUNNERS,
    ExportOptions,
    check_has_weights,
    check_options,
)
from flashpte.export.models.registry import get_target

_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

_DESCRIPTION = """\
Export a language model to an ExecuTorch CUDA program (.pte) whose attention runs on flashpte's kernels.
No GPU is needed: the program is compiled for the architecture that --arch names."""

_EPILOG = """\
examples:
  # a small model with Gemma 4 31B's architecture and random weights; exports in two or three minutes
  export-model --target gemma4-31b --small --random-weights --output-dir out

  # a checkpoint, for an A100, with a method that verifies 4 speculative tokens in one call
  export-model --target gemma4-31b --checkpoint gemma-4-31b-it --arch sm_80 --verify-window 4 --output-dir out

  # with an EAGLE-3 draft head that proposes 4 tokens at a time: prefill, target_verify and draft_decode
  export-model --target gemma4-31b --checkpoint gemma-4-31b-it --draft gemma-4-31b-eagle3 --chain 4 --output-dir out

  # linear layers in 4 bits, a scale per 32 columns; embedding and head in 8 bits
  export-model --target gemma4-31b --checkpoint gemma-4-31b-it --qrecipe default --output-dir out

  # a GGUF file; its weights keep their codes
  export-model --target hf --gguf-file Qwen3-8B-Q4_K_M.gguf --output-dir out

  # the folder of any decoder of transformers with plain attention (docs/models.md)
  export-model --target hf --checkpoint Qwen3-8B --max-seq-len 8192 --output-dir out

  # the file that ExecuTorch's own runner calls
  export-model --target hf --checkpoint Qwen3-8B --runner executorch --output-dir out

  # on several machines: write a plan, and run each of its entries (decode-sm_90, ..., and at last join) somewhere
  export-model --target hf --checkpoint Qwen3-8B --arch sm_80,sm_90 --output-dir out --plan plan.json
  export-model --plan plan.json --entry decode-sm_90

  # which kernel would each attention node get? writes nothing
  export-model --target gemma4-31b --dry-run

exit codes: 0 done, 1 failed (a file, a model, the disk), 2 wrong options, 130 interrupted, 143 and 129 ended by
SIGTERM and SIGHUP.
The output folder appears complete or not at all."""


def _dtype(text: str) -> str:
    name = _DTYPE_ALIASES.get(text, text)
    if name not in DTYPE_NAMES:
        known = ", ".join([*_DTYPE_ALIASES, *DTYPE_NAMES])
        raise argparse.ArgumentTypeError(f"unknown dtype {text!r}; known: {known}")
    return name


def _arches(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if len(set(names)) < len(names) or not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different names such as sm_80,sm_90")
    return names


def build_parser() -> Parser:
    """The parser of ``export-model``."""
    parser = new_parser("export-model", _DESCRIPTION, _EPILOG)

    model = parser.add_argument_group("model")
    model.add_argument("--target", metavar="NAME", help="what to export, see --list-targets")
    model.add_argument("--list-targets", action="store_true", help="print the targets and exit")
    model.add_argument("--small", action="store_true", help="the target's architecture at a small size")
    model.add_argument(
        "--config", type=nonempty_path, metavar="FILE", help="a config.json that describes the model's size"
    )
    model.add_argument("--layers", type=int, metavar="N", help="keep the first N layers only (default: all)")
    model.add_argument(
        "--dtype",
        type=_dtype,
        default="bfloat16",
        metavar="NAME",
        help="bfloat16, float16 or float32 (also bf16, fp16, fp32), for weights, caches and logits (default: bfloat16)",
    )

    weights = parser.add_argument_group("weights (one of the first three)")
    weights.add_argument(
        "--checkpoint",
        type=nonempty_path,
        metavar="DIR",
        help="Hugging Face folder: config.json and safetensors, also quantized by AWQ, GPTQ, compressed-tensors or "
        "torchao; its tokenizer files are copied to the output",
    )
    weights.add_argument(
        "--gguf-file",
        type=nonempty_path,
        metavar="FILE",
        help="GGUF file of a Llama, Qwen3, Gemma 3 or Gemma 4 model: config, weights and tokenizer; quantized linear "
        "layers keep their codes",
    )
    weights.add_argument(
        "--random-weights", action="store_true", help="random weights, the same for the same --seed and PyTorch"
    )
    weights.add_argument("--seed", type=int, metavar="N", help="seed of --random-weights (default: 0)")

    _add_quantization(parser)

    methods = parser.add_argument_group("methods (prefill and decode; target_verify with --verify-window)")
    methods.add_argument(
        "--max-seq-len",
        type=int,
        metavar="N",
        help="positions that the KV caches hold (default: 4096, 256 with --small, or the model's limit if lower)",
    )
    methods.add_argument(
        "--max-prefill-chunk",
        type=int,
        metavar="N",
        help="most tokens of one prefill call (default: the model's sliding window, or "
        f"{DEFAULT_PREFILL_CHUNK} without one; at most --max-seq-len)",
    )
    methods.add_argument(
        "--verify-window",
        type=int,
        metavar="M",
        help="add target_verify, which takes M tokens (2..16) and returns the logits of all (default: left out)",
    )
    methods.add_argument(
        "--method",
        choices=METHOD_NAMES,
        help="export this method alone; --format pt2 holds exactly one (default: all)",
    )

    methods.add_argument(
        "--runner",
        metavar="NAME",
        help=f"{', '.join(RUNNERS)}: prefill and decode as ExecuTorch's own runner calls them, TextLLMRunner or that "
        "of Gemma 4 31B; executorch is the one for the target (default: for run-model)",
    )

    draft = parser.add_argument_group("speculative decoding (prefill, target_verify and draft_decode)")
    draft.add_argument(
        "--draft",
        type=nonempty_path,
        metavar="DIR",
        help="folder of an EAGLE-3 draft head from SafeAILab/SpecForge or vLLM speculators: config.json, safetensors",
    )
    draft.add_argument(
        "--chain",
        type=int,
        metavar="K",
        help=f"tokens that the draft proposes at a time ({CHAIN_RANGE[0]}..{CHAIN_RANGE[1]}; default with --draft: "
        f"{DEFAULT_CHAIN}); target_verify takes K + 1. With --random-weights and no --draft, a random draft is made",
    )
    draft.add_argument(
        "--with-decode", action="store_true", help="keep decode, which decoding with a draft does not need"
    )

    lowering = parser.add_argument_group("lowering")
    lowering.add_argument(
        "--arch",
        type=_arches,
        metavar="SM[,SM]",
        help="sm_80, sm_90, ... (default: the local GPU's, else sm_90); several get a folder each in --output-dir",
    )
    lowering.add_argument(
        "--format",
        choices=("pte", "pt2"),
        default="pte",
        help="pte: ExecuTorch program; pt2: plain AOTInductor package of one method (default: pte)",
    )
    lowering.add_argument(
        "--no-replace",
        choices=("executorch", "math"),
        help="for comparisons, do not use flashpte's kernels: leave attention to ExecuTorch's own replacement, or "
        "decompose it to plain arithmetic (default: replace)",
    )

    lowering.add_argument(
        "--no-midm-sdpa",
        action="store_true",
        help="for comparisons, leave the attention of target_verify to plain arithmetic (default: the verify kernel)",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-dir", type=nonempty_path, metavar="DIR", help="folder for the program and its manifest.json"
    )
    output.add_argument(
        "--dry-run", action="store_true", help="print which kernel each attention node gets; no weights"
    )
    output.add_argument(
        "--report", type=nonempty_path, metavar="FILE", help="write the routing of every attention node as JSON"
    )
    add_verbosity(output)
    add_entry_flags(parser)
    return parser


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    bits = " or ".join(QUANTIZED_NAMES)
    group = parser.add_argument_group("quantized weights (default: all weights in --dtype)")
    group.add_argument("--qlinear", metavar="BITS", help=f"{bits}: linear layers of the decoder layers in 4 or 8 bits")
    group.add_argument(
        "--qlinear-group-size",
        type=int,
        metavar="N",
        help=f"columns that share a scale: {', '.join(map(str, QLINEAR_GROUP_SIZES))} (default: "
        f"{DEFAULT_QLINEAR_GROUP_SIZE} with 4w, a whole row with 8w)",
    )
    group.add_argument(
        "--qhead",
        metavar="BITS",
        help=f"{bits}: the output projection; if it is tied to the embedding, it gets its own copy",
    )
    group.add_argument(
        "--qembedding", metavar="BITS", help=f"{bits}: the embedding, and the output projection that is tied to it"
    )
    group.add_argument(
        "--qrecipe",
        metavar="NAME|FILE",
        help=f"{' or '.join(QRECIPE_NAMES)}, or a JSON or TOML file of rules: regular expressions of weight names, and "
        "formats",
    )
    group.add_argument(
        "--qalgorithm",
        metavar="NAME",
        default="rtn",
        help=f"{' or '.join(QALGORITHM_NAMES)}, for weights of 4 bits: round to nearest, or half-quadratic "
        "quantization with zero points (default: rtn)",
    )


def check_arguments(args: argparse.Namespace) -> ExportOptions:
    """Checks everything that can be known without loading torch or the model.

    Raises:
        UsageError: flags are missing, out of range or in conflict.
        ExportError: an input path does not exist, or an output path cannot be written.
    """
    if args.target is None:
        raise UsageError("no target: give --target NAME, see --list-targets")
    get_target(args.target)
    check_least((("--seed", args.seed, 0),))
    options = ExportOptions(
        target=args.target,
        checkpoint=args.checkpoint,
        random_seed=(args.seed or 0) if args.random_weights else None,
        config=args.config,
        small=args.small,
        layers=args.layers,
        dtype=args.dtype,
        max_seq_len=args.max_seq_len,
        max_prefill_chunk=args.max_prefill_chunk,
        verify_window=args.verify_window,
        method=args.method,
        runner=args.runner,
        attention=args.no_replace or "flashpte",
        draft=args.draft,
        chain=args.chain,
        with_decode=args.with_decode,
        qlinear=args.qlinear,
        qlinear_group_size=args.qlinear_group_size,
        qhead=args.qhead,
        qembedding=args.qembedding,
        qrecipe=args.qrecipe,
        qalgorithm=args.qalgorithm,
        midm_sdpa=not args.no_midm_sdpa,
        gguf_file=args.gguf_file,
    )
    check_options(options)
    _check_flags(args, options)
    _check_inputs(args)
    _check_overlaps(args)
    if not args.dry_run:
        check_output_dir(args.output_dir)
    for flag, path in (("--report", args.report), ("--plan", args.plan)):
        if path is not None:
            check_output_file(flag, path)
    return options


def _check_flags(args: argparse.Namespace, options: ExportOptions) -> None:
    """Checks flags that only the command line has."""
    for first, second, why in (
        ("--dry-run", "--no-replace", "a dry run shows what the replacement does"),
        ("--verbose", "--quiet", "they are opposites"),
    ):
        if all(getattr(args, flag[2:].replace("-", "_")) for flag in (first, second)):
            raise UsageError(f"{first} and {second} cannot be combined: {why}")
    if args.seed is not None and not args.random_weights:
        raise UsageError("--seed belongs to --random-weights")
    if args.format == "pt2" and args.no_replace == "executorch":
        raise UsageError("--no-replace executorch needs --format pte: the kernels belong to ExecuTorch's backend")
    if args.format == "pt2" and args.runner is not None:
        raise UsageError("--runner needs --format pte: ExecuTorch's runners read no other")
    if args.dry_run:
        return
    check_has_weights(options)
    if args.output_dir is None:
        raise UsageError("no output: give --output-dir DIR, or --dry-run")
    if args.format == "pt2" and args.method is None:
        raise UsageError("--format pt2 holds one method: add --method, for example --method decode")


_FILES = ("--report", "--plan")
_INPUTS = ("--checkpoint", "--gguf-file", "--config", "--draft")


def _check_inputs(args: argparse.Namespace) -> None:
    for flag in _INPUTS:
        path = getattr(args, flag[2:].replace("-", "_"))
        try:
            if path is not None:
                path.stat()
        except OSError as error:  # the name is too long, or a folder on the path denies access
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise ExportError(f"{flag} {path} cannot be read: {error.strerror}") from error
    if args.checkpoint is not None:
        if not args.checkpoint.is_dir():
            state = "is not a folder" if args.checkpoint.exists() else "does not exist"
            raise ExportError(f"--checkpoint {args.checkpoint} {state}")
        if not (args.checkpoint / "config.json").is_file():
            raise ExportError(f"--checkpoint {args.checkpoint} has no config.json: give a Hugging Face model folder")
    if args.draft is not None and not args.draft.is_dir():
        state = "is not a folder" if args.draft.exists() else "does not exist"
        raise ExportError(f"--draft {args.draft} {state}")
    for flag, path in (("--config", args.config), ("--gguf-file", args.gguf_file)):
        if path is not None and not path.is_file():
            raise ExportError(f"{flag} {path} is not an existing file")
    if _recipe_file(args) is not None and not Path(args.qrecipe).is_file():
        raise ExportError(f"--qrecipe {args.qrecipe} is neither {', '.join(QRECIPE_NAMES)} nor an existing file")


def _recipe_file(args: argparse.Namespace) -> str | None:
    return None if args.qrecipe in QRECIPE_NAMES else args.qrecipe


def check_output_dir(path: Path) -> None:
    """Checks that the output folder can be made, before minutes of work.

    Raises:
        ExportError: the path is a file, or the nearest existing parent does not allow a new entry.
    """
    try:
        if path.exists() and not path.is_dir():
            raise ExportError(f"--output-dir {path} is a file; give a folder")
        parent = next(folder for folder in path.absolute().parents if folder.exists())
    except OSError as error:
        raise ExportError(f"--output-dir {path} cannot be made: {error.strerror}") from error
    try:
        # only trying gives the right answer on read-only mounts and for root
        tempfile.TemporaryDirectory(prefix=".export-model-", dir=parent).cleanup()
    except OSError as error:
        raise ExportError(f"--output-dir {path} cannot be made in {parent}: {error.strerror}") from error


def _check_overlaps(args: argparse.Namespace) -> None:
    """Refuses an input inside the output folder or at a written file's path, because an export replaces both."""
    paths = {
        flag: _resolve(flag, getattr(args, flag[2:].replace("-", "_")))
        for flag in ("--output-dir", *_FILES, *_INPUTS)
        if getattr(args, flag[2:].replace("-", "_")) is not None
    }
    if (recipe := _recipe_file(args)) is not None:
        paths["--qrecipe"] = _resolve("--qrecipe", Path(recipe))
    output = paths.get("--output-dir")
    for flag, path in paths.items():
        if flag != "--output-dir" and output is not None and not args.dry_run and output in (path, *path.parents):
            raise UsageError(f"{flag} {path} is in the --output-dir, which is replaced as a whole: keep them apart")
        for written in _FILES:
            if flag in (*_INPUTS, "--qrecipe") and paths.get(written) == path:
                raise UsageError(f"{written} and {flag} name the same file")


def _resolve(flag: str, path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise ExportError(f"{flag} {path}: {getattr(error, 'strerror', None) or error}") from error
