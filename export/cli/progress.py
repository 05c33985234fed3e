"""Progress on stderr: the current stage and the time since the start."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from flashpte.export.common.signals import raise_what_was_swallowed

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class StageLog:
    """Shows each stage as it begins: on a terminal a spinner with a clock, elsewhere one line per stage.

    Use it as a context manager and call it with the name of each stage.
    """

    def __init__(self, *, quiet: bool = False):
        self._quiet = quiet
        self._start = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> StageLog:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                SpinnerColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
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
        if self._bar is None:
            with contextlib.suppress(OSError):  # a closed pipe does not end an export
                print(f"[{time.monotonic() - self._start:7.1f} s] {stage}", file=sys.stderr, flush=True)
        elif self._task is None:
            self._task = self._bar.add_task(stage, total=None)
        else:
            self._bar.update(self._task, description=stage)

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
