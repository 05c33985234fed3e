"""Proves that a mask says nothing but "numbers of the keys lie between bounds of the rows".

The proof walks the nodes that compute a mask down to comparisons, and each comparison of integers down to a sum of
operands: those that vary from key to key go to one side, those that do not to the other. What is left is a list of
constraints ``lower(row) <= number(key) <= upper(row)``, the form of :class:`flashpte.kernels.intervals.Intervals`:
causal masks, windows, ring buffers, prefixes, packed documents, padding. What the numbers are is not looked into: they
are read at run time, so positions with gaps or out of order are as good as any.

A proof fails, and the mask is then reduced to a tile map, on whatever is not listed here. Integers are taken not to
overflow when a comparison is rearranged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from flashpte.passes.insert import call_before, size_argument
from flashpte.passes.mask_operators import (
    ADD,
    AND,
    ARANGES,
    COMPARISONS,
    FILL,
    INTEGERS,
    MUL,
    NOT,
    OR,
    SUB,
    TRIL,
    TRIU,
    WHERE,
    compared_exactly,
    constant_of,
)
from flashpte.passes.mask_terms import Between, Bound, Extreme, Flag, Structure, Sum
from flashpte.passes.operands import (
    BATCH_AXIS,
    HEAD_AXIS,
    KEY_AXIS,
    KEY_INDEX,
    ROW_AXIS,
    KeyIndex,
    Operand,
    arguments,
    is_cast,
    view_source,
)
from flashpte.passes.sdpa_node import aten_target, same_size, val

aten = torch.ops.aten

MAX_TERMS = 3


class ProofFailed(Exception):
    """The mask has a part that is no constraint of the form looked for; says which."""


def prove(mask: Node, kv_len: int | torch.SymInt) -> Structure | str:
    """Proves the structure of a mask ``[..., L_q, L_kv]``.

    Args:
        mask: the node that computes it, bool (True = attend) or float (0 = attend, -inf = not).
        kv_len: L_kv.

    Returns:
        The structure, or in one sentence why there is none.
    """
    proof = _Proof(kv_len)
    try:
        constraints = proof.of_bool(mask, (), False) if val(mask).dtype == torch.bool else proof.of_float(mask, ())
        return proof.collect(constraints)
    except ProofFailed as failure:
        return str(failure)
    except RecursionError:
        return "it is computed in too many steps"


class _Proof:
    def __init__(self, kv_len: int | torch.SymInt) -> None:
        self._kv_len = kv_len
        self._visited: set[Node] = set()
        # Results by node and path: a graph may use one node many times.
        self._sums: dict[tuple, Sum] = {}
        self._bools: dict[tuple, list[Between | Flag]] = {}

    def _constant(self, value: Any) -> int | float | bool | None:
        return constant_of(value, self._visited)

    def _seen_through(self, node: Node, path: tuple[Node, ...]) -> Operand | None:
        """The operand, if it has a place in a mask; what its views read is looked at, too."""
        operand = Operand.through(node, path)
        if operand is None or operand.varies_in(HEAD_AXIS) or operand.value.dim() > BATCH_AXIS + 1:
            return None
        self._visited.update(operand.read_by_steps())
        return operand

    def collect(self, constraints: list[Between | Flag]) -> Structure:
        """Merges constraints on the same number of the keys."""
        terms: dict[Sum, Between] = {}
        for constraint in constraints:
            if isinstance(constraint, Between):
                seen = terms.get(constraint.number, Between(constraint.number))
                terms[constraint.number] = Between(
                    constraint.number,
                    _both(True, seen.lower, constraint.lower),
                    _both(False, seen.upper, constraint.upper),
                )
        flags = [c for c in constraints if isinstance(c, Flag)]
        key_flags = tuple(dict.fromkeys(f for f in flags if f.of_keys))
        if not terms:
            raise ProofFailed("it is not computed from comparisons of positions")
        if len(terms) + bool(key_flags) > MAX_TERMS:
            raise ProofFailed(f"it compares more than {MAX_TERMS} different numbers of the keys")
        row_flags = tuple(dict.fromkeys(f for f in flags if not f.of_keys))
        return Structure(tuple(terms.values()), key_flags, row_flags, frozenset(self._visited))

    def of_float(self, node: Node, path: tuple[Node, ...]) -> list[Between | Flag]:
        """Constraints under which a float mask is 0; elsewhere it must be -inf."""
        self._visited.add(node)
        target, args = aten_target(node), arguments(node)
        constant = self._constant(node)
        if constant == 0:
            return []
        if target in WHERE:
            chosen, other = self._constant(args[1]), self._constant(args[2])
            if other == float("-inf"):
                return self.of_bool(args[0], path, False) + self._addend(args[1], path)
            if chosen == float("-inf"):
                return self.of_bool(args[0], path, True) + self._addend(args[2], path)
        if target in FILL and self._constant(args[2]) == float("-inf"):
            return self._addend(args[0], path) + self.of_bool(args[1], path, True)
        if target in TRIL | TRIU and self._constant(args[0]) == float("-inf"):
            return [self._triangle(node, path, True)]
        if target in ADD and len(args) == 2 and not node.kwargs:
            return self._addend(args[0], path) + self._addend(args[1], path)
        source = view_source(node)
        if source is not None:
            return self.of_float(source, (node, *path))
        if is_cast(node) and val(args[0]).dtype.is_floating_point:
            return self.of_float(args[0], path)
        raise ProofFailed(f"its part {node.name} is neither 0 nor -inf by comparisons")

    def _addend(self, value: Any, path: tuple[Node, ...]) -> list[Between | Flag]:
        if self._constant(value) == 0:
            return []
        if isinstance(value, Node) and val(value).dtype.is_floating_point:
            return self.of_float(value, path)
        raise ProofFailed(f"it adds {value} to the scores")

    def of_bool(self, node: Any, path: tuple[Node, ...], negated: bool) -> list[Between | Flag]:
        """Constraints under which a bool node is true (false, if ``negated``)."""
        constant = self._constant(node)
        if constant is not None and bool(constant) != negated:
            return []
        if not isinstance(node, Node) or val(node).dtype != torch.bool:
            raise ProofFailed(f"{node} is no bool tensor")
        key = (node, path, negated)
        if key not in self._bools:
            self._bools[key] = list(dict.fromkeys(self._of_bool_node(node, path, negated)))
        return self._bools[key]

    def _of_bool_node(self, node: Node, path: tuple[Node, ...], negated: bool) -> list[Between | Flag]:
        self._visited.add(node)
        flag = self._flag(node, path, negated)
        if flag is not None and not flag.of_keys:
            return [flag]
        try:
            return self._of_bool_operator(node, path, negated)
        except ProofFailed:
            if flag is None:
                raise
            return [flag]

    def _of_bool_operator(self, node: Node, path: tuple[Node, ...], negated: bool) -> list[Between | Flag]:
        target, args = aten_target(node), arguments(node)
        if target in NOT:
            return self.of_bool(args[0], path, not negated)
        if target in AND or target in OR:
            both = [self.of_bool(argument, path, negated) for argument in args[:2]]
            # By De Morgan a negated "or" is an "and".
            return both[0] + both[1] if (target in AND) != negated else _either(*both)
        if target in COMPARISONS:
            return [self._comparison(COMPARISONS[target], args[0], args[1], path, negated)]
        if target in TRIL | TRIU:
            if self._constant(args[0]) == 1:
                return [self._triangle(node, path, negated)]
            if not negated:
                return [*self.of_bool(args[0], path, False), self._triangle(node, path, False)]
        if target in WHERE and not negated and self._constant(args[2]) == 0:
            return self.of_bool(args[0], path, False) + self.of_bool(args[1], path, False)
        if target in FILL and not negated and self._constant(args[2]) == 0:
            return self.of_bool(args[0], path, False) + self.of_bool(args[1], path, True)
        source = view_source(node)
        if source is not None:
            return self.of_bool(source, (node, *path), negated)
        if is_cast(node) and val(args[0]).dtype == torch.bool:
            return self.of_bool(args[0], path, negated)
        raise ProofFailed(f"its part {node.name} is not computed from comparisons of positions")

    def _flag(self, node: Node, path: tuple[Node, ...], negated: bool) -> Flag | None:
        operand = self._seen_through(node, path)
        if operand is None:
            return None
        of_keys = operand.varies_in(KEY_AXIS)
        return None if of_keys and operand.varies_in(ROW_AXIS) else Flag(operand, negated, of_keys)

    def _comparison(self, name: str, a: Any, b: Any, path: tuple[Node, ...], negated: bool) -> Between:
        if name in ("ge", "gt"):
            a, b, name = b, a, {"ge": "le", "gt": "lt"}[name]
        if not compared_exactly(a, b):
            raise ProofFailed("it compares integers of different types")
        difference = self._sum(a, path) + self._sum(b, path).times(-1)
        if negated:
            if name == "eq":
                raise ProofFailed("it excludes single values")
            # not (a <= b) is b < a, and not (a < b) is b <= a.
            difference, name = difference.times(-1), {"le": "lt", "lt": "le"}[name]
        if name == "lt":
            difference = difference.plus(1)
        if any(abs(n) >= 2**62 for n in (difference.constant, *(c for _, c in difference.parts))):
            raise ProofFailed("it compares with numbers that 64 bits hardly hold")
        number = Sum(tuple((o, c) for o, c in difference.parts if o.varies_in(KEY_AXIS)))
        rest = Sum(tuple((o, c) for o, c in difference.parts if not o.varies_in(KEY_AXIS)), difference.constant)
        if not number.parts:
            raise ProofFailed("it compares nothing that varies from key to key")
        # Of two comparisons of the same numbers, one negated, both must be recognised as such.
        number = Sum(tuple(sorted(number.parts, key=_part_order)))
        if number.parts[0][1] > 0:
            bound = rest.times(-1)
            return Between(number, bound if name == "eq" else None, bound)
        number = number.times(-1)
        return Between(number, rest, rest if name == "eq" else None)

    def _sum(self, value: Any, path: tuple[Node, ...]) -> Sum:
        """An integer argument of a comparison as a sum of operands."""
        if isinstance(value, int):
            return Sum((), int(value))
        if not isinstance(value, Node) or not isinstance(value.meta.get("val"), torch.Tensor):
            raise ProofFailed(f"it compares with {value}")
        if val(value).dtype not in INTEGERS:
            raise ProofFailed(f"it compares {val(value).dtype}")
        constant = self._constant(value)
        if constant is not None:
            return Sum((), int(constant))
        key = (value, path)
        if key not in self._sums:
            self._sums[key] = self._sum_of_node(value, path)
        return self._sums[key]

    def _sum_of_node(self, value: Node, path: tuple[Node, ...]) -> Sum:
        self._visited.add(value)
        operand = self._seen_through(value, path)
        # What belongs to rows is taken as it is; keys are followed down, so that equal numbers are found equal.
        if operand is not None and not operand.varies_in(KEY_AXIS):
            return Sum(((operand, 1),))
        try:
            return self._sum_of_operator(value, path)
        except ProofFailed:
            if operand is None or operand.varies_in(ROW_AXIS):
                raise
            return Sum(((operand, 1),))

    def _sum_of_operator(self, node: Node, path: tuple[Node, ...]) -> Sum:
        target, args = aten_target(node), arguments(node)
        arithmetic = not node.kwargs and val(node).dtype == torch.int64
        if target in ADD and arithmetic and len(args) == 2:
            return self._sum(args[0], path) + self._sum(args[1], path)
        if target in SUB and arithmetic and len(args) == 2:
            return self._sum(args[0], path) + self._sum(args[1], path).times(-1)
        if target is aten.rsub.Scalar and arithmetic and len(args) == 2:
            return self._sum(args[1], path) + self._sum(args[0], path).times(-1)
        if target is aten.neg.default and arithmetic:
            return self._sum(args[0], path).times(-1)
        if target in MUL and arithmetic and isinstance(factor := self._constant(args[1]), int):
            return self._sum(args[0], path).times(factor)
        source = view_source(node)
        if source is not None:
            return self._sum(source, (node, *path))
        if is_cast(node) and val(node).dtype == torch.int64:
            return self._sum(args[0], path)
        start = self._first_index(node, path)
        if start is not None:
            return Sum(((KEY_INDEX, 1),), start)
        raise ProofFailed(f"its part {node.name} varies with row and key")

    def _first_index(self, node: Node, path: tuple[Node, ...]) -> int | None:
        """``s`` if the node, seen through ``path``, is ``s, s + 1, ...`` over all keys."""
        target, args = aten_target(node), arguments(node)
        operand = Operand.through(node, path)
        # A narrower arange may wrap.
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

    def _triangle(self, node: Node, path: tuple[Node, ...], negated: bool) -> Between:
        """Where ``tril`` or ``triu`` keeps entries (drops them, if ``negated``)."""
        args = arguments(node)
        diagonal = args[1] if len(args) > 1 else 0
        options = {"device": val(node).device, "pin_memory": False}
        sizes = [size_argument(node, args[0], dim) for dim in (-2, -1)]
        numbers = [call_before(node, aten.arange.start_step, 0, size, 1, **options) for size in sizes]
        rows = call_before(node, aten.unsqueeze.default, numbers[0], 1)
        offset = call_before(node, aten.add.Tensor, rows, diagonal)
        comparison = "le" if aten_target(node) in TRIL else "ge"
        return self._comparison(comparison, numbers[1], offset, path, negated)


def _part_order(part: tuple[Operand | KeyIndex, int]) -> tuple[str, int]:
    operand = part[0]
    return ("", 0) if isinstance(operand, KeyIndex) else (operand.node.name, len(operand.steps))


def _both(largest: bool, a: Bound | None, b: Bound | None) -> Bound | None:
    if a is None or b is None or a == b:
        return b if a is None else a
    return Extreme(largest, a, b)


def _either(a: list[Between | Flag], b: list[Between | Flag]) -> list[Between | Flag]:
    """One constraint that holds where either does: two bounds of the same number on the same side."""
    if len(a) == len(b) == 1 and isinstance(a[0], Between) and isinstance(b[0], Between):
        one, two = a[0], b[0]
        if one.number == two.number:
            if one.lower is None and two.lower is None and one.upper is not None and two.upper is not None:
                return [Between(one.number, None, Extreme(True, one.upper, two.upper))]
            if one.upper is None and two.upper is None and one.lower is not None and two.lower is not None:
                return [Between(one.number, Extreme(False, one.lower, two.lower))]
    if not a or not b:
        return []
    raise ProofFailed("it is true where either of two conditions holds")
