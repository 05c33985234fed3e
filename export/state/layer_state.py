"""What a layer remembers between calls: the protocol that a model's layers follow, and the rules that a runner reads.

A :class:`LayerState` is the model's side: it makes buffers while a program is exported, and the view of them that the
layer's own code calls. :class:`StateRules` is the file's side: ``manifest.json`` holds one for each layer, and the
runtime knows of a state only what they say. A new kind of state is a class that follows the protocol and a target
whose ``layer_state`` returns it; no file of the runtime changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from flashpte.export.common.errors import ProgramError

if TYPE_CHECKING:
    import torch

TARGET_PART, DRAFT_PART = "target", "draft"


@dataclasses.dataclass(frozen=True)
class StateRules:
    """What a runner must know about the state of one layer.

    Attributes:
        kind: for people: ``full``, ``sliding``.
        buffers: FQN of each buffer by what it holds: ``{"keys": "kv_cache.k_0", "values": "kv_cache.v_0"}``.
        goes_back: how a sequence goes back to an earlier position. ``position``: the next call names a smaller one.
            ``snapshot``: the buffers are copied before a call and put back.
        most_back: with ``position``, by how many positions at most; ``None`` for no limit.
        fed_twice: whether a token may be fed again at its own position.
        compared: what a check compares. ``positions``: slot p mod S of dimension 2 holds position p. ``last``: the
            buffer as a whole, after the last token.
        part: ``target``, or ``draft`` for the draft's own.
    """

    kind: str
    buffers: Mapping[str, str]
    goes_back: Literal["position", "snapshot"] = "position"
    most_back: int | None = None
    fed_twice: bool = True
    compared: Literal["positions", "last"] = "positions"
    part: str = TARGET_PART

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {**dataclasses.asdict(self), "buffers": dict(self.buffers)}


def read_states(manifest: Mapping[str, Any]) -> tuple[StateRules, ...]:
    """The rules in a manifest's ``states``; for one that is older than they are, those of its KV caches.

    Raises:
        ProgramError: an entry is not as ``export-model`` writes it, or asks for what this version does not know.
    """
    if "states" not in manifest:
        return _states_by_name(manifest)
    try:
        rules = tuple(StateRules(**entry) for entry in manifest["states"])
        for rule in rules:
            dict(rule.buffers)
    except (TypeError, ValueError) as error:
        raise ProgramError(f"manifest.json: cannot read its states ({error!r})") from error
    for rule in rules:
        if rule.goes_back not in ("position", "snapshot") or rule.compared not in ("positions", "last"):
            raise ProgramError(
                f"manifest.json: state {rule.kind!r} goes back by {rule.goes_back!r} and is compared by "
                f"{rule.compared!r}, which this flashpte does not know"
            )
    return rules


def _states_by_name(manifest: Mapping[str, Any]) -> tuple[StateRules, ...]:
    """Version 1 knew caches alone, full ones and rings, and nothing but their names says what they hold."""
    methods = manifest.get("methods", {}).values()
    buffers = {name: entry for method in methods for name, entry in method.get("buffers", {}).items()}
    model = manifest.get("model") or {}
    window, length, rules = model.get("sliding_window"), model.get("max_seq_len"), []
    for part, cache in ((TARGET_PART, "kv_cache"), (DRAFT_PART, "draft_cache")):
        for layer in range(len(buffers)):
            names = {"keys": f"{cache}.k_{layer}", "values": f"{cache}.v_{layer}"}
            if not set(names.values()) <= buffers.keys():
                break
            ring = window is not None and buffers[names["keys"]]["shape"][2] < length
            rules.append(
                StateRules("sliding" if ring else "full", names, most_back=window if ring else None, part=part)
            )
    return tuple(rules)


class LayerState(Protocol):
    """The state of one layer, as its target describes it."""

    @property
    def mask_name(self) -> str | None:
        """Under which name the model's layers ask for the mask; ``None`` for a layer that needs none."""

    def buffers(self, max_seq_len: int, dtype: torch.dtype) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each buffer, by a short name: ``k``. All start as zeros."""

    def mask(self, input_pos: torch.Tensor, max_seq_len: int) -> torch.Tensor:
        """The mask, bool [1, 1, T, S], from the positions int64 [T] of a call."""

    def view(self, buffers: Mapping[str, torch.Tensor], input_pos: torch.Tensor, max_seq_len: int) -> Any:
        """What the layer's code finds in ``past_key_values.layers[i]`` during a call."""

    def rules(self, names: Mapping[str, str], part: str) -> StateRules:
        """What a runner must know, from the FQNs of the buffers by their short names."""

    def reference(self) -> Any:
        """An empty layer of a transformers ``Cache``, for the eager model of a check."""

    def read_reference(self, layer: Any) -> Mapping[str, torch.Tensor]:
        """What such a layer holds after a sequence, by the names of :attr:`StateRules.buffers`, without the batch."""
