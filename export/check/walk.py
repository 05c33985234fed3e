"""The calls that ``run-model --check`` makes: every method, at several lengths and positions, up to the last slot."""

from __future__ import annotations

import dataclasses

from flashpte.export.common.options import DECODE, PREFILL, TARGET_VERIFY
from flashpte.export.runtime.language_model import Limits, plan_chunks

_MOST_COMPARED = 128  # calls per method; the calls that are not compared run too


@dataclasses.dataclass(frozen=True)
class Step:
    """One call: ``count`` tokens at position ``start``; its logits are checked if ``compared``."""

    method: str
    start: int
    count: int
    compared: bool = True

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + self.count


def plan_walk(limits: Limits) -> tuple[Step, ...]:
    """Plans calls along one sequence that fills the cache.

    The walk starts with prefills of several lengths between decodes and verifies. It steps back as after rejected
    drafts and writes the same positions again, passes the sliding window, and ends at the last slot. No call skips a
    position.

    Args:
        limits: the lengths that the methods take.
    """
    walk = _Walk(limits)
    walk.vary()
    walk.stride()
    walk.finish()
    return _thin(walk.steps)


class _Walk:
    def __init__(self, limits: Limits):
        self.limits = limits
        self.steps: list[Step] = []
        self.position = 0
        # the last positions are left to the short methods
        self.tail = limits.max_seq_len - ((limits.verify or 0) + 2 * limits.decode)

    def add(self, method: str, count: int) -> bool:
        if self.position + count > self.limits.max_seq_len:
            return False
        self.steps.append(Step(method, self.position, count))
        self.position += count
        return True

    def vary(self) -> None:
        """Adds prefills of lengths from the shortest to the longest, each followed by the other methods."""
        low, high = self.limits.prefill or (0, 0)
        sizes = [s for s in (low, 5, high, 17, high // 2 + 1, 7, high, low, high - 1) if low <= s <= high and s > 0]
        for size in sizes or [0] * 8:
            if self.position + size + 8 + 2 * (self.limits.verify or 0) > self.tail:
                return
            if size:
                self.add(PREFILL, size)
            self.short_methods()

    def short_methods(self) -> None:
        if self.limits.decode:
            self.add(DECODE, 1)
            self.add(DECODE, 1)
        verify = self.limits.verify
        if verify is not None:
            self.add(TARGET_VERIFY, verify)
            # half of the drafts count as rejected; the next call overwrites them
            self.position -= verify // 2
            self.add(DECODE, 1) if self.limits.decode else self.add(TARGET_VERIFY, verify)

    def stride(self) -> None:
        """Goes to the last positions in the fewest calls."""
        left = self.tail - self.position
        if left <= 0:
            return
        if self.limits.prefill is not None and left >= self.limits.prefill[0]:
            for method, size in plan_chunks(left, self.limits):
                self.add(method, size)
        elif self.limits.decode:
            while self.position < self.tail:
                self.add(DECODE, 1)
        elif self.limits.verify is not None:
            while self.position + self.limits.verify <= self.tail:
                self.add(TARGET_VERIFY, self.limits.verify)

    def finish(self) -> None:
        """Goes to the last slot with every method that can reach it."""
        if self.limits.verify is not None:
            self.add(TARGET_VERIFY, self.limits.verify)
        while self.limits.decode and self.add(DECODE, 1):
            pass
        if self.position < self.limits.max_seq_len:
            method, count = (TARGET_VERIFY, self.limits.verify or 0)
            if self.limits.verify is None:
                low, high = self.limits.prefill or (0, 0)
                method, count = PREFILL, min(max(low, self.limits.max_seq_len - self.position), high)
            self.position = self.limits.max_seq_len - count
            self.add(method, count)


def _thin(steps: list[Step]) -> tuple[Step, ...]:
    """Marks at most 128 calls per method: the first 64, the last 32, and evenly spaced ones between."""
    chosen: set[int] = set()
    for method in {step.method for step in steps}:
        indices = [i for i, step in enumerate(steps) if step.method == method]
        if len(indices) <= _MOST_COMPARED:
            chosen.update(indices)
            continue
        first, last = _MOST_COMPARED // 2, _MOST_COMPARED // 4
        between = indices[first:-last]
        stride = -(-len(between) // (_MOST_COMPARED - first - last))
        chosen.update([*indices[:first], *between[::stride], *indices[-last:]])
    return tuple(dataclasses.replace(step, compared=i in chosen) for i, step in enumerate(steps))
