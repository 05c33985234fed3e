"""KV caches of attention layers: one slot per position, or a ring of the last positions.

Shape legend: T new tokens, S slots of a cache buffer, H_kv key/value heads, D head dim. The batch is always 1.

A layer with full attention keeps one slot per position. A layer with a sliding window W keeps a ring of 2 W slots, with
position p in slot p mod 2 W. One call may write at most W tokens; more would overwrite keys that its own first row
attends to. A caller may move back (rejected speculative tokens) by at most W positions.

A layer with chunked attention (Llama 4) attends to the earlier positions of its own chunk of C tokens. It keeps the
same ring, with C for W: a chunk begins at most C - 1 positions before a row.

The position of every slot follows from the last position of a call. So nothing needs clearing between sequences: the
mask excludes slots that hold older or later tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from flashpte.export.state.layer_state import StateRules

FULL = "full_attention"
SLIDING = "sliding_attention"
CHUNKED = "chunked_attention"

_HOLDS = {"k": "keys", "v": "values"}


@dataclasses.dataclass(frozen=True)
class _KVCache:
    """What all kinds share: H_kv heads of dimension D."""

    kv_heads: int
    head_dim: int

    def slots(self, max_seq_len: int) -> int:
        """Number of slots in this layer's buffers."""
        return max_seq_len

    def buffers(self, max_seq_len: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of keys and values: each is [1, H_kv, S, D] in the model's dtype."""
        shape = (1, self.kv_heads, self.slots(max_seq_len), self.head_dim)
        return {"k": (shape, dtype), "v": (shape, dtype)}

    def view(self, buffers: Mapping[str, torch.Tensor], input_pos: torch.Tensor, max_seq_len: int) -> KVView:
        """The cache object for one call, which writes new keys and values and returns all of them."""
        return KVView(buffers["k"], buffers["v"], input_pos, max_seq_len)

    def reference(self) -> Any:
        """An empty transformers cache layer that keeps every position, with a sliding window too."""
        from transformers.cache_utils import DynamicLayer

        return DynamicLayer()

    def read_reference(self, layer: Any) -> dict[str, torch.Tensor]:
        """Keys and values [H_kv, T, D] of a reference layer."""
        return {"keys": layer.keys[0], "values": layer.values[0]}

    def _held(self, names: Mapping[str, str]) -> dict[str, str]:
        return {_HOLDS[short]: fqn for short, fqn in names.items()}


@dataclasses.dataclass(frozen=True)
class FullCache(_KVCache):
    """One slot per position; a sequence goes back by any number of positions."""

    @property
    def window(self) -> None:
        """``None``: rows attend to every earlier position."""
        return None

    @property
    def mask_name(self) -> str:
        """Hugging Face's name for layers with full attention."""
        return FULL

    def mask(self, input_pos: torch.Tensor, max_seq_len: int) -> torch.Tensor:
        """Bool [1, 1, T, S]: every position up to the row's own."""
        return full_mask(input_pos, max_seq_len)

    def rules(self, names: Mapping[str, str], part: str) -> StateRules:
        """Rules for a state that goes back by any smaller position."""
        return StateRules("full", self._held(names), part=part)


@dataclasses.dataclass(frozen=True)
class RingCache(_KVCache):
    """The last 2 W positions of a sliding window W; a sequence goes back by at most W."""

    window: int
    window_name: ClassVar[str] = "sliding window"

    @property
    def mask_name(self) -> str:
        """Hugging Face's name for layers with a sliding window."""
        return SLIDING

    def slots(self, max_seq_len: int) -> int:
        """2 W slots, or one per position if that is less."""
        return min(2 * self.window, max_seq_len)

    def mask(self, input_pos: torch.Tensor, max_seq_len: int) -> torch.Tensor:
        """Bool [1, 1, T, S]: the last W positions up to the row's own that the ring holds."""
        held = self._positions(input_pos, max_seq_len)
        age = input_pos[:, None] - held
        return ((held >= 0) & (age >= 0) & (age < self.window))[None, None]

    def rules(self, names: Mapping[str, str], part: str) -> StateRules:
        """Rules for a state that goes back by a smaller position, at most W earlier."""
        return StateRules("sliding", self._held(names), most_back=self.window, part=part)

    def _positions(self, input_pos: torch.Tensor, max_seq_len: int) -> torch.Tensor:
        """Int64 [S]: the newest position of each slot after a call; negative if the slot was never written."""
        size = self.slots(max_seq_len)
        slots = torch.arange(size, device=input_pos.device)
        last = input_pos[-1]
        return last - torch.remainder(last - slots, size)


@dataclasses.dataclass(frozen=True)
class ChunkRing(RingCache):
    """The last 2 C positions of a layer whose rows attend to their own chunk of C tokens; ``window`` is C."""

    window_name: ClassVar[str] = "attention chunk"

    @property
    def mask_name(self) -> str:
        """Hugging Face's name for layers with chunked attention."""
        return CHUNKED

    def mask(self, input_pos: torch.Tensor, max_seq_len: int) -> torch.Tensor:
        """Bool [1, 1, T, S]: the positions up to the row's own, from the start of its chunk."""
        held = self._positions(input_pos, max_seq_len)
        start = input_pos - torch.remainder(input_pos, self.window)
        return ((held >= start[:, None]) & (held <= input_pos[:, None]))[None, None]

    def rules(self, names: Mapping[str, str], part: str) -> StateRules:
        """Rules for a state that goes back by a smaller position, at most C earlier."""
        return StateRules("chunked", self._held(names), most_back=self.window, part=part)


AttentionState = FullCache | RingCache
WINDOW_NAMES = (RingCache.window_name, ChunkRing.window_name)


def attention_state(kv_heads: int, head_dim: int, window: int | None, chunk: int | None = None) -> AttentionState:
    """The cache of an attention layer; it has full attention if it has neither a window nor a chunk."""
    if chunk is not None:
        return ChunkRing(kv_heads, head_dim, chunk)
    return FullCache(kv_heads, head_dim) if window is None else RingCache(kv_heads, head_dim, window)


def full_mask(input_pos: torch.Tensor, max_seq_len: int) -> torch.Tensor:
    """Bool [1, 1, T, S]: every position up to the row's own."""
    rows = input_pos[:, None]
    slots = torch.arange(max_seq_len, device=input_pos.device)
    return (slots <= rows)[None, None]


class KVView:
    """The cache that an attention layer sees during one forward."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, input_pos: torch.Tensor, max_seq_len: int):
        self._keys, self._values = keys, values
        self._input_pos, self._max_seq_len = input_pos, max_seq_len

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes key and value [1, H_kv, T, D] into their slots; returns the buffers [1, H_kv, S, D]."""
        slots = self._input_pos
        if self._keys.shape[2] < self._max_seq_len:
            slots = torch.remainder(slots, self._keys.shape[2])
        self._keys.index_copy_(2, slots, key)
        self._values.index_copy_(2, slots, value)
        return self._keys, self._values
