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
METHOD_NAMES = (PREFILL, DECODE, TARGET_VERIFY)

VERIFY_WINDOW_RANGE = (2, 16)
"""Fewest and most tokens of one target_verify call."""

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
        verify_window: M of ``target_verify``; ``None`` leaves that method out.
        method: export this method alone.
        attention: ``"flashpte"`` for the project's kernels; ``"executorch"`` leaves attention to ExecuTorch's own
            replacement and ``"math"`` decomposes it to plain arithmetic, for comparisons.
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
