"""The methods of an exported language model: their inputs and results, and how each becomes an ``ExportedProgram``.

=================  ======================  ====================  ========================================
method             ``tokens`` int64        ``input_pos`` int64   result
=================  ======================  ====================  ========================================
``prefill``        [1, T], T in a range    [T]                   logits [1, 1, V] of the last token
``decode``         [1, 1]                  [1]                   logits [1, 1, V]
``target_verify``  [1, M]                  [M]                   logits [1, M, V] of every token
=================  ======================  ====================  ========================================

For a runner that samples in the program, methods also take a temperature, float32 [1], and return a token,
int64 [1, 1], in place of logits: :mod:`flashpte.export.models.runner_methods`. With a draft, methods also exchange
features: :mod:`flashpte.export.models.eagle3_methods`.

Positions are consecutive and ascending. Logits have the model's dtype, as in a Hugging Face model: widening them would
add no information.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from flashpte.export.common.errors import Option, UsageError, wanted
from flashpte.export.common.options import DECODE, DRAFT_DECODE, PREFILL, TARGET_VERIFY
from flashpte.export.models.probe import takes_mask_per_type
from flashpte.export.models.tracing import export_for_lengths
from flashpte.export.state.kv_cache import FULL
from flashpte.export.state.model_state import ModelState

MIN_PREFILL_CHUNK = 2
"""Fewest tokens of one prefill call. Decode handles one token, with other kernels. Starting at 2 also avoids the sizes
0 and 1, which PyTorch's symbolic shapes special-case; a range from 1 traces, but its code generation is untested."""


@dataclasses.dataclass(frozen=True)
class MethodSpec:
    """One method: its name, the fewest and most tokens of a call, and whether it returns the logits of all of them."""

    name: str
    min_tokens: int
    max_tokens: int
    all_logits: bool = False

    @property
    def dynamic(self) -> bool:
        """Whether the number of tokens is chosen at run time."""
        return self.min_tokens != self.max_tokens


def plan_methods(
    max_prefill_chunk: int,
    verify_window: int | None = None,
    only: str | None = None,
    *,
    min_prefill_chunk: int = MIN_PREFILL_CHUNK,
    decode: bool = True,
    draft: bool = False,
) -> tuple[MethodSpec, ...]:
    """The methods to export, in the order prefill, decode, target_verify, draft_decode.

    Args:
        max_prefill_chunk: most tokens of one prefill call, at least 2.
        verify_window: M of target_verify (2..16); ``None`` leaves that method out.
        only: export this method alone; ``None`` for all.
        min_prefill_chunk: fewest tokens of one prefill call.
        decode: whether to export ``decode``.
        draft: whether to export ``draft_decode``; it takes 1 row to as many as the longest call of the other methods.

    Raises:
        UsageError: ``only`` names a method that is not exported with these arguments.
    """
    specs = [MethodSpec(PREFILL, min_prefill_chunk, max_prefill_chunk)]
    if decode:
        specs.append(MethodSpec(DECODE, 1, 1))
    if verify_window is not None:
        specs.append(MethodSpec(TARGET_VERIFY, verify_window, verify_window, all_logits=True))
    if draft:
        specs.append(MethodSpec(DRAFT_DECODE, 1, max(max_prefill_chunk, verify_window or 1)))
    if only is None:
        return tuple(specs)
    chosen = tuple(spec for spec in specs if spec.name == only)
    if not chosen:
        raise UsageError(f"method {only} needs ", *_NEEDS[only])
    return chosen


_NEEDS: dict[str, tuple[str | Option, ...]] = {
    DECODE: ("a target that takes one token at a time and, beside a draft, ", Option("with_decode")),
    TARGET_VERIFY: ("a number of tokens: add ", wanted("verify_window")),
    DRAFT_DECODE: ("a draft: add ", wanted("draft")),
}


class CausalLMMethod(nn.Module):
    """A Hugging Face causal language model and its cache, as one exportable call.

    Every method wraps the same ``model`` and ``kv_cache`` under the same names, so a name (``model.<name in the
    checkpoint>``, ``kv_cache.k_<layer>``) means the same tensor in all methods.
    """

    def __init__(self, model: nn.Module, kv_cache: ModelState, *, all_logits: bool):
        super().__init__()
        self.model = model
        self.kv_cache = kv_cache
        self.all_logits = all_logits
        untyped: Any = model
        self.mask_per_type = takes_mask_per_type(untyped.config)

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        """Maps tokens int64 [1, T] at ``input_pos`` int64 [T] to logits [1, 1, V], or [1, T, V] with ``all_logits``."""
        masks = self.kv_cache.masks(input_pos)
        output = self.model(
            input_ids=tokens,
            position_ids=input_pos[None],
            attention_mask=masks if self.mask_per_type else masks[self.kv_cache.layers[0].mask_name or FULL],
            past_key_values=self.kv_cache.view(input_pos),
            use_cache=True,
            # run the head, with its large vocabulary, only for the last row; 0 means all rows
            logits_to_keep=0 if self.all_logits else 1,
        )
        return output.logits


def example_length(spec: MethodSpec) -> int:
    """Number of tokens to trace a method with: the middle of its range, because the ends might be special-cased."""
    return (spec.min_tokens + spec.max_tokens + 1) // 2


def export_method(
    model: nn.Module,
    kv_cache: ModelState,
    spec: MethodSpec,
    module: CausalLMMethod | None = None,
    others: Mapping[str, torch.Tensor] | None = None,
) -> ExportedProgram:
    """Exports one method of a model whose attention implementation is :data:`ATTENTION_NAME`.

    Tracing is non-strict: the model's Python runs directly, so TorchDynamo need not support its decorators, caches and
    output classes, and tracing is several times faster. Every shape decision is still guarded.

    Args:
        model: the causal language model.
        kv_cache: its cache.
        spec: the method.
        module: module to export instead of a plain :class:`CausalLMMethod`.
        others: examples of its inputs after tokens and positions, of static shapes, by name.
    """
    others = dict(others or {})
    length = example_length(spec)
    tokens = torch.zeros(1, length, dtype=torch.int64)
    input_pos = torch.arange(length, dtype=torch.int64)
    module = (module or CausalLMMethod(model, kv_cache, all_logits=spec.all_logits)).eval()
    inputs = (tokens, input_pos, *others.values())
    with torch.no_grad():
        if not spec.dynamic:
            return torch.export.export(module, inputs, strict=False)
        lengths = range(spec.min_tokens, spec.max_tokens + 1)
        dims: dict[str, dict[int, Any]] = {"tokens": {1: None}, "input_pos": {0: None}, **{name: {} for name in others}}
        return export_for_lengths(module, inputs, "tokens", lengths, dims)


def constant_methods(
    specs: Sequence[MethodSpec],
    *,
    max_seq_len: int,
    vocab_size: int,
    bos_id: int | None = None,
    eos_ids: Sequence[int] = (),
    samples: bool = False,
) -> dict[str, Any]:
    """Values that a runner reads from the program, by the name of the method that returns each.

    ``get_<method>_logits`` is ``"last"`` for a method that returns the last token's logits, and ``"all"`` for one that
    returns every token's; with ``samples``, methods return no logits. Unknown token ids are omitted.
    """
    values: dict[str, Any] = {
        "get_max_seq_len": max_seq_len,
        "get_max_context_len": max_seq_len,
        "get_vocab_size": vocab_size,
        "use_kv_cache": True,
    }
    for spec in specs:
        if spec.name == PREFILL:
            values["get_min_prefill_chunk"] = spec.min_tokens
            values["get_max_prefill_chunk"] = spec.max_tokens
        if spec.name == TARGET_VERIFY:
            values["get_verify_window"] = spec.max_tokens
        if spec.name != DRAFT_DECODE and not samples:
            values[f"get_{spec.name}_logits"] = "all" if spec.all_logits else "last"
    if bos_id is not None:
        values["get_bos_id"] = bos_id
    if eos_ids:
        values["get_eos_ids"] = list(eos_ids)
    return values
