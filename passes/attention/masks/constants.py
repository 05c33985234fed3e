"""Analyzes tensors whose content is part of the program: lifted constants, and buffers that it does not write.

A mask is often a triangle in a buffer, from which each call picks rows. Every entry is compared with the form that a
proof needs, so a triangle with one flipped bit is rejected.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch._subclasses import FakeTensor

from flashpte.passes.graph.constants import Constant
from flashpte.passes.graph.planned import Value

# The largest tensor that is analyzed, in entries: a triangle of 16,384 positions.
MAX_ENTRIES = 2**28
# How many entries are compared at a time.
_CHUNK = 2**22


class Constants:
    """The constant tensors of a graph, by the name of their placeholder.

    A buffer that holds a single number everywhere does not count as constant. It may be the initial state of a buffer
    that another method fills.
    """

    def __init__(self, tensors: Mapping[str, Constant] | None = None) -> None:
        self._tensors = dict(tensors or {})
        self._only_entries: dict[str, int | float | bool | None] = {}
        self._bands: dict[str, tuple[int | None, int | None, float] | None] = {}

    def tensor(self, node: Value) -> torch.Tensor | None:
        """The content of a node, if it is constant and readable; otherwise ``None``."""
        if node.op != "placeholder" or node.name not in self._tensors:
            return None
        tensor = self._tensors[node.name].tensor
        if type(tensor) not in (torch.Tensor, torch.nn.Buffer) or isinstance(tensor, FakeTensor):
            return None
        readable = tensor.device.type not in ("meta",) and 0 < tensor.numel() <= MAX_ENTRIES
        return tensor.detach() if readable and tensor.layout is torch.strided else None

    def only_entry(self, node: Value) -> int | float | bool | None:
        """The number that all entries of a constant are equal to, or ``None``."""
        if node.op != "placeholder" or node.name not in self._tensors or self._tensors[node.name].buffer:
            return None
        if node.name not in self._only_entries:
            tensor = self.tensor(node)
            self._only_entries[node.name] = None if tensor is None else _only_entry(tensor)
        return self._only_entries[node.name]

    def band(self, node: Value) -> tuple[int | None, int | None, float] | None:
        """``(least, most, other)``: an entry is true (0 in a float mask) where ``least <= column - row <= most``.

        A side that excludes nothing is ``None``. ``other`` is a float mask's entry elsewhere. Returns ``None`` if the
        constant is not such a band in its last two dimensions, or if another dimension is larger than 1.
        """
        if node.op != "placeholder" or node.name not in self._tensors:
            return None
        if node.name not in self._bands:
            tensor = self.tensor(node)
            self._bands[node.name] = None if tensor is None else _band(tensor)
        return self._bands[node.name]


def _only_entry(tensor: torch.Tensor) -> int | float | bool | None:
    first = tensor.reshape(-1)[0]
    return first.item() if not tensor.is_complex() and bool(torch.eq(tensor, first).all()) else None


def _band(tensor: torch.Tensor) -> tuple[int | None, int | None, float] | None:
    if tensor.dim() < 2 or any(size != 1 for size in tensor.shape[:-2]):
        return None
    matrix = tensor.reshape(tensor.shape[-2:]).cpu()
    other = 0.0
    if matrix.is_floating_point():
        shown = matrix == 0
        hidden = matrix[~shown]
        if not len(hidden) or not bool((hidden == hidden[0]).all()):
            return None
        matrix, other = shown, float(hidden[0])
    if matrix.dtype != torch.bool:
        return None
    rows, columns = matrix.shape
    bits = matrix.to(torch.uint8)
    seen = matrix.any(1)
    if not bool(seen.any()):
        return None
    row = torch.arange(rows)
    first, last = bits.argmax(1), columns - 1 - bits.flip(1).argmax(1)
    least, most = int((first - row)[seen].min()), int((last - row)[seen].max())
    column = torch.arange(columns)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        distance = column - row[start : start + step, None]
        if not torch.equal(matrix[start : start + step], (distance >= least) & (distance <= most)):
            return None
    bounds = (None if least <= 1 - rows else least), (None if most >= columns - 1 else most)
    return None if bounds == (None, None) else (*bounds, other)
