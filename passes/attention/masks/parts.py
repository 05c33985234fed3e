"""Handles masks that ``cat`` or ``stack`` joins from parts along a dimension."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from flashpte.passes.attention.masks.operands import Path, Placed, arguments
from flashpte.passes.graph.planned import Planned, Value, planned, planned_size
from flashpte.passes.graph.values import aten_target, same_size, val

aten = torch.ops.aten

Size = int | Value


def parts_of(node: Value, path: Path) -> list[tuple[Value, Path, list[Value]]] | None:
    """The parts of a concatenation seen through ``path``, or ``None`` if the node is not a concatenation.

    Returns:
        For each part: the part, the path that it is seen through, and bools in the coordinates of ``node``. Outside the
        part, exactly one of these bools is true.
    """
    target, args = aten_target(node), arguments(node)
    stacked = target is aten.stack.default
    if not stacked and target is not aten.cat.default:
        return None
    tensors, rank = list(args[0]), val(node).dim()
    given: Any = args[1] if len(args) > 1 else node.kwargs.get("dim", 0)
    dim = int(given) % rank
    if any(val(tensor).dim() != rank - stacked for tensor in tensors):
        return None  # cat skips empty vectors
    if any(val(tensor).dtype != val(node).dtype for tensor in tensors):
        return None
    sizes: list[Size] = [1 if stacked else _size(node, tensor, dim) for tensor in tensors]
    positions = None
    parts = []
    for i, tensor in enumerate(tensors):
        before, end, after = (_total(some) for some in (sizes[:i], sizes[: i + 1], sizes[i + 1 :]))
        placed = (Placed(rank, dim, before, after), *path)
        beside = []
        if len(tensors) > 1 and positions is None:
            positions = _positions(node, _total(sizes), rank - 1 - dim)
        if i > 0:
            beside.append(_compared(node, "lt", positions, before))
        if i + 1 < len(tensors):
            beside.append(_compared(node, "ge", positions, end))
        parts.append((tensor, (Placed(rank - 1, dim, new=True), *placed) if stacked else placed, beside))
    return parts


def _size(anchor: Value, tensor: Value, dim: int) -> Size:
    """A size of ``tensor``. Uses an earlier node with the same size if there is one, so that ``tensor`` may go."""
    size = val(tensor).shape[dim]
    if isinstance(size, int):
        return size
    for node in anchor.graph.nodes if isinstance(anchor, Node) else ():
        if node is anchor:
            break
        if isinstance(node.meta.get("val"), torch.SymInt) and same_size(node.meta["val"], size):
            return node
    return planned_size(tensor, dim)


def _total(sizes: list[Size]) -> Size:
    number = sum(size for size in sizes if isinstance(size, int))
    total: Size = number
    for value in (size for size in sizes if not isinstance(size, int)):
        if isinstance(total, int) and total == 0:
            total = value
            continue
        result = (total if isinstance(total, int) else total.meta["val"]) + value.meta["val"]
        total = Planned(operator.add, (total, value), {}, result)
    return total


def _positions(anchor: Value, total: Size, following: int) -> Value:
    options: dict[str, Any] = {"dtype": torch.int64, "device": val(anchor).device, "pin_memory": False}
    positions = planned(aten.arange.start_step, 0, total, 1, near=anchor, **options)
    for _ in range(following):
        positions = planned(aten.unsqueeze.default, positions, -1, near=anchor)
    return positions


def _compared(anchor: Value, name: str, positions: Any, number: Size) -> Value:
    if isinstance(number, int):
        return planned(getattr(aten, name).Scalar, positions, number, near=anchor)
    options: dict[str, Any] = {"dtype": torch.int64, "device": val(anchor).device, "pin_memory": False}
    one = planned(aten.full.default, [1], number, near=anchor, **options)
    return planned(getattr(aten, name).Tensor, positions, one, near=anchor)
