"""Proves that a mask only says "each number of a key lies between two bounds of the row".

The proof walks from the mask back to comparisons, and from each comparison of integers back to a sum of operands. The
operands that vary from key to key go to one side, and the others go to the other side. The result is a list of
constraints ``lower(row) <= number(key) <= upper(row)``, the form of :class:`flashpte.kernels.intervals.Intervals`. It
covers causal masks, windows, ring buffers, prefixes, packed documents and padding. An "or" joins a condition to a
number or to a bound (:mod:`flashpte.passes.attention.masks.alternatives`). The numbers are read at run time, so
positions may have gaps or be out of order.

A float mask is 0 where the constraints hold. Elsewhere it is -inf, or a most negative number of its dtype that scores
do not reach. Arithmetic on a bool and constants is evaluated for both values of the bool, in its own dtypes. So
``(1.0 - mask) * minimum`` gets its exact values.

If a mask uses anything else, the proof fails and the mask is used as a tensor with a tile map. The proof assumes that
integers do not overflow when a comparison is rearranged.
"""

from __future__ import annotations

from typing import Any

import torch

from flashpte.passes.attention.masks.alternatives import Constraint, NoConjunction, either
from flashpte.passes.attention.masks.choices import Choices
from flashpte.passes.attention.masks.constants import Constants
from flashpte.passes.attention.masks.numbers import ProofFailed
from flashpte.passes.attention.masks.operands import KEY_AXIS, ROW_AXIS, Path, arguments, is_cast, view_source
from flashpte.passes.attention.masks.operators import ADD, AND, COMPARISONS, FILL, MUL, NOT, OR, TRIL, TRIU, WHERE
from flashpte.passes.attention.masks.parts import parts_of
from flashpte.passes.attention.masks.terms import Between, Bound, Extreme, Flag, Number, Structure
from flashpte.passes.graph.planned import Value, nodes_of
from flashpte.passes.graph.values import aten_target, val

MAX_TERMS = 3
NEG_INF = float("-inf")


def prove(mask: Value, kv_len: int | torch.SymInt, constants: Constants | None = None) -> Structure | str:
    """Proves the structure of a mask ``[..., L_q, L_kv]``.

    Args:
        mask: the node that computes it: bool (True = attend) or float (0 = attend; -inf or the minimum = do not).
        kv_len: L_kv.
        constants: the known contents of placeholders.

    Returns:
        The structure, or one sentence that says why there is none.
    """
    proof = _Proof(kv_len, constants or Constants())
    try:
        if val(mask).dtype == torch.bool:
            return proof.collect(proof.of_bool(mask, (), False), set(), mask)
        return proof.collect(*proof.of_float(mask, ()), mask)
    except (ProofFailed, NoConjunction) as failure:
        return str(failure)
    except RecursionError:
        return "it is computed in too many steps"


class _Proof(Choices):
    def __init__(self, kv_len: int | torch.SymInt, constants: Constants) -> None:
        super().__init__(kv_len, constants)
        # Results by node and path, because a graph may use one node many times.
        self._bools: dict[tuple, list[Constraint]] = {}

    def collect(self, constraints: list[Constraint], fills: set[float], mask: Value) -> Structure:
        """Merges constraints on the same number of the keys. ``fills`` are the entries where they do not hold."""
        terms: dict[Number, Between] = {}
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
        row_flags = tuple(dict.fromkeys(f for f in flags if not f.of_keys))
        as_given = len(key_flags) == 1 and not row_flags and key_flags[0].operand.node.op == "placeholder"
        if not terms and (as_given or not key_flags):
            raise ProofFailed("it is not computed from comparisons of positions")
        if len(terms) + bool(key_flags) > MAX_TERMS:
            raise ProofFailed(f"it compares more than {MAX_TERMS} different numbers of the keys")
        average = _blank_rows_average(fills, val(mask).dtype)
        return Structure(tuple(terms.values()), key_flags, row_flags, average, frozenset(nodes_of(list(self.visited))))

    def of_float(self, node: Value, path: Path) -> tuple[list[Constraint], set[float]]:
        """The constraints under which a float mask is 0, and the mask's entries elsewhere."""
        constraints, fills = self._of_float_node(node, path)
        # A cast may change the number: float32's minimum is -inf in bfloat16.
        return constraints, {torch.tensor(fill, dtype=torch.float64).to(val(node).dtype).item() for fill in fills}

    def _of_float_node(self, node: Value, path: Path) -> tuple[list[Constraint], set[float]]:
        self.visited.add(node)
        target, args = aten_target(node), arguments(node)
        if self.constant(node) == 0:
            return [], set()
        choice = self.choice(node, path)
        if choice is not None:
            values = float(choice.true), float(choice.false)
            if values == (0, 0):
                return [], set()
            if 0 in values:
                shown = values.index(0.0) == 0
                return self.of_bool(choice.condition, choice.path, not shown), {values[1 if shown else 0]}
        if target in WHERE:
            for kept, other, negated in ((args[1], args[2], False), (args[2], args[1], True)):
                fill = self.constant(other)
                if fill:
                    return self._filled(args[0], path, negated, self._addend(kept, path), float(fill))
        if target in FILL and (fill := self.constant(args[2])):
            return self._filled(args[1], path, True, self._addend(args[0], path), float(fill))
        if target in TRIL | TRIU and (fill := self.constant(args[0])):
            return self.triangle(node, path, True), {float(fill)}
        if target in MUL and len(args) == 2:
            for factor, mask in (args, args[::-1]):
                if _is_bool(factor) and not _is_bool(mask):
                    constraints, fills = self._addend(mask, path)
                    if NEG_INF not in fills:  # -inf times 0 is NaN
                        return either(constraints, self.of_bool(factor, path, True)), fills
        if target in ADD and len(args) == 2 and not node.kwargs:
            (one, fills), (two, others) = self._addend(args[0], path), self._addend(args[1], path)
            if fills and others and not fills | others <= {NEG_INF}:
                raise ProofFailed("it adds two masks whose entries are finite")
            return one + two, fills | others
        parts = parts_of(node, path)
        if parts is not None:
            found = [(self._addend(part, placed), beside) for part, placed, beside in parts]
            joined = [self._beside(beside, path, constraints) for (constraints, _), beside in found]
            return [c for constraints in joined for c in constraints], set().union(*(f for (_, f), _ in found))
        band = self.band(node, path, False)
        if band is not None:
            return band, {self.band_fill(node)}
        source = view_source(node)
        if source is not None:
            return self.of_float(source, (node, *path))
        if is_cast(node) and val(args[0]).dtype.is_floating_point:
            return self.of_float(args[0], path)
        raise ProofFailed(f"comparisons do not make its part {node.name} 0 or a minimum")

    def _filled(
        self, condition: Any, path: Path, negated: bool, kept: tuple[list[Constraint], set[float]], fill: float
    ) -> tuple[list[Constraint], set[float]]:
        return self.of_bool(condition, path, negated) + kept[0], kept[1] | {fill}

    def _addend(self, value: Any, path: Path) -> tuple[list[Constraint], set[float]]:
        if self.constant(value) == 0:
            return [], set()
        if isinstance(value, Value) and val(value).dtype.is_floating_point:
            return self.of_float(value, path)
        raise ProofFailed(f"it adds {value} to the scores")

    def of_bool(self, node: Any, path: Path, negated: bool) -> list[Constraint]:
        """The constraints under which a bool node is true (or false, if ``negated``)."""
        constant = self.constant(node)
        if constant is not None and bool(constant) != negated:
            return []
        if not isinstance(node, Value) or val(node).dtype != torch.bool:
            raise ProofFailed(f"{node} is not a bool tensor")
        key = (node, path, negated)
        if key not in self._bools:
            self._bools[key] = list(dict.fromkeys(self._of_bool_node(node, path, negated)))
        return self._bools[key]

    def _of_bool_node(self, node: Value, path: Path, negated: bool) -> list[Constraint]:
        self.visited.add(node)
        flag = self._flag(node, path, negated)
        if flag is not None and not flag.of_keys:
            return [flag]
        try:
            return self._of_bool_operator(node, path, negated)
        except (ProofFailed, NoConjunction):
            if flag is None:
                raise
            return [flag]

    def _of_bool_operator(self, node: Value, path: Path, negated: bool) -> list[Constraint]:
        target, args = aten_target(node), arguments(node)
        choice = self.derived_choice(node, path)
        if choice is not None and bool(choice.true) != bool(choice.false):
            return self.of_bool(choice.condition, choice.path, negated == bool(choice.true))
        if target in NOT:
            return self.of_bool(args[0], path, not negated)
        if target in AND or target in OR:
            both = [self.of_bool(argument, path, negated) for argument in args[:2]]
            # By De Morgan's law, a negated "or" is an "and".
            return both[0] + both[1] if (target in AND) != negated else either(*both)
        if target in COMPARISONS:
            return self.comparison(COMPARISONS[target], args[0], args[1], path, negated)
        if target in TRIL | TRIU:
            if self.constant(args[0]) == 1:
                return self.triangle(node, path, negated)
            kept = self.of_bool(args[0], path, negated)
            triangle = self.triangle(node, path, negated)
            return either(kept, triangle) if negated else kept + triangle
        if target in WHERE:
            return self._chosen(args[0], args[1], args[2], path, negated)
        if target in FILL:
            return self._chosen(args[1], args[2], args[0], path, negated)
        parts = parts_of(node, path)
        if parts is not None:
            return [c for part, placed, beside in parts for c in self._part(part, placed, beside, path, negated)]
        band = self.band(node, path, negated)
        if band is not None:
            return band
        source = view_source(node)
        if source is not None:
            return self.of_bool(source, (node, *path), negated)
        if is_cast(node) and val(args[0]).dtype == torch.bool:
            return self.of_bool(args[0], path, negated)
        raise ProofFailed(f"its part {node.name} is not computed from comparisons of positions")

    def _chosen(self, condition: Any, chosen: Any, other: Any, path: Path, negated: bool) -> list[Constraint]:
        """``chosen`` where ``condition`` is true, ``other`` elsewhere."""
        for value, rest, unless in ((chosen, other, True), (other, chosen, False)):
            constant = self.constant(value)
            if constant is not None and bool(constant) == negated:
                return self.of_bool(condition, path, unless) + self.of_bool(rest, path, negated)
        constraints: list[Constraint] = []
        for value, unless in ((chosen, True), (other, False)):
            constraints += either(self.of_bool(condition, path, unless), self.of_bool(value, path, negated))
        return constraints

    def _part(self, part: Any, placed: Path, beside: list[Value], path: Path, negated: bool) -> list[Constraint]:
        """The constraints of one part of a concatenation, which apply only where the part is."""
        constant = self.constant(part)
        if constant is None or bool(constant) != negated:
            return self._beside(beside, path, self.of_bool(part, placed, negated))
        outside = [self.of_bool(node, path, False) for node in beside]
        if not outside:
            raise ProofFailed("it shows nothing")
        return outside[0] if len(outside) == 1 else either(*outside)

    def _beside(self, beside: list[Value], path: Path, constraints: list[Constraint]) -> list[Constraint]:
        """The constraints, relaxed so that they need not hold where one of the bools ``beside`` is true."""
        for node in beside:
            constraints = either(self.of_bool(node, path, False), constraints)
        return constraints

    def _flag(self, node: Value, path: Path, negated: bool) -> Flag | None:
        operand = self.seen_through(node, path)
        if operand is None:
            return None
        of_keys = operand.varies_in(KEY_AXIS)
        return None if of_keys and operand.varies_in(ROW_AXIS) else Flag(operand, negated, of_keys)


def _is_bool(value: Any) -> bool:
    given = value.meta.get("val") if isinstance(value, Value) else None
    return isinstance(given, torch.Tensor) and given.dtype == torch.bool


def _blank_rows_average(fills: set[float], dtype: torch.dtype) -> bool:
    """Whether a fully masked row averages the values, as it does if each entry is the same finite number.

    Raises:
        ProofFailed: in a row that sees a key, masked entries are not equivalent to -inf.
    """
    if fills <= {NEG_INF}:
        return False
    # Next to an entry of 0, half of the minimum has a weight of exactly 0, whatever finite scores are added. Scores can
    # make up for float16's minimum and for numbers such as -1e9.
    if len(fills) == 1 and dtype in (torch.float32, torch.bfloat16) and min(fills) <= torch.finfo(dtype).min / 2:
        return True
    raise ProofFailed(f"masked entries are {', '.join(str(fill) for fill in sorted(fills))}: scores may outweigh that")


def _both(largest: bool, a: Bound | None, b: Bound | None) -> Bound | None:
    if a is None or b is None or a == b:
        return b if a is None else a
    return Extreme(largest, a, b)
