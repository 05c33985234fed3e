"""Progress on stderr: the current stage, how far it is, and the time since the start."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from flashpte.export.common.progress import Counted
from flashpte.export.common.signals import raise_what_was_swallowed

_LOG_SECONDS = 10.0  # between two lines of one stage in a log
_SECONDS_TO_JUDGE = 2.0  # that a stage must take before its speed says anything

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class StageLog:
    """Shows each stage as it begins: on a terminal a bar with a clock, elsewhere one line per stage.

    Use it as a context manager and call it with the name of each stage. A stage that counts
    (:class:`flashpte.export.common.progress.Counted`) fills the bar. In a log, it has a line every 10 seconds, with the
    time that is left if the rest goes as fast.
    """

    def __init__(self, *, quiet: bool = False):
        self._quiet = quiet
        self._start = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._counting: tuple[str, float, int] | None = None
        self._shown = 0.0

    def __enter__(self) -> StageLog:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                SpinnerColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
        return self

    def __call__(self, stage: str) -> None:
        """Starts a stage; first raises again a termination request that something swallowed."""
        raise_what_was_swallowed()
        self._show(stage)

    def _show(self, stage: str) -> None:
        if self._quiet:
            return
        counted = stage if isinstance(stage, Counted) else None
        line = f"{stage}{self._time_left(counted)}"
        if self._bar is not None:
            if counted is None or self._task is None:
                for task in self._bar.task_ids:  # a bar that has had an end keeps it
                    self._bar.remove_task(task)
                self._task = self._bar.add_task(line, total=None)
            if counted is not None:
                self._bar.update(self._task, description=line, completed=counted.done, total=counted.total)
        elif counted is None or time.monotonic() - self._shown >= _LOG_SECONDS:
            self._shown = time.monotonic()
            with contextlib.suppress(OSError):  # a closed pipe does not end an export
                print(f"[{time.monotonic() - self._start:7.1f} s] {line}", file=sys.stderr, flush=True)

    def _time_left(self, counted: Counted | None) -> str:
        """``, about 40 s left``: at the speed since the stage's first count; empty when there is none to tell by."""
        now = time.monotonic()
        if counted is None:
            self._counting = None
            return ""
        if self._counting is None or self._counting[0] != counted.stage:
            self._counting = (counted.stage, now, counted.done)
        _, since, first = self._counting
        if counted.done <= first or counted.done >= counted.total or now - since < _SECONDS_TO_JUDGE:
            return ""
        left = (now - since) * (counted.total - counted.done) / (counted.done - first)
        return f", about {left:.0f} s left" if left < 120 else f", about {left / 60:.0f} min left"

    def stop(self) -> None:
        """Removes the spinner before other code writes to the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._quiet = None, True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._show("done")
