"""Compares a program's token choices with the reference's: they may differ only where the reference is undecided."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Choices of a program and of the reference, each after the same tokens, whatever the program chose before.

    A margin is the difference between the reference's two largest logits.

    Attributes:
        tokens: number of choices.
        agreeing: number of choices that are the same.
        tolerance: twice the error allowed in the logits; an error of that size can swap two choices with a smaller
            margin.
        above: number of choices with a margin above the tolerance.
        wrong: indices of those choices where the program chose another token; must be empty.
        margins: the reference's smallest, median and largest margin.
        distinct: number of different tokens that the reference chose.
    """

    tokens: int
    agreeing: int
    tolerance: float
    above: int
    wrong: tuple[int, ...]
    margins: tuple[float, float, float]
    distinct: int

    @property
    def passed(self) -> bool:
        """Whether no clear choice differs."""
        return not self.wrong

    def lines(self, what: str, tokens: str) -> list[str]:
        """A report for people; ``what`` names the comparison, and ``tokens`` its tokens."""
        low, middle, high = self.margins
        lines = [
            f"{what}: {self.tokens} {tokens} ({self.distinct} distinct), argmax agrees at {self.agreeing}; "
            f"{self.above} have a top-2 margin above {self.tolerance:.3g} "
            f"(margins {low:.3g} .. {middle:.3g} .. {high:.3g})"
        ]
        if self.wrong:
            lines.append(f"{what}: WRONG at {len(self.wrong)} clear choices, first at token {self.wrong[0]}")
        return lines


def judge(chosen: torch.Tensor, truth: torch.Tensor, tolerance: float) -> Agreement:
    """Compares ``chosen`` int64 [N] with the reference's logits ``truth`` [N, V]; V is at least 2."""
    top = truth.double().topk(2, -1)
    margins = top.values[:, 0] - top.values[:, 1]
    same = chosen == top.indices[:, 0]
    clear = margins > tolerance
    return Agreement(
        tokens=len(same),
        agreeing=int(same.sum()),
        tolerance=tolerance,
        above=int(clear.sum()),
        wrong=tuple((clear & ~same).nonzero().flatten().tolist()),
        margins=(float(margins.min()), float(margins.median()), float(margins.max())),
        distinct=len(top.indices[:, 0].unique()),
    )
