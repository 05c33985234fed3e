"""The draft of an export in plain PyTorch, the reference of a check: whole sequences, a causal mask, no cache.

It is built from the manifest and the draft's checkpoint or the seed of its random weights, without an exported program.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from flashpte.export.common.errors import Option, ProgramError, wanted
from flashpte.export.common.options import ExportOptions
from flashpte.export.files.dtypes import read_dtype
from flashpte.export.models.eagle3 import DraftHead, FeatureFusion
from flashpte.export.pipeline.draft_plan import DraftPlan, plan_draft
from flashpte.export.state.model_state import StateView


@dataclasses.dataclass(frozen=True)
class DraftEvaluation:
    """The results of a draft for N rows; all tensors are on the CPU.

    Attributes:
        logits: [R, V_d], of the requested rows, over the draft's vocabulary.
        features: [R, C], the features after those rows.
        held: keys and values [H_kv, N, D] of its layer, as the attention gets them.
    """

    logits: torch.Tensor
    features: torch.Tensor
    held: Mapping[str, torch.Tensor]


class EagerDraft:
    """A draft head that reads every row at once.

    Attributes:
        taps: indices of the target's hidden states that it fuses.
    """

    def __init__(self, fusion: FeatureFusion, head: DraftHead, taps: Sequence[int], embedding: torch.Tensor):
        self.taps = tuple(taps)
        self._fusion = fusion.to(embedding.device)
        self._head = head.to(embedding.device)
        self._embedding = embedding if head.embed_tokens is None else head.embed_tokens.weight

    def fuse(self, taps: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Fuses hidden states [1, T, C_t], by tap, to features [1, T, C]."""
        return self._fusion([taps[tap] for tap in self.taps])

    def to_draft_id(self, token: int) -> int:
        """The draft's id of one of the target's tokens; -1 for a token that it cannot propose."""
        if self._head.d2t is None:
            return token
        targets = torch.arange(len(self._head.d2t)) + self._head.d2t.cpu()
        found = (targets == token).nonzero().flatten()
        return int(found[0]) if len(found) else -1

    def evaluate(self, tokens: Sequence[int], features: torch.Tensor, rows: Sequence[int]) -> DraftEvaluation:
        """One forward over rows 0..N-1.

        Args:
            tokens: N tokens, each the one that follows its row's position.
            features: [N, C], of the rows' positions, of any float dtype.
            rows: the R rows whose results are returned.
        """
        head, table = self._head, self._embedding
        device, count = table.device, len(tokens)
        positions = torch.arange(count, device=device)
        age = positions[:, None] - positions
        window = head.attention.window
        mask = (age >= 0) if window is None else (age >= 0) & (age < window)
        seen = _Seen()
        with torch.no_grad():
            given = features[None].to(device, table.dtype)
            embeds = F.embedding(torch.tensor([list(tokens)], device=device), table)
            rope = head.rotary_emb(given, positions[None])
            hidden = head.layer(embeds, given, rope, mask[None, None], cast(StateView, seen))[0, list(rows)]
            normalised = head.norm(hidden)
            logits = F.linear(normalised, table if head.lm_head is None else head.lm_head.weight)
        return DraftEvaluation(
            logits.cpu(),
            (normalised if head.norm_output else hidden).cpu(),
            {"keys": seen.keys.cpu(), "values": seen.values.cpu()},
        )


class _Seen:
    """Stands for a cache: holds the keys and values [1, H_kv, N, D] of a single call."""

    def update(
        self, key: torch.Tensor, value: torch.Tensor, _layer: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = key[0], value[0]
        return key, value


def rebuild_draft(manifest: Mapping[str, Any], model: nn.Module, draft: Path | None) -> DraftPlan | None:
    """The draft that a manifest describes, with its weights in the dtype of the export, on the CPU.

    Args:
        manifest: the manifest of an ``export-model`` folder.
        model: the target, rebuilt from the same manifest.
        draft: the folder of the draft that was exported; ``None`` for a random one.

    Returns:
        The draft, or ``None`` for a program without one.

    Raises:
        ExportError: the folder is missing or holds another draft, or the manifest does not say enough.
    """
    from flashpte.export.models.build import attention_of, describe
    from flashpte.export.models.registry import get_target

    described = manifest.get("draft")
    if described is None:
        if draft is not None:
            raise ProgramError(Option("draft"), ": this program has none")
        return None
    if not isinstance(described, dict) or not isinstance(described.get("chain"), int):
        raise ProgramError(
            Option("check"), ": the manifest does not describe the draft: export it again with this export-model"
        )
    random = described.get("family") == "random"
    if random != (draft is None):
        if random:
            raise ProgramError(Option("draft"), ": this program has a random draft, not one of a folder")
        raise ProgramError(Option("check"), ": this program has a draft: add ", wanted("draft"), ", the draft exported")
    weights = manifest.get("weights")
    seed = weights.get("random_seed") if isinstance(weights, dict) else None
    if random and not isinstance(seed, int):
        raise ProgramError(Option("check"), ": the manifest does not say where the draft's weights came from")
    target = str(manifest["target"])
    options = ExportOptions(target, random_seed=seed if random else None, draft=draft, chain=described["chain"])
    spec = get_target(target)
    plan = plan_draft(options, spec, describe(model, spec.layer_state or attention_of))
    assert plan is not None  # options with a chain have a draft
    found = plan.manifest()
    different = sorted(name for name in {*found, *described} if found.get(name) != described.get(name))
    if different:
        raise ProgramError(Option("draft", draft), f": not what was exported: {different[0]} differs")
    plan.load_weights(read_dtype(manifest["model"]["dtype"]), seed if random else None)
    return plan


def eager_draft(plan: DraftPlan, embedding: torch.Tensor) -> EagerDraft:
    """A copy of a draft in the dtype and on the device of the target's embedding [V, C_t]."""
    fusion, head = copy.deepcopy(plan.fusion), copy.deepcopy(plan.head)
    if next(fusion.parameters()).dtype != embedding.dtype:  # else no cast: RoPE's frequencies stay float32
        fusion, head = fusion.to(embedding.dtype), head.to(embedding.dtype)
    return EagerDraft(fusion, head, plan.taps, embedding)
