"""Lines of progress that say how far a stage is."""

from __future__ import annotations

import time
from collections.abc import Callable

GIGABYTES = "GB"
"""The unit of counts of bytes; they are shown in 1e9 bytes."""

_SECONDS = 1.0  # between two lines of one stage


class Counted(str):
    """A line such as ``compiling kernels: 37 of 120``, with its numbers.

    It is a string, so functions that take lines need not know of it.

    Attributes:
        stage: what is done.
        done: how much of it is.
        total: how much there is.
        unit: of both; :data:`GIGABYTES` for bytes.
    """

    stage: str
    done: int
    total: int
    unit: str

    def __new__(cls, stage: str, done: int, total: int, unit: str = "") -> Counted:  # noqa: D102
        amounts = (f"{done / 1e9:.1f}", f"{total / 1e9:.1f} GB") if unit == GIGABYTES else (str(done), str(total))
        line = super().__new__(cls, f"{stage}: {' of '.join(amounts)}")
        line.stage, line.done, line.total, line.unit = stage, done, total, unit
        return line

    def __getnewargs__(self) -> tuple[str, int, int, str]:  # type: ignore[override]
        return self.stage, self.done, self.total, self.unit

    def after(self, prefix: str) -> Counted:
        """The same with ``prefix`` in front."""
        return Counted(prefix + self.stage, self.done, self.total, self.unit)


def counter(tell: Callable[[str], None] | None, stage: str, unit: str = "") -> Callable[[int, int], None]:
    """A function that takes how much of a stage is done and how much there is, and reports it every second at most."""
    last = time.monotonic()

    def count(done: int, total: int) -> None:
        nonlocal last
        if tell is not None and (time.monotonic() - last >= _SECONDS or done == total):
            last = time.monotonic()
            tell(Counted(stage, done, total, unit))

    return count
