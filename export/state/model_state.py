"""The states of all layers of a model as one module of plain buffers, and the view of them that its layers get."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from flashpte.export.common.errors import ExportError
from flashpte.export.state.kv_cache import FULL, full_mask
from flashpte.export.state.layer_state import TARGET_PART, LayerState, StateRules

TARGET_STATE, DRAFT_STATE = "kv_cache", "draft_cache"
"""Names in the programs of the modules that hold the states."""


MakeZeros = Callable[[Sequence[int], torch.dtype], torch.Tensor]


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def state_bytes(layers: Sequence[LayerState], max_seq_len: int, dtype: torch.dtype) -> int:
    """Size of the buffers of all layers, in bytes."""
    buffers = (buffer for layer in layers for buffer in layer.buffers(max_seq_len, dtype).values())
    return sum(math.prod(shape) * held.itemsize for shape, held in buffers)


def state_rules(layers: Sequence[LayerState], cache: str, part: str = TARGET_PART) -> tuple[StateRules, ...]:
    """The manifest's rules for the states in the module that programs name ``cache``."""
    return tuple(
        layer.rules({name: f"{cache}.{name}_{index}" for name in layer.buffers(1, torch.float32)}, part)
        for index, layer in enumerate(layers)
    )


class ModelState(nn.Module):
    """The buffers of all layers, named ``<short name>_<layer>``; they are not persistent, so checkpoints lack them.

    Args:
        layers: the layers.
        max_seq_len: positions that the buffers hold.
        dtype: dtype of keys and values.
        zeros: makes a buffer from its shape and dtype.

    Raises:
        ExportError: the sliding layers do not share one window.
    """

    def __init__(
        self, layers: Sequence[LayerState], max_seq_len: int, dtype: torch.dtype, zeros: MakeZeros | None = None
    ):
        super().__init__()
        zeros = zeros or _zeros
        windows = sorted({layer.window for layer in layers if getattr(layer, "window", None) is not None})  # type: ignore[attr-defined]
        if len(windows) > 1:
            raise ExportError(f"layers with different sliding windows ({windows}) are not supported")
        self.max_seq_len = max_seq_len
        self.layers = tuple(layers)
        for index, layer in enumerate(layers):
            for name, (shape, held) in layer.buffers(max_seq_len, dtype).items():
                self.register_buffer(f"{name}_{index}", zeros(shape, held), persistent=False)
        self._names = [tuple(layer.buffers(max_seq_len, dtype)) for layer in layers]

    def masks(self, input_pos: torch.Tensor) -> dict[str, torch.Tensor]:
        """Bool masks [1, 1, T, S] (true: attend) by layer type; ``input_pos`` is int64 [T], consecutive, ascending."""
        masks = {FULL: full_mask(input_pos, self.max_seq_len)}
        for layer in self.layers:
            if layer.mask_name is not None and layer.mask_name not in masks:
                masks[layer.mask_name] = layer.mask(input_pos, self.max_seq_len)
        return masks

    def view(self, input_pos: torch.Tensor) -> StateView:
        """The object to pass to a Hugging Face model as ``past_key_values`` for one call."""
        views = []
        for index, (layer, names) in enumerate(zip(self.layers, self._names, strict=True)):
            buffers = {name: self.get_buffer(f"{name}_{index}") for name in names}
            views.append(layer.view(buffers, input_pos, self.max_seq_len))
        return StateView(views, input_pos)


class StateView:
    """The cache that Hugging Face layers see during one forward.

    Attributes:
        layers: each layer's view of its state, see :meth:`LayerState.view`.
    """

    def __init__(self, layers: Sequence[Any], input_pos: torch.Tensor):
        self.layers = list(layers)
        self._input_pos = input_pos

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes key and value [1, H_kv, T, D] into a layer's slots; returns its buffers [1, H_kv, S, D]."""
        return self.layers[layer_idx].update(key, value, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        """Position of the first new token, a 0-d int64 tensor."""
        return self._input_pos[0]
