"""Estimates what a program copies in front of an attention kernel, for the report. Kernels read views and copy nothing.

A repetition of heads that is not undone writes a cache several times in each call. ``cat`` of past and new keys writes
it once, and so do ``contiguous`` and a ``reshape`` that is not a view. A copy of a result that was just computed does
not count, because compilers write the result directly to its destination.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator

import torch

from flashpte.passes.attention.call import SdpaCall
from flashpte.passes.attention.savings import largest
from flashpte.passes.graph.layouts import moved_input
from flashpte.passes.graph.planned import Value
from flashpte.passes.graph.values import Ranges, hint, val
from flashpte.passes.graph.views import Kind, kind_of, packet_of

aten = torch.ops.aten

_ALWAYS = (Kind.REPEAT, Kind.INTERLEAVE, Kind.INDEX, Kind.JOIN)
# Operators that return the tensor they update. Below: operators that write their result to their own memory.
_UPDATES = (
    *(aten.index_copy, aten.index_copy_, aten.index_put, aten.index_put_, aten.slice_scatter, aten.select_scatter),
    *(aten.copy, aten.copy_, aten.scatter, aten.scatter_),
)
_PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.matmul, aten.linear, aten.convolution, aten.conv2d)


def copied_bytes(call: SdpaCall, counted: set[Value], ranges: Ranges | None) -> int:
    """The most bytes that one run writes only to hand query, key and value to the kernel of ``call``.

    Args:
        call: the call that is replaced.
        counted: copies that were already counted. The copies of this call are added.
        ranges: the range constraints of its program.
    """
    total = 0
    for operand in (call.query, call.key, call.value):
        for node in _copies(operand):
            if node not in counted:
                counted.add(node)
                total += math.prod(largest(size, ranges) for size in val(node).shape) * val(node).dtype.itemsize
    return total


def _copies(operand: Value) -> Iterator[Value]:
    """The nodes on the way to an operand that make copies."""
    chain = [operand]
    while (source := _behind(chain[-1])) is not None:
        chain.append(source)
    root = chain[-1]
    for node in chain:
        grows = _entries(node) > _entries(root)
        if _is_copy(node) and (grows or any(_is_in_memory(given) for given in _joined(root))):
            yield node


def _behind(node: Value) -> Value | None:
    """The tensor that ``node`` takes all or some of its entries from."""
    given = node.args[0] if node.args else None
    if node.op == "call_function" and node.target is operator.getitem and isinstance(given, Value):
        parts = kind_of(given) is Kind.SPLIT
        return given.args[0] if parts and isinstance(given.args[0], Value) else None
    if kind_of(node) is Kind.SELECT and isinstance(given, Value):
        return given
    return moved_input(node)


def _is_copy(node: Value) -> bool:
    kind, packet, source = kind_of(node), packet_of(node), moved_input(node)
    if kind in _ALWAYS or packet in (aten.clone, aten._to_copy):
        return True
    if (kind is not Kind.RESHAPE and packet not in (aten.contiguous, aten.to)) or source is None:
        return False
    before = torch.empty_strided(*([hint(n) for n in given] for given in (val(source).shape, val(source).stride())),
                                 device="meta")  # fmt: skip
    if packet is aten.contiguous:
        return not before.is_contiguous()
    if packet is aten.to:
        return [hint(s) for s in val(node).stride()] != [hint(s) for s in val(source).stride()]
    try:
        before.view([hint(size) for size in val(node).shape])
    except RuntimeError:
        return True
    return False


def _joined(root: Value) -> list[Value]:
    """The inputs of a join at the start of a chain, or the start itself if it is not a join."""
    if kind_of(root) is Kind.JOIN:
        given = root.args[0]
        assert isinstance(given, (list, tuple))
        return [node for node in given if isinstance(node, Value)]
    return [root]


def _is_in_memory(node: Value) -> bool:
    """Whether a compiler cannot redirect a tensor's memory, because it is an input, a cache or a matrix product."""
    while True:
        packet = packet_of(node)
        source = node.args[0] if packet in _UPDATES else _behind(node)
        if not isinstance(source, Value):
            return node.op in ("placeholder", "get_attr") or packet in _PRODUCTS
        node = source


def _entries(node: Value) -> int:
    return math.prod(hint(size) for size in val(node).shape)
