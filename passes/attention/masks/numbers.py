"""Turns the integers that a mask compares into sums of operands, with keys on one side and rows on the other."""

from __future__ import annotations

from typing import Any

import torch

from flashpte.passes.attention.masks.constants import Constants
from flashpte.passes.attention.masks.operands import (
    BATCH_AXIS,
    HEAD_AXIS,
    KEY_AXIS,
    KEY_INDEX,
    ROW_AXIS,
    KeyIndex,
    Operand,
    Path,
    arguments,
    is_cast,
    view_source,
)
from flashpte.passes.attention.masks.operators import (
    ADD,
    ARANGES,
    INTEGERS,
    MUL,
    SUB,
    TRIL,
    compared_exactly,
    constant_of,
)
from flashpte.passes.attention.masks.terms import Between, Constraint, Sum
from flashpte.passes.graph.planned import Value, planned, planned_size
from flashpte.passes.graph.values import aten_target, same_size, val

aten = torch.ops.aten

_NEGATED = {"le": "gt", "gt": "le", "lt": "ge", "ge": "lt", "eq": "ne", "ne": "eq"}


class ProofFailed(Exception):
    """A part of the mask is not a constraint of the supported form; the message says which."""


class Numbers:
    """The integers that one proof has analyzed.

    Attributes:
        visited: every node that the proof read.
    """

    def __init__(self, kv_len: int | torch.SymInt, constants: Constants) -> None:
        self._kv_len = kv_len
        self._constants = constants
        self.visited: set[Value] = set()
        # Results by node and path, because a graph may use one node many times.
        self._sums: dict[tuple, Sum] = {}

    def constant(self, value: Any) -> int | float | bool | None:
        """The number that all entries of an argument are equal to, if known."""
        return constant_of(value, self.visited, self._constants)

    def seen_through(self, node: Value, path: Path) -> Operand | None:
        """The node as an operand, if a mask can hold it; otherwise ``None``. Also visits nodes that its views read."""
        operand = Operand.through(node, path)
        if operand is None or operand.varies_in(HEAD_AXIS) or operand.value.dim() > BATCH_AXIS + 1:
            return None
        self.visited.update(operand.read_by_steps())
        return operand

    def comparison(self, name: str, a: Any, b: Any, path: Path, negated: bool) -> list[Constraint]:
        """A comparison of integers (or its negation) as constraints that must all hold."""
        name = _NEGATED[name] if negated else name
        if name == "ne":
            raise ProofFailed("it excludes single values")
        if name in ("ge", "gt"):
            a, b, name = b, a, {"ge": "le", "gt": "lt"}[name]
        if not compared_exactly(a, b):
            raise ProofFailed("it compares integers of different types")
        # |x| <= b is x <= b and -x <= b.
        signed = self._inside_abs(a, path) if name != "eq" else None
        sides = [self.sum(a, path)] if signed is None else [signed, signed.times(-1)]
        return [self._constraint(name, side + self.sum(b, path).times(-1)) for side in sides]

    def _inside_abs(self, value: Any, path: Path) -> Sum | None:
        while isinstance(value, Value) and val(value).dtype == torch.int64:
            self.visited.add(value)
            if aten_target(value) is aten.abs.default:
                return self.sum(value.args[0], path)
            source = view_source(value)
            if source is None:
                break
            value, path = source, (value, *path)
        return None

    @staticmethod
    def _constraint(name: str, difference: Sum) -> Between:
        """``difference <= 0``, ``< 0`` or ``== 0``."""
        if name == "lt":
            difference = difference.plus(1)
        if any(abs(n) >= 2**62 for n in (difference.constant, *(c for _, c in difference.parts))):
            raise ProofFailed("it compares with numbers that nearly overflow 64 bits")
        number = Sum(tuple((o, c) for o, c in difference.parts if o.varies_in(KEY_AXIS)))
        rest = Sum(tuple((o, c) for o, c in difference.parts if not o.varies_in(KEY_AXIS)), difference.constant)
        if not number.parts:
            raise ProofFailed("it compares nothing that varies from key to key")
        # Normalize order and sign, so that comparisons of the same number are recognized, also if one is negated.
        number = Sum(tuple(sorted(number.parts, key=_part_order)))
        if number.parts[0][1] > 0:
            bound = rest.times(-1)
            return Between(number, bound if name == "eq" else None, bound)
        number = number.times(-1)
        return Between(number, rest, rest if name == "eq" else None)

    def sum(self, value: Any, path: Path) -> Sum:
        """An integer argument of a comparison as a sum of operands."""
        if isinstance(value, int):
            return Sum((), int(value))
        if not isinstance(value, Value) or not isinstance(value.meta.get("val"), torch.Tensor):
            raise ProofFailed(f"it compares with {value}")
        if val(value).dtype not in INTEGERS:
            raise ProofFailed(f"it compares {val(value).dtype}")
        constant = self.constant(value)
        if constant is not None:
            return Sum((), int(constant))
        key = (value, path)
        if key not in self._sums:
            self._sums[key] = self._sum_of_node(value, path)
        return self._sums[key]

    def _sum_of_node(self, value: Value, path: Path) -> Sum:
        self.visited.add(value)
        operand = self.seen_through(value, path)
        # Take an operand of rows as it is. Follow an operand of keys further, so that equal numbers compare equal.
        if operand is not None and not operand.varies_in(KEY_AXIS):
            return Sum(((operand, 1),))
        try:
            return self._sum_of_operator(value, path)
        except ProofFailed:
            if operand is None or operand.varies_in(ROW_AXIS):
                raise
            return Sum(((operand, 1),))

    def _sum_of_operator(self, node: Value, path: Path) -> Sum:
        target, args = aten_target(node), arguments(node)
        arithmetic = not node.kwargs and val(node).dtype == torch.int64
        if target in ADD and arithmetic and len(args) == 2:
            return self.sum(args[0], path) + self.sum(args[1], path)
        if target in SUB and arithmetic and len(args) == 2:
            return self.sum(args[0], path) + self.sum(args[1], path).times(-1)
        if target is aten.rsub.Scalar and arithmetic and len(args) == 2:
            return self.sum(args[1], path) + self.sum(args[0], path).times(-1)
        if target is aten.neg.default and arithmetic:
            return self.sum(args[0], path).times(-1)
        if target in MUL and arithmetic and isinstance(factor := self.constant(args[1]), int):
            return self.sum(args[0], path).times(factor)
        source = view_source(node)
        if source is not None:
            return self.sum(source, (node, *path))
        if is_cast(node) and val(node).dtype == torch.int64:
            return self.sum(args[0], path)
        start = self._first_index(node, path)
        if start is not None:
            return Sum(((KEY_INDEX, 1),), start)
        raise ProofFailed(f"its part {node.name} varies with row and key")

    def _first_index(self, node: Value, path: Path) -> int | None:
        """``s`` if the node, seen through ``path``, is ``s, s + 1, ...`` over all keys."""
        target, args = aten_target(node), arguments(node)
        operand = Operand.through(node, path)
        # An arange in a narrower dtype may wrap.
        if val(node).dtype not in (torch.int64, torch.int32):
            return None
        if target not in ARANGES or operand is None or operand.value.dim() != 1:
            return None
        start, step = (args[0] if len(args) > 1 else 0), (args[2] if len(args) > 2 else 1)
        for view in operand.steps:
            # A slice moves the start.
            first, stride = view.args[1] if len(view.args) > 1 else 0, view.args[3] if len(view.args) > 3 else 1
            if view.op is not aten.slice.Tensor or not isinstance(first, int) or first < 0 or stride != 1:
                return None
            start = start + first if isinstance(start, int) else start
        whole = same_size(operand.value.shape[0], self._kv_len)
        return start if isinstance(start, int) and step == 1 and whole else None

    def triangle(self, node: Value, path: Path, negated: bool) -> list[Constraint]:
        """The constraints under which ``tril`` or ``triu`` keeps an entry (or drops it, if ``negated``)."""
        args = arguments(node)
        diagonal = args[1] if len(args) > 1 else 0
        comparison = "le" if aten_target(node) in TRIL else "ge"
        return self._distance(args[0], comparison, diagonal, path, negated)

    def band(self, node: Value, path: Path, negated: bool) -> list[Constraint] | None:
        """The constraints under which a constant is true or 0 (not, if ``negated``); ``None`` if it is not a band."""
        band = self._constants.band(node)
        if band is None:
            return None
        bounds = [(name, bound) for name, bound in zip(("ge", "le"), band[:2], strict=True) if bound is not None]
        if negated and len(bounds) != 1:
            return None
        found = [self._distance(node, name, bound, path, negated) for name, bound in bounds]
        return [constraint for constraints in found for constraint in constraints]

    def band_fill(self, node: Value) -> float:
        """The entry of a float constant outside its band."""
        band = self._constants.band(node)
        assert band is not None
        return band[2]

    def _distance(self, matrix: Value, name: str, bound: Any, path: Path, negated: bool) -> list[Constraint]:
        """Compares ``column - row`` of the last two dimensions of ``matrix`` with ``bound``."""
        options: dict[str, Any] = {"device": val(matrix).device, "pin_memory": False, "near": matrix}
        sizes = [planned_size(matrix, dim) for dim in (-2, -1)]
        numbers = [planned(aten.arange.start_step, 0, size, 1, **options) for size in sizes]
        rows = planned(aten.unsqueeze.default, numbers[0], 1, near=matrix)
        offset = planned(aten.add.Tensor, rows, bound, near=matrix)
        return self.comparison(name, numbers[1], offset, path, negated)


def _part_order(part: tuple[Operand | KeyIndex, int]) -> tuple[str, int]:
    operand = part[0]
    return ("", 0) if isinstance(operand, KeyIndex) else (operand.node.name, len(operand.steps))
