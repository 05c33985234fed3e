"""Plans the two small tensors that kernels read instead of a mask with a proven structure."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch

from flashpte.passes.attention.call import SdpaCall
from flashpte.passes.attention.masks.operands import KeyIndex, Operand
from flashpte.passes.attention.masks.terms import (
    Between,
    Bound,
    Constraint,
    Extreme,
    Number,
    Structure,
    Sum,
    Truth,
    Unless,
)
from flashpte.passes.graph.planned import Value, planned, planned_size
from flashpte.passes.graph.values import same_size, val

aten = torch.ops.aten

_LEAST, _GREATEST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


class IntervalPlan(NamedTuple):
    """A mask in the form that attention operators take.

    Attributes:
        key_bounds, key_values: as in :class:`flashpte.kernels.intervals.Intervals`.
        live: bool ``[B or 1, 1, L_q or 1, 1]``, false for rows that average all values. Such a row sees every key, and
            its query must be 0. ``None`` if there are no such rows.
    """

    key_bounds: Value
    key_values: Value | None
    live: Value | None


class IntervalPlanner:
    """Plans the bounds and values of a structure for one attention call.

    Vectors are int64 ``[B or 1, L]``, where L is the number of rows or of keys.
    """

    def __init__(self, call: SdpaCall) -> None:
        self._query, self._key = call.query, call.key
        assert call.mask is not None
        self._integers = {"dtype": torch.int64, "device": val(call.mask).device, "pin_memory": False}

    def plan(self, structure: Structure) -> IntervalPlan:
        """Plans the tensors that define the mask for attention operators."""
        # The key's index comes first, because the kernels know it without a tensor.
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
            values.append(self._as_int64(self._all(structure.key_flags)))
        if structure.row_flags:
            # A row that its flags exclude gets bounds that no number can satisfy.
            shown = self._all(structure.row_flags)
            lower, upper = bounds[0]
            bounds[0] = (
                self._call(aten.where.self, shown, lower, self._constant(_GREATEST)),
                self._call(aten.where.self, shown, upper, self._constant(_LEAST)),
            )
        live = None
        if structure.blank_rows_average:
            live = self._live(bounds, values)
            bounds = [
                (
                    self._call(aten.where.self, live, lower, self._constant(_LEAST)),
                    self._call(aten.where.self, live, upper, self._constant(_GREATEST)),
                )
                for lower, upper in bounds
            ]
            live = self._call(aten.unsqueeze.default, self._call(aten.unsqueeze.default, live, 1), -1)
        sides = self._alike([side for pair in bounds for side in pair], planned_size(self._query, 2))
        key_bounds = self._stack(sides)
        if not values:
            return IntervalPlan(key_bounds, None, live)
        rows = self._alike(values, planned_size(self._key, 2))
        return IntervalPlan(key_bounds, self._stack(rows), live)

    def _live(self, bounds: list[tuple[Value, Value]], values: list[Value]) -> Value:
        """Which rows see a key: ``[B or 1, L_q or 1]``."""
        if not values:
            # The indices of keys are 0 to L_kv - 1.
            lower, upper = bounds[0]
            length = self._call(aten.full.default, [1, 1], planned_size(self._key, 2), **self._integers)
            seen = self._call(aten.le.Tensor, lower, upper)
            seen = self._call(aten.logical_and.default, seen, self._call(aten.lt.Tensor, lower, length))
            return self._call(aten.logical_and.default, seen, self._call(aten.ge.Scalar, upper, 0))
        numbers = values if len(values) == len(bounds) else [self._index(), *values]
        shown = [
            self._within(*(self._call(aten.unsqueeze.default, vector, dim) for vector, dim in vectors))
            for vectors in (
                ((number, 1), (low, 2), (high, 2)) for number, (low, high) in zip(numbers, bounds, strict=True)
            )
        ]
        return self._call(aten.any.dim, self._and(shown), -1)

    def _within(self, number: Value, lower: Value | None, upper: Value | None) -> Value:
        above = [] if lower is None else [self._call(aten.ge.Tensor, number, lower)]
        below = [] if upper is None else [self._call(aten.le.Tensor, number, upper)]
        return self._and(above + below)

    def _and(self, shown: list[Value]) -> Value:
        total = shown[0]
        for node in shown[1:]:
            total = self._call(aten.logical_and.default, total, node)
        return total

    def _call(self, op: Any, *args: Any, **kwargs: Any) -> Value:
        return planned(op, *args, near=self._query, **kwargs)

    def _stack(self, vectors: list[Value]) -> Value:
        # The edge dialect has no aten.stack.
        rows = [self._call(aten.unsqueeze.default, vector, 0) for vector in vectors]
        return rows[0] if len(rows) == 1 else self._call(aten.cat.default, rows)

    def _constant(self, number: int) -> Value:
        return self._call(aten.full.default, [1, 1], number, **self._integers)

    def _bound(self, bound: Bound) -> Value:
        if isinstance(bound, Extreme):
            op = aten.maximum.default if bound.largest else aten.minimum.default
            return self._call(op, self._bound(bound.a), self._bound(bound.b))
        if isinstance(bound, Unless):
            return self._unless(bound, self._bound(cast(Bound, bound.number)))
        if not bound.parts:
            return self._constant(bound.constant)
        return self._numbers(bound)

    def _unless(self, choice: Unless, number: Value) -> Value:
        end = self._constant(_GREATEST if choice.largest else _LEAST)
        return self._call(aten.where.self, self._all(choice.conditions), end, number)

    def _numbers(self, number: Number) -> Value:
        """A number as a vector."""
        if isinstance(number, Unless):
            return self._unless(number, self._numbers(cast(Number, number.number)))
        if isinstance(number, Truth):
            return self._as_int64(self._all(number.conditions))
        total: Value | None = None
        for operand, coefficient in number.parts:
            part = self._index() if isinstance(operand, KeyIndex) else self._as_int64(self._vector(operand))
            if coefficient != 1:
                part = self._call(aten.mul.Tensor, part, self._constant(coefficient))
            total = part if total is None else self._call(aten.add.Tensor, total, part)
        assert total is not None
        if not number.constant:
            return total
        # Saturate at the ends of int64: the largest integer plus one must not wrap to a small number.
        if number.constant > 0:
            total = self._call(aten.minimum.default, total, self._constant(_GREATEST - number.constant))
        else:
            total = self._call(aten.maximum.default, total, self._constant(_LEAST - number.constant))
        return self._call(aten.add.Tensor, total, self._constant(number.constant))

    def _index(self) -> Value:
        length = planned_size(self._key, 2)
        return self._call(aten.unsqueeze.default, self._call(aten.arange.start_step, 0, length, 1, **self._integers), 0)

    def _vector(self, operand: Operand) -> Value:
        """An operand without the dimensions that only align it: ``[B or 1, L or 1]``."""
        node = operand.planned()
        rank = val(node).dim()
        varies_by_key = operand.varies_in(0)
        if rank >= 3:
            node = self._call(aten.select.int, node, rank - 3, 0)
        if rank >= 2:
            # Rows are along the second to last dimension, keys along the last.
            last = val(node).dim() - 1
            node = self._call(aten.select.int, node, last - 1 if varies_by_key else last, 0)
        while val(node).dim() < 2:
            node = self._call(aten.unsqueeze.default, node, 0)
        return node

    def _all(self, conditions: tuple[Constraint, ...]) -> Value:
        """A bool vector of rows or of keys that is true where all conditions hold."""
        return self._and([self._condition(condition) for condition in conditions])

    def _condition(self, condition: Constraint) -> Value:
        if isinstance(condition, Between):
            lower, upper = (None if b is None else self._bound(b) for b in (condition.lower, condition.upper))
            return self._within(self._numbers(condition.number), lower, upper)
        node = self._vector(condition.operand)
        return self._call(aten.logical_not.default, node) if condition.negated else node

    def _as_int64(self, node: Value) -> Value:
        return node if val(node).dtype == torch.int64 else self._call(aten._to_copy.default, node, dtype=torch.int64)

    def _alike(self, vectors: list[Value], length: int | Value) -> list[Value]:
        """All vectors, expanded to the largest batch and to ``length``."""
        batches = [planned_size(v, 0) for v in vectors if not same_size(val(v).shape[0], 1)]
        shape = [batches[0] if batches else 1, length]
        return [self._call(aten.expand.default, vector, shape) for vector in vectors]


def _is_index(number: Number) -> bool:
    if not isinstance(number, Sum):
        return False
    return len(number.parts) == 1 and isinstance(number.parts[0][0], KeyIndex) and number.parts[0][1] == 1
