"""Calls ``run-model`` in a process of its own, because a process cannot use the GPU after an error on it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a call printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on stderr, which must be the error."""
        line = self.err.splitlines()[-1]
        assert line.startswith("run-model: error: "), self.err
        return line


def run_model_process(*arguments: object, seconds: int = 300, **environment: str) -> Ended:
    """Runs ``run-model``.

    Args:
        arguments: its arguments.
        seconds: how long it may take.
        environment: variables that it gets in addition.
    """
    code = "import sys; from flashpte.export.cli import run_main; sys.exit(run_main())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=seconds,
    )
    return Ended(done.returncode, done.stdout, done.stderr)
