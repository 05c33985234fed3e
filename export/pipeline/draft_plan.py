"""Plans a draft head for a target: makes all decisions and refusals before any weight is read."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from flashpte.export.common.errors import ExportError
from flashpte.export.common.options import DEFAULT_CHAIN, ExportOptions, check_options
from flashpte.export.files.dtypes import dtype_name
from flashpte.export.models.build import ModelFacts
from flashpte.export.models.eagle3 import Draft, build_draft, layer_config
from flashpte.export.models.eagle3_config import DraftConfig
from flashpte.export.models.registry import TargetSpec
from flashpte.export.state.kv_cache import AttentionState
from flashpte.export.weights.draft import (
    EMBEDDING,
    HEAD,
    DraftFiles,
    DraftWeights,
    RandomDraftWeights,
    check_draft_tensors,
    draft_recipe,
    open_draft,
)
from flashpte.export.weights.recipe import WeightSource, fill_weights, plan_weights

RANDOM_VOCAB_SIZE = 32_000
"""Vocabulary size of a random draft, as in published ones; half the target's if that is smaller."""


@dataclasses.dataclass(frozen=True)
class DraftPlan(Draft):
    """A draft head on the meta device, fitted to a target, and the source of its weights.

    Attributes:
        files: its checkpoint, already checked against the modules; ``None`` for a random draft.
        target_vocab_size: V.
    """

    files: DraftFiles | None
    target_vocab_size: int

    def load_weights(self, dtype: torch.dtype, seed: int | None) -> None:
        """Gives the draft its weights: the checkpoint's, random ones, or (only for tracing) uninitialized memory."""
        if self.files is not None:
            self._fill(dtype, DraftWeights(self.files, self.target_vocab_size))
        elif seed is not None:
            parts = (self.fusion, self.head)
            self._fill(dtype, RandomDraftWeights(parts, self.target_vocab_size, dtype, seed))
        else:
            self.fill_uninitialised(dtype)

    def fill_uninitialised(self, dtype: torch.dtype) -> None:
        """Gives every weight untouched memory, which is enough for tracing."""
        self._fill(dtype, None)

    def _fill(self, dtype: torch.dtype, source: WeightSource | None) -> None:
        for part in (self.fusion, self.head):
            recipe = draft_recipe(dtype_name(dtype))
            fill_weights(part, plan_weights(part, recipe), source)

    def manifest(self) -> dict[str, Any]:
        """The draft's entry in ``manifest.json``."""
        return {**self.config.manifest, "taps": list(self.taps), "chain": self.chain}


def plan_draft(options: ExportOptions, spec: TargetSpec, facts: ModelFacts) -> DraftPlan | None:
    """Fits the draft in the options to a target; returns ``None`` if the options have no draft.

    Args:
        options: options of the export.
        spec: the target.
        facts: the target's sizes, after its layers were cut.

    Raises:
        UsageError: the chain is out of range, or the options conflict.
        ExportError: the draft's folder is broken, needs something that is not implemented, or does not fit the target.
    """
    check_options(options)
    if not options.speculates:
        return None
    chain = DEFAULT_CHAIN if options.chain is None else options.chain
    if options.draft is None:
        return _random_plan(spec, facts, chain)
    files = open_draft(options.draft)
    config = files.config
    taps = config.taps if config.taps is not None else spec.taps(len(facts.states))
    _check_fit(files, facts, taps)
    own_map = files.vocabulary_map(facts.vocab_size) is not None
    own_embedding, own_head = files.has(EMBEDDING), files.has(HEAD)
    if not own_head and not (config.tie_word_embeddings and not own_map):
        raise ExportError(
            f"{files.folder} has no tensor {HEAD}, and its config does not tie one to an embedding of the same tokens"
        )
    fusion, head = build_draft(
        config, len(taps), facts.hidden_size, own_embedding=own_embedding, own_head=own_head, own_map=own_map
    )
    check_draft_tensors(files, fusion, head)
    return DraftPlan(config, chain, taps, fusion, head, files, facts.vocab_size)


def _check_fit(files: DraftFiles, facts: ModelFacts, taps: tuple[int, ...]) -> None:
    folder, config, layers = files.folder, files.config, len(facts.states)
    layer = layer_config(config)
    trained_for = config.target_hidden_size or layer.hidden_size
    if trained_for != facts.hidden_size:
        raise ExportError(
            f"draft {folder} was made for a target of hidden size {trained_for}, this target has {facts.hidden_size}"
        )
    if layer.vocab_size != facts.vocab_size:
        raise ExportError(
            f"draft {folder} was made for a vocabulary of {layer.vocab_size} tokens, this target has {facts.vocab_size}"
        )
    if not files.has(EMBEDDING) and layer.hidden_size != facts.hidden_size:
        raise ExportError(
            f"{folder} has no tensor {EMBEDDING}, and the target's embedding has {facts.hidden_size} columns, "
            f"the draft's hidden size is {layer.hidden_size}"
        )
    if beyond := [tap for tap in taps if tap > layers]:
        raise ExportError(
            f"draft {folder} taps the output of layer {beyond[0] - 1}; this target has {layers} layers "
            f"(0..{layers - 1})"
        )


def _random_plan(spec: TargetSpec, facts: ModelFacts, chain: int) -> DraftPlan:
    """A random draft with a typical size for this target and every part of published drafts."""
    first = next(state for state in facts.states if isinstance(state, AttentionState))
    size = min(RANDOM_VOCAB_SIZE, max(1, facts.vocab_size // 2))
    config = DraftConfig(
        family="random",
        model_type="llama",
        layer={
            "hidden_size": facts.hidden_size,
            "intermediate_size": 4 * facts.hidden_size,
            "num_attention_heads": 2 * first.kv_heads,
            "num_key_value_heads": first.kv_heads,
            "head_dim": first.head_dim,
            "vocab_size": facts.vocab_size,
            "max_position_embeddings": facts.max_positions,
        },
        draft_vocab_size=size,
        norm_before_residual=True,
    )
    taps = spec.taps(len(facts.states))
    fusion, head = build_draft(
        config, len(taps), facts.hidden_size, own_embedding=False, own_head=True, own_map=size != facts.vocab_size
    )
    return DraftPlan(config, chain, taps, fusion, head, None, facts.vocab_size)
