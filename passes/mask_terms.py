"""What a proof about a mask consists of: sums of operands, bounds, constraints, the structure they make."""

from __future__ import annotations

import dataclasses

from torch.fx import Node

from flashpte.passes.operands import KeyIndex, Operand


@dataclasses.dataclass(frozen=True)
class Sum:
    """``constant + sum of coefficient * operand``, operands in the order of the graph."""

    parts: tuple[tuple[Operand | KeyIndex, int], ...] = ()
    constant: int = 0

    def __add__(self, other: Sum) -> Sum:
        merged: dict[Operand | KeyIndex, int] = dict(self.parts)
        for operand, coefficient in other.parts:
            merged[operand] = merged.get(operand, 0) + coefficient
        parts = tuple((operand, c) for operand, c in merged.items() if c)
        return Sum(parts, self.constant + other.constant)

    def times(self, factor: int) -> Sum:
        """Every coefficient and the constant times ``factor``."""
        return Sum(tuple((o, c * factor) for o, c in self.parts if factor), self.constant * factor)

    def plus(self, number: int) -> Sum:
        """The sum and a number."""
        return Sum(self.parts, self.constant + number)


@dataclasses.dataclass(frozen=True)
class Extreme:
    """The larger (``largest``) or smaller of two bounds."""

    largest: bool
    a: Bound
    b: Bound


Bound = Sum | Extreme


@dataclasses.dataclass(frozen=True)
class Between:
    """``lower <= number <= upper``; a missing side is no constraint. ``number`` varies from key to key."""

    number: Sum
    lower: Bound | None = None
    upper: Bound | None = None


@dataclasses.dataclass(frozen=True)
class Flag:
    """A bool operand that has to be true (or false, if ``negated``); it belongs to keys or to rows, not to both."""

    operand: Operand
    negated: bool
    of_keys: bool


@dataclasses.dataclass(frozen=True)
class Structure:
    """A proven mask: all constraints must hold.

    Attributes:
        terms: one for each different number of the keys, with both bounds.
        key_flags, row_flags: bool vectors that must hold as well.
        visited: every node the proof looked at; their memory must not be written to before the mask is used.
    """

    terms: tuple[Between, ...]
    key_flags: tuple[Flag, ...]
    row_flags: tuple[Flag, ...]
    visited: frozenset[Node] = dataclasses.field(compare=False)

    @property
    def kind(self) -> str:
        """What the mask is, in one or two words."""
        names = []
        for term in self.terms:
            if term.lower == term.upper:
                names.append("documents")
            elif term.upper is None:
                names.append("lower bound")
            elif isinstance(term.lower, Extreme) or (isinstance(term.lower, Sum) and term.lower.parts):
                names.append("window")
            else:
                names.append("causal")
        return "+".join([*names, *(["padding"] if self.key_flags else []), *(["rows"] if self.row_flags else [])])
