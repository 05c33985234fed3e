"""Tensors as a mask sees them: a node, and the views through which the mask reads it.

A mask such as ``(keys <= positions[:, None])[None, None, :, :n]`` applies views to a comparison of two vectors. Moved
from the comparison to its operands the views mean the same, by broadcasting, and leave vectors: the operands in the
mask's own coordinates, ``[..., L_q, L_kv]`` aligned at the right.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Node
from torch.utils import _pytree as pytree

from flashpte.passes.graph.insert import call_before
from flashpte.passes.graph.values import aten_target, same_size, val

aten = torch.ops.aten

KEY_AXIS, ROW_AXIS, HEAD_AXIS, BATCH_AXIS = 0, 1, 2, 3

_SAME_VALUE = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.expand.default,
    aten.expand_copy.default,
    aten.expand_as.default,
    aten.broadcast_to.default,
}
_CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
}
_UNSQUEEZE = {aten.unsqueeze.default, aten.unsqueeze_copy.default}
_PERMUTE = {aten.permute.default, aten.permute_copy.default}
_TRANSPOSE = {aten.transpose.int, aten.transpose_copy.int}
_T = {aten.t.default, aten.t_copy.default}
_SLICE = {aten.slice.Tensor, aten.slice_copy.Tensor}
_SELECT = {aten.select.int, aten.select_copy.int}
_VIEW = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.view_copy.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze_copy.default,
    aten.squeeze_copy.dim,
    aten.squeeze_copy.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape_as.default,
}
_NARROW = {aten.narrow.default}
_REPEAT = {aten.repeat.default}
_CAT, _STACK = {aten.cat.default}, {aten.stack.default}
_INDEX = {aten.index.Tensor}
_INDEX_SELECT = {aten.index_select.default}


def arguments(node: Node) -> tuple[Any, ...]:
    """The node's positional arguments, without fx's type for whatever they may be."""
    return node.args


def is_cast(node: Node) -> bool:
    """Whether the node changes at most dtype, layout or device."""
    target = aten_target(node)
    return target in _CASTS or getattr(target, "__name__", "") == "_to_dim_order_copy.default"


def view_source(node: Node) -> Node | None:
    """The node that ``node`` is a view of which can be moved to the operands below it, or ``None``."""
    target, args = aten_target(node), arguments(node)
    known = _SAME_VALUE | _UNSQUEEZE | _PERMUTE | _TRANSPOSE | _T | _SLICE | _SELECT | _INDEX_SELECT | _NARROW | _REPEAT
    if target in known:
        return args[0]
    if target in _VIEW:
        source = args[0]
        return source if _same_but_for_ones(val(source).shape, val(node).shape) else None
    if target in _INDEX:
        given = [i for i in args[1] if i is not None]
        integers = len(given) == 1 and val(given[0]).dtype in (torch.int64, torch.int32)
        return args[0] if integers or (len(given) == 1 and val(given[0]).dim() == 1) else None
    return None


def _same_but_for_ones(a: torch.Size, b: torch.Size) -> bool:
    kept = [[s for s in sizes if not same_size(s, 1)] for sizes in (a, b)]
    return len(kept[0]) == len(kept[1]) and all(same_size(x, y) for x, y in zip(*kept, strict=True))


@dataclasses.dataclass(frozen=True)
class Placed:
    """A part of a concatenation or stack as a view: it stands at some place in the whole.

    Attributes:
        rank, dim: dimensions of the part, and which one it is laid along.
        before, after: entries of the whole on either side, as arguments.
        new: whether a stack adds the dimension.
    """

    rank: int
    dim: int
    before: int | Node = 0
    after: int | Node = 0
    new: bool = False


Path = tuple[Node | Placed, ...]


class KeyIndex:
    """The index of a key in the attention's keys, as an operand."""

    def varies_in(self, axis: int) -> bool:
        """Only along the keys."""
        return axis == KEY_AXIS


KEY_INDEX = KeyIndex()


@dataclasses.dataclass(frozen=True)
class Step:
    """One operator applied to an operand: ``op(operand, *args)``, lists among the arguments as tuples."""

    op: Any
    args: tuple

    @property
    def call_args(self) -> list:
        """Arguments after the operand as the operator takes them."""
        return [list(a) if isinstance(a, tuple) else a for a in self.args]


@dataclasses.dataclass(frozen=True)
class Operand:
    """``node`` seen through ``steps``, aligned at the right with the mask.

    Two operands are equal if they are the same node seen the same way.
    """

    node: Node
    steps: tuple[Step, ...]
    value: torch.Tensor = dataclasses.field(compare=False, hash=False, repr=False)

    @classmethod
    def through(cls, node: Node, path: Path) -> Operand | None:
        """``node`` seen through the views ``path``, innermost first; ``None`` if a view can't be moved."""
        operand: Operand | None = cls(node, (), val(node))
        for view in path:
            if isinstance(view, Placed):
                operand = operand._placed(view) if operand is not None else None
                continue
            # What is viewed is what the operand was broadcast to, which may have more dimensions.
            operand = operand._through(view, val(arguments(view)[0]).dim()) if operand is not None else None
        return operand

    def varies_in(self, axis: int) -> bool:
        """Whether the operand has more than one entry (or may have) along an axis counted from the right."""
        return axis < self.value.dim() and not same_size(self.value.shape[-1 - axis], 1)

    def read_by_steps(self) -> list[Node]:
        """Nodes that the steps read besides the operand: indices, sizes."""
        return [leaf for step in self.steps for leaf in pytree.tree_leaves(step.args) if isinstance(leaf, Node)]

    def materialise(self, anchor: Node) -> Node:
        """Inserts the steps before ``anchor``; returns the operand's node."""
        node = self.node
        for step in self.steps:
            node = call_before(anchor, step.op, node, *step.call_args)
        return node

    def then(self, op: Any, *args: Any) -> Operand:
        """The operand with one more step."""
        step = Step(op, tuple(tuple(a) if isinstance(a, list) else a for a in args))
        given = pytree.tree_map_only(Node, lambda n: n.meta["val"], step.call_args)
        fake_mode = detect_fake_mode([self.value])
        assert fake_mode is not None
        with fake_mode:
            value = op(self.value, *given)
        return Operand(self.node, (*self.steps, step), value)

    def _through(self, view: Node, rank: int) -> Operand | None:
        """One view of a tensor of ``rank`` dimensions that this operand, of no more, broadcasts to."""
        target, args = aten_target(view), arguments(view)
        own = self.value.dim()

        def own_dim(dim: int) -> int:
            """The operand's dimension that lines up with dimension ``dim`` of ``rank``; negative: it has none."""
            return (dim % rank) - (rank - own)

        if target in _SAME_VALUE:
            return self
        if target in _UNSQUEEZE:
            dim = args[1] % (rank + 1) - (rank - own)
            return self if dim <= 0 else self.then(aten.unsqueeze.default, dim)
        if target in _SLICE | _INDEX_SELECT | _INDEX:
            # What picks entries along one dimension changes nothing where the operand is broadcast.
            index = args[1] if len(args) > 1 else 0
            if target in _INDEX:
                index, picked = next((i, chosen) for i, chosen in enumerate(args[1]) if chosen is not None)
            dim = own_dim(index)
            if target in _INDEX and dim >= 0 and val(picked).dim() != 1:
                return self._indexed(dim, picked)
            if dim < 0 or same_size(self.value.shape[dim], 1):
                return self
            if target in _SLICE:
                return self.then(aten.slice.Tensor, dim, *args[2:])
            if target in _INDEX_SELECT:
                return self.then(aten.index_select.default, dim, args[2])
            return self.then(aten.index.Tensor, [*[None] * dim, picked])
        if target in _NARROW:
            dim, start, length = own_dim(args[1]), args[2], args[3]
            if dim < 0 or same_size(self.value.shape[dim], 1):
                return self
            if isinstance(start, int) and start >= 0 and (start == 0 or isinstance(length, int)):
                return self.then(aten.slice.Tensor, dim, start, start + length if start else length)
            return self.then(aten.narrow.default, dim, start, length)
        if target in _REPEAT:
            # What is broadcast is repeated by broadcasting.
            times = [
                1 if same_size(size, 1) else count
                for size, count in zip(self.value.shape, args[1][len(args[1]) - own :], strict=True)
            ]
            return self if all(count == 1 for count in times) else self.then(aten.repeat.default, times)
        if target in _SELECT:
            dim = own_dim(args[1])
            if dim < 0:
                return self
            return self.then(aten.select.int, dim, 0 if same_size(self.value.shape[dim], 1) else args[2])
        if target in _PERMUTE | _TRANSPOSE | _T:
            order = list(range(rank))
            if target in _PERMUTE:
                order = [d % rank for d in args[1]]
            elif rank > 1:
                a, b = (0, 1) if target in _T else (args[1] % rank, args[2] % rank)
                order[a], order[b] = order[b], order[a]
            operand = self._padded(rank)
            return operand.then(aten.permute.default, order)
        if target in _VIEW:
            return self._through_view(val(arguments(view)[0]).shape, val(view).shape)
        return None

    def _indexed(self, dim: int, index: Node) -> Operand:
        """Entries picked by an index that has no or several dimensions, which take the place of ``dim``."""
        if not same_size(self.value.shape[dim], 1):
            return self.then(aten.index.Tensor, [*[None] * dim, index])
        operand = self.then(aten.select.int, dim, 0)
        for _ in range(val(index).dim()):
            operand = operand.then(aten.unsqueeze.default, dim)
        return operand

    def _placed(self, place: Placed) -> Operand:
        """A part of a concatenation, as long as the whole."""
        operand, own = self, self.value.dim()
        dim = place.dim - (place.rank - own)
        if place.new:
            # A dimension that a stack adds; ``rank`` is that of the part.
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
        """A view that only adds and removes dimensions of size 1."""
        operand = self._padded(len(old))
        for dim in reversed(range(len(old))):
            if same_size(old[dim], 1):
                operand = operand.then(aten.select.int, dim, 0)
        for dim, size in enumerate(new):
            if same_size(size, 1):
                operand = operand.then(aten.unsqueeze.default, dim)
        return operand
