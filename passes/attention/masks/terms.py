"""The terms of a proof about a mask: sums of operands, bounds, constraints, and the structure they form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch.fx import Node
from torch.utils import _pytree as pytree

from flashpte.passes.attention.masks.operands import KeyIndex, Operand, Step
from flashpte.passes.graph.planned import Planned, Value


@dataclasses.dataclass(frozen=True)
class Sum:
    """``constant + sum of coefficient * operand``."""

    parts: tuple[tuple[Operand | KeyIndex, int], ...] = ()
    constant: int = 0

    def __add__(self, other: Sum) -> Sum:
        merged: dict[Operand | KeyIndex, int] = dict(self.parts)
        for operand, coefficient in other.parts:
            merged[operand] = merged.get(operand, 0) + coefficient
        parts = tuple((operand, c) for operand, c in merged.items() if c)
        return Sum(parts, self.constant + other.constant)

    def times(self, factor: int) -> Sum:
        """The sum times ``factor``."""
        return Sum(tuple((o, c * factor) for o, c in self.parts if factor), self.constant * factor)

    def plus(self, number: int) -> Sum:
        """The sum plus a number."""
        return Sum(self.parts, self.constant + number)


@dataclasses.dataclass(frozen=True)
class Extreme:
    """The larger (``largest``) or smaller of two bounds."""

    largest: bool
    a: Bound
    b: Bound


@dataclasses.dataclass(frozen=True)
class Between:
    """``lower <= number <= upper``. A missing side does not constrain. ``number`` varies from key to key."""

    number: Number
    lower: Bound | None = None
    upper: Bound | None = None


@dataclasses.dataclass(frozen=True)
class Flag:
    """A bool operand that must be true (or false, if ``negated``). It belongs to keys or to rows, not to both."""

    operand: Operand
    negated: bool
    of_keys: bool


@dataclasses.dataclass(frozen=True)
class Unless:
    """``number``, but the largest 64-bit integer (smallest, if not ``largest``) where all ``conditions`` hold.

    Used as a key's number or a row's bound, it makes a comparison true wherever the conditions hold.
    """

    number: Number | Bound
    conditions: tuple[Constraint, ...]
    largest: bool


@dataclasses.dataclass(frozen=True)
class Truth:
    """1 for keys for which all ``conditions`` hold, 0 for the others."""

    conditions: tuple[Constraint, ...]


Constraint = Between | Flag
Bound = Sum | Extreme | Unless
Number = Sum | Unless | Truth


def with_values(part: Any, of: Callable[[Value], Value]) -> Any:
    """A part of a proof with every node or plan replaced by ``of(value)``."""
    if isinstance(part, Operand):
        steps = tuple(Step(step.op, pytree.tree_map_only((Node, Planned), of, step.args)) for step in part.steps)
        return Operand(of(part.node), steps, part.value)
    if isinstance(part, tuple):
        return tuple(with_values(item, of) for item in part)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = dataclasses.fields(part)
        return dataclasses.replace(part, **{f.name: with_values(getattr(part, f.name), of) for f in fields})
    return part


@dataclasses.dataclass(frozen=True)
class Structure:
    """A proven mask, whose constraints must all hold.

    Attributes:
        terms: one for each different number of the keys, with both bounds.
        key_flags, row_flags: bool vectors that must also hold.
        blank_rows_average: whether a row that sees no key is the mean of all values (otherwise it is 0). That is the
            case if masked entries are the most negative finite number.
        visited: every node that the proof read. Their memory must not be written before the mask is used.
    """

    terms: tuple[Between, ...]
    key_flags: tuple[Flag, ...]
    row_flags: tuple[Flag, ...]
    blank_rows_average: bool
    visited: frozenset[Node] = dataclasses.field(compare=False)

    @property
    def kind(self) -> str:
        """The kind of mask in a word per constraint, joined by ``+``."""
        names = []
        for term in self.terms:
            if not isinstance(term.number, Sum):
                names.append("alternative")
            elif term.lower == term.upper:
                names.append("documents")
            elif term.upper is None:
                names.append("lower bound")
            elif isinstance(term.lower, (Extreme, Unless)) or (isinstance(term.lower, Sum) and term.lower.parts):
                names.append("window")
            else:
                names.append("causal")
        return "+".join([*names, *(["padding"] if self.key_flags else []), *(["rows"] if self.row_flags else [])])
