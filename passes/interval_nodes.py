"""Turns a proven mask structure into the two small tensors that kernels read instead of the mask."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from flashpte.passes.insert import call_before, size_argument
from flashpte.passes.mask_terms import Bound, Extreme, Flag, Structure, Sum
from flashpte.passes.operands import KeyIndex, Operand
from flashpte.passes.sdpa_node import SdpaCall, same_size, val

aten = torch.ops.aten

_LEAST, _GREATEST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


class IntervalNodes:
    """Inserts, before one attention call, what computes the bounds and values of a structure.

    Vectors are int64 ``[B or 1, L]`` with L the rows or the keys.
    """

    def __init__(self, call: SdpaCall) -> None:
        self._anchor = call.node
        self._query, self._key = call.query, call.key
        assert call.mask is not None
        self._integers = {"dtype": torch.int64, "device": val(call.mask).device, "pin_memory": False}

    def insert(self, structure: Structure) -> tuple[Node, Node | None]:
        """``(key_bounds, key_values)`` as in :class:`flashpte.kernels.intervals.Intervals`."""
        # The key's index comes first: the kernels know it without being told.
        terms = sorted(structure.terms, key=lambda term: not _is_index(term.number))
        bounds = [
            (
                self._constant(_LEAST) if term.lower is None else self._bound(term.lower),
                self._constant(_GREATEST) if term.upper is None else self._bound(term.upper),
            )
            for term in terms
        ]
        values = [self._numbers(term.number) for term in terms if not _is_index(term.number)]
        if structure.key_flags:
            bounds.append((self._constant(1), self._constant(1)))
            values.append(self._as_int64(self._flags(structure.key_flags)))
        if structure.row_flags:
            # A row that its flags exclude gets bounds that no number lies between.
            shown = self._flags(structure.row_flags)
            lower, upper = bounds[0]
            bounds[0] = (
                self._call(aten.where.self, shown, lower, self._constant(_GREATEST)),
                self._call(aten.where.self, shown, upper, self._constant(_LEAST)),
            )
        sides = self._alike([side for pair in bounds for side in pair], size_argument(self._anchor, self._query, 2))
        key_bounds = self._stack(sides)
        if not values:
            return key_bounds, None
        rows = self._alike(values, size_argument(self._anchor, self._key, 2))
        return key_bounds, self._stack(rows)

    def _call(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        return call_before(self._anchor, op, *args, **kwargs)

    def _stack(self, vectors: list[Node]) -> Node:
        # Not aten.stack, which the edge dialect does not have.
        rows = [self._call(aten.unsqueeze.default, vector, 0) for vector in vectors]
        return rows[0] if len(rows) == 1 else self._call(aten.cat.default, rows)

    def _constant(self, number: int) -> Node:
        return self._call(aten.full.default, [1, 1], number, **self._integers)

    def _bound(self, bound: Bound) -> Node:
        if isinstance(bound, Extreme):
            op = aten.maximum.default if bound.largest else aten.minimum.default
            return self._call(op, self._bound(bound.a), self._bound(bound.b))
        if not bound.parts:
            return self._constant(bound.constant)
        return self._numbers(bound)

    def _numbers(self, number: Sum) -> Node:
        """A sum as a vector."""
        total: Node | None = None
        for operand, coefficient in number.parts:
            part = self._index() if isinstance(operand, KeyIndex) else self._as_int64(self._vector(operand))
            if coefficient != 1:
                part = self._call(aten.mul.Tensor, part, self._constant(coefficient))
            total = part if total is None else self._call(aten.add.Tensor, total, part)
        assert total is not None
        if not number.constant:
            return total
        # A bound that leaves 64 bits stays at their end: a position of the largest integer plus one is no small number.
        if number.constant > 0:
            total = self._call(aten.minimum.default, total, self._constant(_GREATEST - number.constant))
        else:
            total = self._call(aten.maximum.default, total, self._constant(_LEAST - number.constant))
        return self._call(aten.add.Tensor, total, self._constant(number.constant))

    def _index(self) -> Node:
        length = size_argument(self._anchor, self._key, 2)
        return self._call(aten.unsqueeze.default, self._call(aten.arange.start_step, 0, length, 1, **self._integers), 0)

    def _vector(self, operand: Operand) -> Node:
        """An operand without the dimensions that only line it up: ``[B or 1, L or 1]``."""
        node = operand.materialise(self._anchor)
        rank = val(node).dim()
        varies_by_key = operand.varies_in(0)
        if rank >= 3:
            node = self._call(aten.select.int, node, rank - 3, 0)
        if rank >= 2:
            # Rows stand in a column, keys in a row.
            last = val(node).dim() - 1
            node = self._call(aten.select.int, node, last - 1 if varies_by_key else last, 0)
        while val(node).dim() < 2:
            node = self._call(aten.unsqueeze.default, node, 0)
        return node

    def _flags(self, flags: tuple[Flag, ...]) -> Node:
        shown: Node | None = None
        for flag in flags:
            node = self._vector(flag.operand)
            if flag.negated:
                node = self._call(aten.logical_not.default, node)
            shown = node if shown is None else self._call(aten.logical_and.default, shown, node)
        assert shown is not None
        return shown

    def _as_int64(self, node: Node) -> Node:
        return node if val(node).dtype == torch.int64 else self._call(aten._to_copy.default, node, dtype=torch.int64)

    def _alike(self, vectors: list[Node], length: int | Node) -> list[Node]:
        """All expanded to the batch of the widest and to ``length``."""
        batches = [size_argument(self._anchor, v, 0) for v in vectors if not same_size(val(v).shape[0], 1)]
        shape = [batches[0] if batches else 1, length]
        return [self._call(aten.expand.default, vector, shape) for vector in vectors]


def _is_index(number: Sum) -> bool:
    return len(number.parts) == 1 and isinstance(number.parts[0][0], KeyIndex) and number.parts[0][1] == 1
