"""The state of a layer between calls: the protocol that a model's layers follow, and the rules that a runner reads.

A :class:`LayerState` is the model's side: during export it describes the buffers, and makes the view of them that the
layer's own code calls. :class:`StateRules` is the file's side: ``manifest.json`` holds one for each layer, and the
runtime knows only these rules. A new kind of state needs a class that follows the protocol and a target whose
``layer_state`` returns it; the runtime does not change.
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
    """The rules that a runner needs for the state of one layer.

    Attributes:
        kind: name of the kind, for people, such as ``full`` or ``sliding``.
        buffers: FQN of each buffer by its content: ``{"keys": "kv_cache.k_0", "values": "kv_cache.v_0"}``.
        goes_back: how a sequence goes back to an earlier position. ``position``: the next call uses a smaller position.
            ``snapshot``: the runner copies the buffers before a call and restores them.
        most_back: with ``position``, the most positions to go back by; ``None`` for no limit.
        fed_twice: whether a token may be fed again at its own position.
        compared: what a check compares. ``positions``: slot p mod S of dimension 2 holds position p. ``last``: the
            whole buffer, after the last token.
        part: ``target``, or ``draft`` for the draft's own state.
    """

    kind: str
    buffers: Mapping[str, str]
    goes_back: Literal["position", "snapshot"] = "position"
    most_back: int | None = None
    fed_twice: bool = True
    compared: Literal["positions", "last"] = "positions"
    part: str = TARGET_PART

    def to_dict(self) -> dict[str, Any]:
        """The rules as plain data, for the manifest."""
        return {**dataclasses.asdict(self), "buffers": dict(self.buffers)}


def read_states(manifest: Mapping[str, Any]) -> tuple[StateRules, ...]:
    """Reads the rules in a manifest's ``states``; for an older manifest without them, derives those of its KV caches.

    Raises:
        ProgramError: an entry is not as ``export-model`` writes it, or needs something that this version does not know.
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
    """Derives rules for a manifest of version 1, which had only full caches and rings, from the buffers' names."""
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
    """The state of one layer, described by its target."""

    @property
    def mask_name(self) -> str | None:
        """The name that the model's layers use for their mask; ``None`` for a layer without a mask."""

    def buffers(self, max_seq_len: int, dtype: torch.dtype) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each buffer, by a short name such as ``k``. All start as zeros."""

    def mask(self, input_pos: torch.Tensor, max_seq_len: int) -> torch.Tensor:
        """The mask, bool [1, 1, T, S], for positions ``input_pos`` int64 [T] of a call."""

    def view(self, buffers: Mapping[str, torch.Tensor], input_pos: torch.Tensor, max_seq_len: int) -> Any:
        """The object that the layer's code finds in ``past_key_values.layers[i]`` during a call."""

    def rules(self, names: Mapping[str, str], part: str) -> StateRules:
        """The rules for a runner; ``names`` maps the buffers' short names to FQNs."""

    def reference(self) -> Any:
        """An empty layer of a transformers ``Cache``, for the eager model of a check."""

    def read_reference(self, layer: Any) -> Mapping[str, torch.Tensor]:
        """A reference layer's tensors after a sequence, by the names of its rules, without the batch dimension."""
