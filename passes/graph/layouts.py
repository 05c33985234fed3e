"""Tracks where each entry of a tensor comes from, through any chain of views, copies and repetitions.

After such a chain, a dimension is a list of factors, outermost first. A factor is a run through a dimension of the
source, or a repetition. ``unsqueeze -> expand -> reshape`` of ``[B, H, L, D]`` makes the heads ``[H, repeated]``, which
is the order that grouped attention reads. ``repeat`` makes them ``[repeated, H]``, a different order of the same shape.
Views split and merge factors, and transposes move them. An operator that is not listed here ends the chain.

The trap: when an index picks entries, only the index values say which ones, so the index must be computed from
constants alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from flashpte.passes.graph.planned import Value
from flashpte.passes.graph.values import aten_target, same_size, val
from flashpte.passes.graph.views import Kind, kind_of, packet_of

aten = torch.ops.aten
Size = int | torch.SymInt

# Kinds that keep entries, each in one place or several. SELECT removes the dimension, so a layout cannot name it.
_MOVING = frozenset(Kind) - {Kind.JOIN, Kind.SPLIT, Kind.SELECT}

# The largest index, in elements, that the rewrite evaluates.
_MAX_INDEX = 65536


@dataclasses.dataclass(frozen=True)
class Factor:
    """``size`` steps of ``stride`` through dimension ``dim`` of the source. If ``dim`` is ``None``, a repetition."""

    size: Size
    dim: int | None
    stride: Size = 1


Layout = tuple[tuple[Factor, ...], ...]


def identity(shape: Sequence[Size]) -> Layout:
    """The layout of the source itself."""
    return tuple(() if same_size(size, 1) else (Factor(size, dim),) for dim, size in enumerate(shape))


def moved_input(node: Value) -> Value | None:
    """The single tensor whose entries ``node`` rearranges, or ``None``."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    kind = kind_of(node)
    if kind is Kind.JOIN:
        joined = node.args[0]
        assert isinstance(joined, (list, tuple))
        source = joined[0] if all(given is joined[0] for given in joined) else None
        return source if isinstance(source, Value) else None
    source = node.args[0] if node.args and isinstance(node.args[0], Value) else None
    if source is None or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    if val(source).dtype != val(node).dtype or val(source).device != val(node).device:
        return None
    return source if kind in _MOVING else None


class Layouts:
    """Layouts of the nodes of one graph.

    Args:
        constants: the values of placeholders that are the same in every call, by name.
    """

    def __init__(self, constants: Mapping[str, torch.Tensor] | None = None) -> None:
        self._constants = constants or {}
        self.read: set[Node] = set()
        """Nodes whose values were evaluated to find layouts. The graph must not write to them."""

    def through(self, source: Value, chain: Sequence[Value], same: Collection[Value] = ()) -> Layout | None:
        """The layout of the last node of ``chain``, which starts after ``source``. Nodes in ``same`` move nothing."""
        layout: Layout | None = identity(val(source).shape)
        for node in chain:
            if layout is not None and node not in same:
                layout = self.after(node, layout)
        return layout

    def after(self, node: Value, layout: Layout) -> Layout | None:
        """The layout of ``node``, given the layout of its :func:`moved_input`; ``None`` if unknown."""
        kind, source = kind_of(node), moved_input(node)
        assert source is not None
        before, after = val(source).shape, val(node).shape
        if kind is Kind.RESHAPE:
            return regrouped(layout, after)
        if kind is Kind.EXPAND:
            return _expanded(layout, after)
        if kind is Kind.PERMUTE:
            order = node.args[1]
            assert isinstance(order, (list, tuple))
            return tuple(layout[int(dim)] for dim in order)
        if kind is Kind.TRANSPOSE:
            return _transposed(layout, node)
        if kind is Kind.REPEAT:
            return _repeated(layout, node.args[1], after)
        if kind is Kind.INTERLEAVE:
            return _interleaved(layout, node)
        if kind is Kind.JOIN:
            return _joined(layout, node, packet_of(node) is aten.stack)
        if kind is Kind.INDEX:
            return self._picked(layout, node)
        same = len(before) == len(after) and all(same_size(a, b) for a, b in zip(before, after, strict=True))
        return layout if same else None

    def _picked(self, layout: Layout, node: Value) -> Layout | None:
        """Handles ``index`` along one dimension by a vector that repeats each entry equally often, in order."""
        if packet_of(node) is aten.index_select:
            dim, index = node.args[1], node.args[2]
        else:
            indices = node.args[1]
            assert isinstance(indices, (list, tuple))
            given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
            if len(given) != 1:
                return None
            dim, index = given[0]
        if not isinstance(dim, int) or not isinstance(index, Node):
            return None
        size = val(node).shape[dim] if val(index).dim() == 1 else None
        source = moved_input(node)
        assert source is not None
        entries = val(source).shape[dim]
        if not isinstance(size, int) or not isinstance(entries, int) or size % entries or size > _MAX_INDEX:
            return None
        numbers = self._constant(index)
        if numbers is None or numbers.dtype not in (torch.int64, torch.int32):
            return None
        times = size // entries
        if not torch.equal(numbers.long().cpu() % entries, torch.arange(entries).repeat_interleave(times)):
            return None
        if bool(((numbers >= entries) | (numbers < -entries)).any()):
            return None
        return _with_inner(layout, dim % len(layout), times)

    def _constant(self, node: Node) -> torch.Tensor | None:
        """The value of a node that is computed from constants alone; ``None`` for any other node."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not all(isinstance(s, int) for s in value.shape):
            return None
        if value.numel() > _MAX_INDEX:
            return None
        self.read.add(node)
        if node.op == "placeholder":
            return self._constants.get(node.name)
        target = aten_target(node)
        if target is aten.detach_.default:
            return self._constant(node.args[0]) if isinstance(node.args[0], Value) else None
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            return None
        if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
            return None
        known: dict[Node, torch.Tensor] = {}
        for given in node.all_input_nodes:
            number = self._constant(given)
            if number is None:
                return None
            known[given] = number
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        # Compute real numbers, outside any fake tensor mode of the program.
        with torch.no_grad():
            return target(*args, **kwargs)


def regrouped(layout: Layout, sizes: Sequence[Size]) -> Layout | None:
    """The same entries in dimensions of other sizes, in the order of ``view``; ``None`` if the sizes do not fit."""
    pending = [factor for factors in layout for factor in factors]
    result = []
    for size in sizes:
        taken: list[Factor] = []
        product: Size = 1
        wanted: Size
        while not same_size(product, size):
            if not pending:
                return None
            factor = pending.pop(0)
            if isinstance(product, int) and isinstance(size, int) and isinstance(factor.size, int):
                times = size // product
                if size % product or (factor.size > times and factor.size % times):
                    return None
                splits, wanted = factor.size > times, times
            else:
                wanted = size // product
                splits = (
                    same_size(wanted * product, size)
                    and same_size(factor.size // wanted * wanted, factor.size)
                    and not same_size(factor.size, wanted)
                )
            if splits:
                inner = factor.size // wanted
                pending.insert(0, Factor(inner, factor.dim, factor.stride))
                factor = Factor(wanted, factor.dim, factor.stride * inner)
            taken.append(factor)
            product = product * factor.size
        result.append(_merged(taken))
    return None if pending else tuple(result)


def _merged(factors: list[Factor]) -> tuple[Factor, ...]:
    merged: list[Factor] = []
    for factor in factors:
        last = merged[-1] if merged else None
        if last is not None and last.dim == factor.dim:
            if last.dim is None:
                merged[-1] = Factor(last.size * factor.size, None)
                continue
            if same_size(last.stride, factor.stride * factor.size):
                merged[-1] = Factor(last.size * factor.size, factor.dim, factor.stride)
                continue
        merged.append(factor)
    return tuple(merged)


def _repetition(times: Size) -> list[Factor]:
    return [] if same_size(times, 1) else [Factor(times, None)]


def _with_inner(layout: Layout, dim: int, times: Size) -> Layout:
    """Repeats each entry of a dimension ``times`` times in a row."""
    return (*layout[:dim], _merged([*layout[dim], *_repetition(times)]), *layout[dim + 1 :])


def _expanded(layout: Layout, sizes: Sequence[Size]) -> Layout | None:
    padded = [()] * (len(sizes) - len(layout)) + list(layout)
    result: list[tuple[Factor, ...]] = []
    for factors, size in zip(padded, sizes, strict=True):
        product: Size = 1
        for factor in factors:
            product = product * factor.size
        if same_size(product, size):
            result.append(tuple(factors))
        elif not factors:
            result.append((Factor(size, None),))
        else:
            return None
    return tuple(result)


def _transposed(layout: Layout, node: Value) -> Layout | None:
    dims = list(layout)
    if len(dims) < 2:
        return layout
    a, b = (0, 1) if len(node.args) < 3 else (node.args[1], node.args[2])
    if not isinstance(a, int) or not isinstance(b, int):
        return None
    dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


def _repeated(layout: Layout, repeats: Any, sizes: Sequence[Size]) -> Layout | None:
    """``repeat``: repeats a dimension as a whole."""
    # ``tile`` accepts fewer repeats than there are dimensions.
    repeats = [1] * (len(layout) - len(repeats)) + list(repeats)
    padded = [()] * (len(repeats) - len(layout)) + list(layout)
    result = []
    for factors, times, size in zip(padded, repeats, sizes, strict=True):
        if isinstance(times, Value):
            if factors:
                return None
            times = size
        result.append(_merged([*_repetition(times), *factors]))
    return tuple(result)


def _interleaved(layout: Layout, node: Value) -> Layout | None:
    given = dict(zip(("self", "repeats", "dim"), node.args, strict=False)) | dict(node.kwargs)
    times, dim = given.get("repeats"), given.get("dim")
    if not isinstance(times, int) or not isinstance(dim, int):
        return None
    return _with_inner(layout, dim % len(layout), times)


def _joined(layout: Layout, node: Value, stacked: bool) -> Layout | None:
    """``stack`` or ``cat`` of the same tensor several times."""
    tensors = node.args[0]
    assert isinstance(tensors, (list, tuple))
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(dim, int):
        return None
    dims, again = list(layout), _repetition(len(tensors))
    dim %= len(dims) + stacked
    if stacked:
        dims.insert(dim, tuple(again))
    else:
        dims[dim] = _merged([*again, *dims[dim]])
    return tuple(dims)
