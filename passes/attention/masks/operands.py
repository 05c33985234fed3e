"""Operands of a mask: a node, and the views through which the mask reads it.

A mask such as ``(keys <= positions[:, None])[None, None, :, :n]`` applies views to a comparison of two vectors. Thanks
to broadcasting, the views can be moved from the comparison to its operands. The result is vectors in the mask's own
coordinates, ``[..., L_q, L_kv]`` aligned at the right.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Node
from torch.utils import _pytree as pytree

from flashpte.passes.graph.planned import Planned, Value, planned
from flashpte.passes.graph.values import same_size, val
from flashpte.passes.graph.views import Kind, kind_of, packet_of

aten = torch.ops.aten

KEY_AXIS, ROW_AXIS, HEAD_AXIS, BATCH_AXIS = 0, 1, 2, 3

# Views that can be moved below a mask's operators, for any sizes.
_MOVED = (Kind.SAME, Kind.EXPAND, Kind.PERMUTE, Kind.TRANSPOSE, Kind.SLICE, Kind.SELECT, Kind.REPEAT)
_UNSQUEEZE = (aten.unsqueeze, aten.unsqueeze_copy)


def arguments(node: Value) -> tuple[Any, ...]:
    """The node's positional arguments, typed as ``Any`` instead of fx's argument type."""
    return node.args


def is_cast(node: Value) -> bool:
    """Whether the node changes nothing but dtype, layout or device."""
    return kind_of(node) is Kind.CAST


def view_source(node: Value) -> Value | None:
    """The source of ``node``, if ``node`` is a view that can be moved to the operands below it; otherwise ``None``."""
    kind, args = kind_of(node), arguments(node)
    if kind in _MOVED or packet_of(node) in _UNSQUEEZE:
        return args[0]
    if kind is Kind.RESHAPE:
        source = args[0]
        return source if _same_but_for_ones(val(source).shape, val(node).shape) else None
    if kind is Kind.INDEX:
        if packet_of(node) is aten.index_select:
            return args[0]
        given = [i for i in args[1] if i is not None]
        integers = len(given) == 1 and val(given[0]).dtype in (torch.int64, torch.int32)
        return args[0] if integers or (len(given) == 1 and val(given[0]).dim() == 1) else None
    return None


def _same_but_for_ones(a: torch.Size, b: torch.Size) -> bool:
    kept = [[s for s in sizes if not same_size(s, 1)] for sizes in (a, b)]
    return len(kept[0]) == len(kept[1]) and all(same_size(x, y) for x, y in zip(*kept, strict=True))


@dataclasses.dataclass(frozen=True)
class Placed:
    """A view that puts a part in its place within a concatenation or stack.

    Attributes:
        rank, dim: the number of dimensions of the part, and the dimension along which the parts are joined.
        before, after: the number of entries of the whole before and after the part, as arguments.
        new: whether a stack adds the dimension.
    """

    rank: int
    dim: int
    before: int | Value = 0
    after: int | Value = 0
    new: bool = False


Path = tuple[Value | Placed, ...]


class KeyIndex:
    """The index of a key in the attention's keys, as an operand."""

    def varies_in(self, axis: int) -> bool:
        """Whether the axis is that of the keys."""
        return axis == KEY_AXIS


KEY_INDEX = KeyIndex()


@dataclasses.dataclass(frozen=True)
class Step:
    """One operator applied to an operand: ``op(operand, *args)``. Lists among the arguments are stored as tuples."""

    op: Any
    args: tuple

    @property
    def call_args(self) -> list:
        """The arguments after the operand, in the form that the operator takes."""
        return [list(a) if isinstance(a, tuple) else a for a in self.args]


@dataclasses.dataclass(frozen=True)
class Operand:
    """``node`` seen through ``steps``, aligned at the right with the mask.

    Two operands are equal if they have the same node and the same steps.
    """

    node: Value
    steps: tuple[Step, ...]
    value: torch.Tensor = dataclasses.field(compare=False, hash=False, repr=False)

    @classmethod
    def through(cls, node: Value, path: Path) -> Operand | None:
        """``node`` seen through the views ``path``, innermost first; ``None`` if a view cannot be moved."""
        operand: Operand | None = cls(node, (), val(node))
        for view in path:
            if isinstance(view, Placed):
                operand = operand._placed(view) if operand is not None else None
                continue
            # The view applies to the tensor that the operand broadcasts to, which may have more dimensions.
            operand = operand._through(view, val(arguments(view)[0]).dim()) if operand is not None else None
        return operand

    def varies_in(self, axis: int) -> bool:
        """Whether the operand has, or may have, more than one entry along an axis counted from the right."""
        return axis < self.value.dim() and not same_size(self.value.shape[-1 - axis], 1)

    def read_by_steps(self) -> list[Value]:
        """Nodes and plans that the steps read besides the operand: indices and sizes."""
        return [leaf for step in self.steps for leaf in pytree.tree_leaves(step.args) if isinstance(leaf, Value)]

    def planned(self) -> Value:
        """The operand as a planned value."""
        value = self.node
        for step in self.steps:
            value = planned(step.op, value, *step.call_args, near=value)
        return value

    def then(self, op: Any, *args: Any) -> Operand:
        """The operand with one more step."""
        step = Step(op, tuple(tuple(a) if isinstance(a, list) else a for a in args))
        given = pytree.tree_map_only((Node, Planned), lambda n: n.meta["val"], step.call_args)
        fake_mode = detect_fake_mode([self.value])
        assert fake_mode is not None
        with fake_mode:
            value = op(self.value, *given)
        return Operand(self.node, (*self.steps, step), value)

    def _through(self, view: Value, rank: int) -> Operand | None:
        """The operand seen through one view of a ``rank``-dimensional tensor, to which this operand broadcasts."""
        kind, packet, args = kind_of(view), packet_of(view), arguments(view)
        own = self.value.dim()

        def own_dim(dim: int) -> int:
            """The operand's dimension that aligns with dimension ``dim`` of ``rank``; negative if it has none."""
            return (dim % rank) - (rank - own)

        if kind in (Kind.SAME, Kind.EXPAND):
            return self
        if packet in _UNSQUEEZE:
            dim = args[1] % (rank + 1) - (rank - own)
            return self if dim <= 0 else self.then(aten.unsqueeze.default, dim)
        if packet in (aten.narrow, aten.narrow_copy):
            dim, start, length = own_dim(args[1]), args[2], args[3]
            if dim < 0 or same_size(self.value.shape[dim], 1):
                return self
            if isinstance(start, int) and start >= 0 and (start == 0 or isinstance(length, int)):
                return self.then(aten.slice.Tensor, dim, start, start + length if start else length)
            return self.then(aten.narrow.default, dim, start, length)
        if kind in (Kind.SLICE, Kind.INDEX):
            # Picking entries along a dimension changes nothing if the operand broadcasts along it.
            index, picked = args[1] if len(args) > 1 else 0, None
            if packet is aten.index:
                index, picked = next((i, chosen) for i, chosen in enumerate(args[1]) if chosen is not None)
            dim = own_dim(index)
            if picked is not None and dim >= 0 and val(picked).dim() != 1:
                return self._indexed(dim, picked)
            if dim < 0 or same_size(self.value.shape[dim], 1):
                return self
            if kind is Kind.SLICE:
                return self.then(aten.slice.Tensor, dim, *args[2:])
            if picked is None:
                return self.then(aten.index_select.default, dim, args[2])
            return self.then(aten.index.Tensor, [*[None] * dim, picked])
        if kind is Kind.REPEAT:
            # Broadcasting already repeats dimensions of size 1. ``tile`` accepts fewer repeats than dimensions.
            repeats = [*[1] * (own - len(args[1])), *args[1]]
            times = [
                1 if same_size(size, 1) else count
                for size, count in zip(self.value.shape, repeats[len(repeats) - own :], strict=True)
            ]
            return self if all(count == 1 for count in times) else self.then(aten.repeat.default, times)
        if kind is Kind.SELECT:
            dim = own_dim(args[1])
            if dim < 0:
                return self
            return self.then(aten.select.int, dim, 0 if same_size(self.value.shape[dim], 1) else args[2])
        if kind in (Kind.PERMUTE, Kind.TRANSPOSE):
            order = list(range(rank))
            if kind is Kind.PERMUTE:
                order = [d % rank for d in args[1]]
            elif rank > 1:
                a, b = (0, 1) if packet in (aten.t, aten.t_copy) else (args[1] % rank, args[2] % rank)
                order[a], order[b] = order[b], order[a]
            operand = self._padded(rank)
            return operand.then(aten.permute.default, order)
        if kind is Kind.RESHAPE:
            return self._through_view(val(arguments(view)[0]).shape, val(view).shape)
        return None

    def _indexed(self, dim: int, index: Value) -> Operand:
        """Entries picked by an index of zero or several dimensions, which replace ``dim``."""
        if not same_size(self.value.shape[dim], 1):
            return self.then(aten.index.Tensor, [*[None] * dim, index])
        operand = self.then(aten.select.int, dim, 0)
        for _ in range(val(index).dim()):
            operand = operand.then(aten.unsqueeze.default, dim)
        return operand

    def _placed(self, place: Placed) -> Operand:
        """A part of a concatenation, padded to the length of the whole."""
        operand, own = self, self.value.dim()
        dim = place.dim - (place.rank - own)
        if place.new:
            # A stack adds the dimension; ``rank`` is the part's.
            return operand.then(aten.unsqueeze.default, dim) if dim > 0 else operand
        if dim < 0 or same_size(operand.value.shape[dim], 1):
            return operand
        return operand.then(aten.constant_pad_nd.default, [*[0] * (2 * (own - 1 - dim)), place.before, place.after], 0)

    def _padded(self, rank: int) -> Operand:
        operand = self
        while operand.value.dim() < rank:
            operand = operand.then(aten.unsqueeze.default, 0)
        return operand

    def _through_view(self, old: torch.Size, new: torch.Size) -> Operand:
        """The operand seen through a view that only adds and removes dimensions of size 1."""
        operand = self._padded(len(old))
        for dim in reversed(range(len(old))):
            if same_size(old[dim], 1):
                operand = operand.then(aten.select.int, dim, 0)
        for dim, size in enumerate(new):
            if same_size(size, 1):
                operand = operand.then(aten.unsqueeze.default, dim)
        return operand
