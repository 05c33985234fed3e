"""Choices of a program beside those of the reference: where one differs, the reference must have been undecided."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Choices beside the reference's, each after the same tokens, whatever the program chose before.

    Attributes:
        tokens: how many choices.
        agreeing: how many are the same.
        tolerance: twice the error that the logits may have: a smaller margin between the reference's first and second
            choice may turn.
        above: choices whose margin is above the tolerance.
        wrong: positions among those where the program chose another token; must be empty.
        margins: the reference's margins, smallest, median and largest.
        distinct: different tokens that the reference chose.
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
        """For people: ``what`` was followed, and what its tokens are called."""
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
    """Compares choices int64 [N] with the reference's logits [N, V], V at least 2."""
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
