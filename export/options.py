"""What to export, as one value; importing this needs no torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

Attention = Literal["flashpte", "executorch", "math"]
Format = Literal["pte", "pt2"]

DTYPE_NAMES = ("bfloat16", "float16", "float32")

PREFILL = "prefill"
DECODE = "decode"
TARGET_VERIFY = "target_verify"
DRAFT_DECODE = "draft_decode"
METHOD_NAMES = (PREFILL, DECODE, TARGET_VERIFY, DRAFT_DECODE)

VERIFY_WINDOW_RANGE = (2, 16)
"""Fewest and most tokens of one target_verify call; the most is what the mid-M kernel takes."""

CHAIN_RANGE = (VERIFY_WINDOW_RANGE[0] - 1, VERIFY_WINDOW_RANGE[1] - 1)
"""Fewest and most tokens that a draft proposes at a time: target_verify takes one more."""

DEFAULT_CHAIN = 4
"""Length of the chain of a draft whose user names none."""

DEFAULT_PREFILL_CHUNK = 2048
"""Longest prefill of a model without a sliding window; one with a window takes at most the window."""


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
        target: name of a target, see :mod:`flashpte.export.models.registry`.
        checkpoint: Hugging Face folder to read config, weights and tokenizer from.
        random_seed: seed of random weights, for an export without a checkpoint.
        config: a ``config.json`` that describes the model, without a checkpoint.
        small: take the target's small config.
        layers: keep the first layers only.
        dtype: one of :data:`DTYPE_NAMES`, for weights, caches and logits.
        max_seq_len: positions that the caches hold; ``None`` for the target's default.
        max_prefill_chunk: most tokens of one prefill call; ``None`` for the sliding window, or 2048 without one.
        verify_window: M of ``target_verify``; ``None`` leaves that method out. A draft sets it to its chain plus one.
        method: export this method alone.
        attention: ``"flashpte"`` for the project's kernels; ``"executorch"`` leaves attention to ExecuTorch's own
            replacement and ``"math"`` decomposes it to plain arithmetic, for comparisons.
        draft: folder of an EAGLE-3 draft head; adds ``draft_decode``, and features to ``prefill`` and
            ``target_verify``.
        chain: K, tokens that the draft proposes at a time; ``None`` for 4 with a draft. Without ``draft`` but with
            ``random_seed``, a random draft that fits the target is made.
        with_decode: keep ``decode`` beside a draft, which does not need it.
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
    midm_sdpa: bool = True

    @property
    def speculates(self) -> bool:
        """Whether a draft is exported with the target."""
        return self.draft is not None or self.chain is not None
