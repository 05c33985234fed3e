"""The KV cache of an exported model: plain buffers, the masks over them, the view that Hugging Face layers write to.

Shape legend: T new tokens, S slots of a cache buffer, H_kv key/value heads, D head dim. The batch is always 1.

A layer with full attention keeps one slot per position. A layer with a sliding window W keeps a ring of 2 W slots:
position p lives in slot p mod 2 W. One call may then write at most W tokens, or it overwrites keys that its own first
row still attends to. A caller may move back (rejected speculative tokens) by at most W positions.

Every slot's position follows from the last position of the call alone, so nothing has to be cleared between
sequences: a slot that holds a later or an older token is outside of what its position admits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flashpte.export.common.errors import ExportError

FULL = "full_attention"
SLIDING = "sliding_attention"


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What one layer's cache must hold: H_kv heads of dimension D, and the window (``None``: every position)."""

    kv_heads: int
    head_dim: int
    window: int | None

    def slots(self, max_seq_len: int) -> int:
        """Slots of this layer's buffers; a ring that would hold every position anyway is not longer than that."""
        return max_seq_len if self.window is None else min(2 * self.window, max_seq_len)


def cache_bytes(layers: Sequence[AttentionShape], max_seq_len: int, dtype: torch.dtype) -> int:
    """Bytes of the key and value buffers of all layers."""
    return sum(2 * layer.kv_heads * layer.slots(max_seq_len) * layer.head_dim * dtype.itemsize for layer in layers)


class KVCache(nn.Module):
    """Key and value buffers of every layer, each [1, H_kv, S, D] in the model's dtype.

    The buffers are named ``k_<layer>`` and ``v_<layer>`` and are not persistent: a checkpoint does not hold them.

    Raises:
        ExportError: the sliding layers do not share one window.
    """

    def __init__(self, layers: Sequence[AttentionShape], max_seq_len: int, dtype: torch.dtype):
        super().__init__()
        windows = sorted({layer.window for layer in layers if layer.window is not None})
        if len(windows) > 1:
            raise ExportError(f"layers with different sliding windows ({windows}) are not supported")
        self.max_seq_len = max_seq_len
        self.window = windows[0] if windows else None
        for index, layer in enumerate(layers):
            shape = (1, layer.kv_heads, layer.slots(max_seq_len), layer.head_dim)
            self.register_buffer(f"k_{index}", torch.zeros(shape, dtype=dtype), persistent=False)
            self.register_buffer(f"v_{index}", torch.zeros(shape, dtype=dtype), persistent=False)

    def masks(self, input_pos: torch.Tensor) -> dict[str, torch.Tensor]:
        """Bool masks [1, 1, T, S] (true: attend) by layer type; ``input_pos`` is int64 [T], consecutive, ascending."""
        rows = input_pos[:, None]
        slots = torch.arange(self.max_seq_len, device=input_pos.device)
        masks = {FULL: (slots <= rows)[None, None]}
        if self.window is not None:
            masks[SLIDING] = self._ring_mask(input_pos)[None, None]
        return masks

    def _ring_mask(self, input_pos: torch.Tensor) -> torch.Tensor:
        assert self.window is not None
        size = min(2 * self.window, self.max_seq_len)
        slots = torch.arange(size, device=input_pos.device)
        last = input_pos[-1]
        # the newest position up to `last` that falls into each slot; negative: the slot was never written
        held = last - torch.remainder(last - slots, size)
        age = input_pos[:, None] - held
        return (held >= 0) & (age >= 0) & (age < self.window)

    def view(self, input_pos: torch.Tensor) -> CacheView:
        """The object to hand to a Hugging Face model as ``past_key_values`` for one call."""
        return CacheView(self, input_pos)


class CacheView:
    """What Hugging Face attention layers ask of a cache during one forward: write new keys, get all of them back."""

    def __init__(self, cache: KVCache, input_pos: torch.Tensor):
        self._cache = cache
        self._input_pos = input_pos

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes key and value [1, H_kv, T, D] into a layer's slots; returns its buffers [1, H_kv, S, D]."""
        keys = self._cache.get_buffer(f"k_{layer_idx}")
        values = self._cache.get_buffer(f"v_{layer_idx}")
        slots = self._input_pos
        if keys.shape[2] < self._cache.max_seq_len:
            slots = torch.remainder(slots, keys.shape[2])
        keys.index_copy_(2, slots, key)
        values.index_copy_(2, slots, value)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        """Position of the first new token, a 0-d int64 tensor."""
        return self._input_pos[0]
