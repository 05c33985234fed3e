"""The methods of a target with an EAGLE-3 draft, and how each becomes an ``ExportedProgram``.

=================  ==============================================  ==============================================
method             takes                                           returns
=================  ==============================================  ==============================================
``prefill``        tokens int64 [1, T], input_pos int64 [T]        logits [1, 1, V] of the last token,
                                                                   features [1, T, C] of every token
``target_verify``  tokens int64 [1, K + 1], input_pos [K + 1]      logits [1, K + 1, V], features [1, K + 1, C]
``draft_decode``   tokens int64 [1, T], features [1, T, C],        proposal int64 [1, 1], a token of the target's
                   input_pos int64 [T]                             vocabulary; feature [1, 1, C] after it
=================  ==============================================  ==============================================

K is the chain, V the target's vocabulary, C the draft's hidden size. Features are the fused taps that the draft reads;
they have a third of the bytes of the hidden states. A row of ``draft_decode`` is the feature of position p and the
token at p + 1; its ``input_pos`` is p. The method returns the results of its last row, so the next step of the chain
takes (proposal, feature, p + 1). It takes 1 to ``get_max_draft_tokens`` rows: those of a prompt, those that a round
accepted, or the one of a step.

``prefill`` and ``target_verify`` share the target's cache (``kv_cache.*``); ``draft_decode`` has its own
(``draft_cache.*``). The draft proposes its most likely token, not a distribution: see
:mod:`flashpte.export.speculative`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from flashpte.export.common.options import DECODE, DRAFT_DECODE
from flashpte.export.models.build import decoder_layers, embedding_name
from flashpte.export.models.eagle3 import Draft, DraftHead, FeatureFusion
from flashpte.export.models.methods import CausalLMMethod, MethodSpec, example_length, export_method
from flashpte.export.models.tracing import export_for_lengths
from flashpte.export.state.kv_cache import FULL, SLIDING
from flashpte.export.state.model_state import ModelState


@contextlib.contextmanager
def recorded_taps(model: nn.Module, taps: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Fills a mapping with hidden states [1, T, C_t] while the model runs.

    Tap 0 is the embedding, k the output of layer k - 1. The last layer's output is taken before the final norm.
    """
    found: dict[int, torch.Tensor] = {}

    def before_first(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[0] = args[0] if args else kwargs["hidden_states"]

    def after(tap: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[tap] = output[0] if isinstance(output, tuple) else output

        return hook

    layers = decoder_layers(model)
    handles = []
    try:
        for tap in taps:
            if tap == 0:
                handles.append(layers[0].register_forward_pre_hook(before_first, with_kwargs=True))
            else:
                handles.append(layers[tap - 1].register_forward_hook(after(tap)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


class TargetMethod(CausalLMMethod):
    """A method of the target that also returns the features for the draft."""

    def __init__(
        self, model: nn.Module, kv_cache: ModelState, fusion: FeatureFusion, taps: Sequence[int], *, all_logits: bool
    ):
        super().__init__(model, kv_cache, all_logits=all_logits)
        self.feature_fusion = fusion
        self.taps = tuple(taps)

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Maps tokens int64 [1, T] at ``input_pos`` int64 [T] to logits [1, 1 or T, V] and features [1, T, C]."""
        with recorded_taps(self.model, self.taps) as found:
            logits = super().forward(tokens, input_pos)
        return logits, self.feature_fusion([found[tap] for tap in self.taps])


class DraftMethod(nn.Module):
    """One forward of the draft with its cache, as one exportable call.

    A draft without its own embedding reads the target's, under the name that it has in the target's methods.
    """

    def __init__(self, model: nn.Module, draft: DraftHead, draft_cache: ModelState):
        super().__init__()
        self.draft = draft
        self.draft_cache = draft_cache
        self.embedding_path: tuple[str, ...] = ()
        if draft.embed_tokens is None:
            self.embedding_path = ("model", *embedding_name(model).split("."))
            _mirror(self, self.embedding_path, model)

    def forward(
        self, tokens: torch.Tensor, features: torch.Tensor, input_pos: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes tokens int64 [1, T], features [1, T, C] and ``input_pos`` int64 [T].

        Returns:
            The proposal int64 [1, 1] and the feature after it [1, 1, C].
        """
        masks = self.draft_cache.masks(input_pos)
        logits, feature = self.draft(
            tokens,
            features,
            input_pos,
            masks[SLIDING if SLIDING in masks else FULL],
            self.draft_cache.view(input_pos),
            self._embedding(),
        )
        return self.draft.to_target_ids(logits.argmax(-1)), feature

    def _embedding(self) -> torch.Tensor:
        if self.draft.embed_tokens is not None:
            return self.draft.embed_tokens.weight
        return self.get_submodule(".".join(self.embedding_path)).get_parameter("weight")


def _mirror(root: nn.Module, path: Sequence[str], model: nn.Module) -> None:
    """Registers the target's embedding weight, and nothing else of the target, below ``root`` under its own name."""
    module = root
    for name in path:
        child = nn.Module()
        module.add_module(name, child)
        module = child
    module.register_parameter("weight", model.get_submodule(".".join(path[1:])).get_parameter("weight"))


def export_with_draft(
    model: nn.Module, kv_cache: ModelState, draft: Draft, draft_cache: ModelState, spec: MethodSpec
) -> ExportedProgram:
    """Exports one method of a target with a draft; ``decode`` is the plain method, because the draft does not use it.

    Args:
        model: the target, with the attention implementation :data:`ATTENTION_NAME`.
        kv_cache: the target's cache.
        draft: the draft, with loaded weights.
        draft_cache: the draft's cache, with one layer.
        spec: the method.
    """
    if spec.name == DECODE:
        return export_method(model, kv_cache, spec)
    if spec.name != DRAFT_DECODE:
        module = TargetMethod(model, kv_cache, draft.fusion, draft.taps, all_logits=spec.all_logits)
        return export_method(model, kv_cache, spec, module)
    length = example_length(spec)
    dtype = draft.head.norm.weight.dtype
    inputs = (
        torch.zeros(1, length, dtype=torch.int64),
        torch.zeros(1, length, draft.head.hidden_size, dtype=dtype),
        torch.arange(length, dtype=torch.int64),
    )
    dims: dict[str, dict[int, Any]] = {"tokens": {1: None}, "features": {1: None}, "input_pos": {0: None}}
    drafting = DraftMethod(model, draft.head, draft_cache).eval()
    with torch.no_grad():
        return export_for_lengths(drafting, inputs, "rows", range(spec.min_tokens, spec.max_tokens + 1), dims)


def draft_constants(draft: Draft, specs: Sequence[MethodSpec]) -> dict[str, Any]:
    """Values that a runner reads from a program with a draft, by the name of the method that returns each.

    ``get_chain_len`` is K, ``get_feature_size`` C and ``get_draft_vocab_size`` V_d. ``get_taps`` lists the fused hidden
    states (0 is the embedding, k the output of layer k - 1). ``get_min_draft_tokens`` and ``get_max_draft_tokens`` are
    the fewest and most rows of ``draft_decode``.
    """
    values: dict[str, Any] = {
        "get_chain_len": draft.chain,
        "get_taps": list(draft.taps),
        "get_feature_size": draft.head.hidden_size,
        "get_draft_vocab_size": draft.config.draft_vocab_size,
    }
    for spec in specs:
        if spec.name == DRAFT_DECODE:
            values["get_min_draft_tokens"] = spec.min_tokens
            values["get_max_draft_tokens"] = spec.max_tokens
    return values
