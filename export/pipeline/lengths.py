"""Lengths of sequences and forwards: their defaults and bounds, and errors for options outside the bounds."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from flashpte.export.common.errors import ExportError, Option, UsageError
from flashpte.export.common.options import DEFAULT_PREFILL_CHUNK, VERIFY_WINDOW_RANGE, ExportOptions
from flashpte.export.models.build import ModelFacts
from flashpte.export.models.methods import MIN_PREFILL_CHUNK
from flashpte.export.models.registry import TargetSpec
from flashpte.export.pipeline.draft_plan import DraftPlan
from flashpte.export.state.kv_cache import WINDOW_NAMES
from flashpte.export.state.layer_state import LayerState
from flashpte.export.state.model_state import state_bytes


def sequence_length(spec: TargetSpec, options: ExportOptions, facts: ModelFacts) -> int:
    """Positions that the caches hold: the option's value, or the target's default limited to the model's positions.

    Raises:
        UsageError: the option is less than 2 or more than the model's positions.
        ExportError: the default is less than 2.
    """
    if options.max_seq_len is None:
        default = min(spec.small_max_seq_len if options.small else spec.max_seq_len, facts.max_positions)
        if default < 2:
            raise ExportError(
                f"target {spec.name} has a default length of {default}: give ", Option("max_seq_len"), ", at least 2"
            )
        return default
    if not 2 <= options.max_seq_len <= facts.max_positions:
        raise UsageError(
            Option("max_seq_len", options.max_seq_len), f": must be 2..{facts.max_positions} for this model"
        )
    return options.max_seq_len


def check_cache_size(layers: Sequence[LayerState], max_seq_len: int, dtype: torch.dtype) -> None:
    """Checks that the caches fit in this machine's memory.

    Raises:
        ExportError: they do not.
    """
    needed = state_bytes(layers, max_seq_len, dtype)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ExportError(
            Option("max_seq_len", max_seq_len),
            f": the KV caches take {needed / 1e9:.1f} GB, this machine has {memory / 1e9:.1f} GB of memory",
        )


def forward_bound(spec: TargetSpec, facts: ModelFacts, max_seq_len: int, draft: DraftPlan | None) -> tuple[int, str]:
    """Most tokens of one forward, and the reason for that limit."""
    bounds = [(max_seq_len, "the sequence length")]
    if facts.window is not None:
        bounds.append((facts.window, f"the {facts.window_name}"))
    if draft is not None and draft.window is not None:
        bounds.append((draft.window, "the draft's sliding window"))
    if spec.max_forward is not None:
        bounds.append((spec.max_forward, f"what target {spec.name} takes at once"))
    return min(bounds, key=lambda bound: bound[0])


def prefill_chunk(spec: TargetSpec, options: ExportOptions, facts: ModelFacts, limit: int, reason: str) -> int:
    """Most tokens of one prefill call; ``limit`` and ``reason`` come from :func:`forward_bound`.

    Raises:
        UsageError: the option is out of range.
        ExportError: the model or the target leaves no possible length.
    """
    least = max(MIN_PREFILL_CHUNK, spec.min_forward)
    if facts.window is not None and facts.window < least:
        raise ExportError(f"the model's {facts.window_name} is {facts.window}, must be at least {least}")
    if limit < least:
        raise ExportError(f"one prefill call takes at least {least} tokens, and at most {limit} ({reason})")
    chunk = options.max_prefill_chunk
    if chunk is None:
        return min(limit, DEFAULT_PREFILL_CHUNK) if facts.window is None else limit
    if not least <= chunk <= limit:
        raise UsageError(Option("max_prefill_chunk", chunk), f": must be {least}..{limit} ({reason})")
    return chunk


def check_verify_window(spec: TargetSpec, options: ExportOptions, window: int | None, limit: int, reason: str) -> None:
    """Checks the number of tokens of one target_verify call against the target, the draft and the kernel.

    Raises:
        UsageError: ``window`` is too small or too large.
    """
    if window is None:
        return
    asked: tuple[str | Option, ...] = (Option("verify_window", window),)
    if options.speculates:
        asked = (Option("chain", window - 1), f" (a target_verify of {window} tokens)")
    low, high = VERIFY_WINDOW_RANGE
    low = max(low, spec.min_forward)
    if not low <= window <= high:
        raise UsageError(*asked, f": must be {low}..{high}")
    if window > limit:
        bounds: dict[str, tuple[str | Option, ...]] = {
            "the sequence length": (Option("max_seq_len", limit),),
            **{f"the {name}": (f"the model's {name} of {limit}",) for name in WINDOW_NAMES},
        }
        raise UsageError(*asked, ": must not exceed ", *bounds.get(reason, (f"{reason}, {limit}",)))
