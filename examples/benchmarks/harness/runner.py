"""What the benchmark asks of somebody who computes attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch

from harness.cases import Case
from harness.inputs import Inputs


def as_is(result: torch.Tensor) -> torch.Tensor:
    return result


@dataclasses.dataclass
class Variant:
    """One way to call a runner.

    Attributes:
        calls: a call for each set of inputs, or for several sets one after the other.
        view: how the result becomes ``[B, H_q, M, D]`` of the first set.
        attentions: how many a call computes.
    """

    calls: list[Callable[[], object]]
    view: Callable = as_is
    attentions: int = 1

    def result(self) -> torch.Tensor:
        return self.view(self.calls[0]())


@dataclasses.dataclass(frozen=True)
class Runner:
    """Somebody who computes attention.

    Attributes:
        label: name in results.
        refuses: why a case is not run, ``None`` if it is. Reasons, not guesses: what might work is tried.
        variants: how to call it on inputs, by name; the fastest one counts.
        ours: whether it is ours, not a peer.
        parts: into how many processes compiling for one case is split; 0 where nothing is compiled.
        part: narrows this process down to its share ``(i, n)`` of what is compiled.
        group: cases of one group are prepared in one process, because they share what is compiled; ``None`` where there
            is nothing to compile.
        plain_only: whether it is only timed in plain mode.
    """

    label: str
    refuses: Callable[[Case], str | None]
    variants: Callable[[Inputs], dict[str, Variant]]
    ours: bool = False
    parts: int = 1
    part: Callable[[int, int], None] = lambda i, n: None
    group: Callable[[Case], object] = lambda case: (case.suite, case.shape_name)
    plain_only: bool = False

    def groups(self, cases: Iterable[Case]) -> list[list[Case]]:
        """Cases that are run and compiled for, by what they share."""
        found: dict[object, list[Case]] = {}
        for case in cases:
            group = self.group(case) if self.refuses(case) is None else None
            if group is not None:
                found.setdefault(group, []).append(case)
        return list(found.values())
