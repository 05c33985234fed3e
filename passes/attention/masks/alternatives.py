"""Rewrites an "or" of constraints as constraints that must all hold, if that is possible.

A comparison always holds for a key whose number, or a row whose bound, is at the end of the 64-bit range. That is how a
condition on keys alone or on rows alone is joined to a comparison. Two bounds of the same number on the same side merge
into one bound.
"""

from __future__ import annotations

import dataclasses

from flashpte.passes.attention.masks.operands import ROW_AXIS, KeyIndex
from flashpte.passes.attention.masks.terms import Between, Bound, Constraint, Extreme, Flag, Sum, Truth, Unless


class NoConjunction(Exception):
    """An "or" of two conditions cannot be written as a list of conditions that must all hold."""


def either(a: list[Constraint], b: list[Constraint]) -> list[Constraint]:
    """Constraints that all hold exactly where all of ``a`` or all of ``b`` hold.

    Raises:
        NoConjunction: there are no such constraints of the supported form.
    """
    if not a or not b:
        return []
    for one, other in ((a, b), (b, a)):
        if all(_of_keys(c) for c in other) or all(_of_rows(c) for c in other):
            return [joined for constraint in one for joined in _unless(constraint, other)]
    return [joined for x in _sides(a) for y in _sides(b) for joined in _pair(x, y)]


def _unless(constraint: Constraint, conditions: list[Constraint]) -> list[Constraint]:
    """``constraint`` or all of ``conditions``, which are on keys alone or on rows alone."""
    of_keys = all(_of_keys(c) for c in conditions)
    if isinstance(constraint, Flag):
        if constraint.of_keys:
            return _unless(Between(Truth((constraint,)), lower=Sum((), 1)), conditions)
        if of_keys:
            return [Between(Truth(tuple(conditions)), lower=Unless(Sum((), 1), (constraint,), False))]
        raise NoConjunction("it is true where either of two conditions on rows holds")
    joined: list[Constraint] = []
    for side in _sides([constraint]):
        assert isinstance(side, Between)
        # Merge bounds only for a single condition.
        same = _same_side(side, conditions[0]) if len(conditions) == 1 else None
        if same is not None:
            joined.append(same)
        elif of_keys:
            number = Unless(side.number, tuple(conditions), side.upper is None)
            joined.append(dataclasses.replace(side, number=number))
        elif side.lower is not None:
            joined.append(Between(side.number, Unless(side.lower, tuple(conditions), False)))
        else:
            assert side.upper is not None
            joined.append(Between(side.number, None, Unless(side.upper, tuple(conditions), True)))
    return joined


def _pair(x: Constraint, y: Constraint) -> list[Constraint]:
    """``x`` or ``y``, each of which has at most one bound."""
    for one, other in ((x, y), (y, x)):
        if _of_keys(other) or _of_rows(other):
            return _unless(one, [other])
    same = _same_side(x, y)
    if same is not None:
        return [same]
    if isinstance(x, Between) and isinstance(y, Between) and x.number == y.number:
        below, above = (x, y) if x.lower is None else (y, x)
        if isinstance(below.upper, Sum) and isinstance(above.lower, Sum):
            gap = above.lower + below.upper.times(-1)
            # "number <= upper or number >= lower" always holds if no integer lies between the two bounds.
            if not gap.parts and gap.constant <= 1:
                return []
    raise NoConjunction("it is true where either of two conditions holds")


def _same_side(x: Constraint, y: Constraint) -> Between | None:
    """``x`` or ``y`` as one constraint, if they bound the same number on the same side; otherwise ``None``."""
    if not isinstance(x, Between) or not isinstance(y, Between) or x.number != y.number:
        return None
    if x.lower is None and y.lower is None and x.upper is not None and y.upper is not None:
        return Between(x.number, None, Extreme(True, x.upper, y.upper))
    if x.upper is None and y.upper is None and x.lower is not None and y.lower is not None:
        return Between(x.number, Extreme(False, x.lower, y.lower))
    return None


def _sides(constraints: list[Constraint]) -> list[Constraint]:
    """The same constraints, split so that each has at most one bound."""
    sides: list[Constraint] = []
    for constraint in constraints:
        if isinstance(constraint, Between) and constraint.lower is not None and constraint.upper is not None:
            sides += [Between(constraint.number, constraint.lower), Between(constraint.number, None, constraint.upper)]
        else:
            sides.append(constraint)
    return sides


def _of_keys(constraint: Constraint) -> bool:
    """Whether the constraint depends on the key alone."""
    if isinstance(constraint, Flag):
        return constraint.of_keys
    return all(bound is None or not _varies_by_row(bound) for bound in (constraint.lower, constraint.upper))


def _of_rows(constraint: Constraint) -> bool:
    return isinstance(constraint, Flag) and not constraint.of_keys


def _varies_by_row(bound: Bound) -> bool:
    if isinstance(bound, Extreme):
        return _varies_by_row(bound.a) or _varies_by_row(bound.b)
    if isinstance(bound, Unless):
        return True
    return any(not isinstance(o, KeyIndex) and o.varies_in(ROW_AXIS) for o, _ in bound.parts)
