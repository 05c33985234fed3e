"""RoPE whose frequencies depend on the length of the sequence: an export fixes them for the length of its caches.

transformers has two such types. ``dynamic`` (NTK) raises the base when a sequence grows past the positions of the
training; ``longrope`` (Phi-3) has one set of factors for sequences up to the original length and another for longer
ones. The modules look at the positions in every call, branch on them and write to a buffer, which cannot be exported.
A cache also could not follow: keys that were rotated by the old frequencies stay in it. So the frequencies are those of
a sequence as long as the caches, for every position, as in servers such as vLLM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_KINDS = ("dynamic", "longrope")
_RECORD = "_flashpte_rope"


@dataclasses.dataclass(frozen=True)
class FixedRope:
    """RoPE whose frequencies were fixed.

    Attributes:
        kind: its type in the config, ``"dynamic"`` or ``"longrope"``.
        length: tokens of the sequence that the frequencies are for.
        original: longest sequence that uses the original frequencies.
    """

    kind: str
    length: int
    original: int

    @property
    def note(self) -> str:
        """What was fixed, in a line for people."""
        which = "the original ones" if self.length <= self.original else f"those past {self.original} tokens"
        return f"RoPE of type {self.kind}: its frequencies are fixed for {self.length} tokens ({which})"


def fix_rope(model: nn.Module, length: int) -> tuple[FixedRope, ...]:
    """Gives each RoPE of a Hugging Face model that depends on the length the frequencies for ``length`` tokens.

    It may be called again with another length. Frequencies are float32; a later ``model.to(dtype)`` changes them, as it
    changes those of transformers.

    Args:
        model: a model; it is changed in place.
        length: tokens of the sequence.

    Returns:
        What was fixed, each once; empty if nothing depends on the length.
    """
    found: dict[FixedRope, None] = {}
    for module in model.modules():
        for layer_type, kind in _kinds_of(module).items():
            found[_fix(module, layer_type, kind, length)] = None
    return tuple(found)


def longest(config: Any) -> int:
    """Most positions that a config's model was made for; ``dynamic`` RoPE scales them by its factor."""
    positions: int = config.max_position_embeddings
    factors = [
        (rope.get("factor") or 1.0) if rope.get("rope_type") == "dynamic" else 1.0 for rope in _parameters(config)
    ]
    return int(positions * min(factors, default=1.0))


def _kinds_of(module: Any) -> dict[str | None, str]:
    """The types of a module's RoPE that depend on the length, by layer type; ``None`` if it has one for all layers."""
    kinds = getattr(module, _RECORD, None)
    if kinds is None:
        named = getattr(module, "rope_type", None)
        kinds = dict(named) if isinstance(named, Mapping) else {None: named}
        kinds = {layer_type: kind for layer_type, kind in kinds.items() if kind in _KINDS}
        if kinds:
            setattr(module, _RECORD, kinds)
    return kinds


def _fix(module: Any, layer_type: str | None, kind: str, length: int) -> FixedRope:
    prefix = "" if layer_type is None else f"{layer_type}_"
    options = {} if layer_type is None else {"layer_type": layer_type}
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](module.config, None, seq_len=length, **options)
    buffer = getattr(module, f"{prefix}inv_freq")
    module.register_buffer(f"{prefix}inv_freq", frequencies.to(buffer.device), persistent=False)
    setattr(module, f"{prefix}attention_scaling", scaling)
    # The decorator of the forward looks at this name alone.
    if layer_type is None:
        module.rope_type = "default"
    else:
        module.rope_type = {**module.rope_type, layer_type: "default"}
    parameters = module.config.rope_parameters
    parameters = parameters if layer_type is None else parameters[layer_type]
    original = module.config.max_position_embeddings
    if kind == "longrope":
        original = parameters.get("original_max_position_embeddings") or original
    return FixedRope(kind, length, original)


def _parameters(config: Any) -> list[Mapping[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    return [value for value in parameters.values() if isinstance(value, Mapping)] or [parameters]
