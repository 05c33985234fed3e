"""Lines of progress: how far a stage is, and how long the rest takes."""

import pickle

import pytest

from flashpte.export.cli import progress as shown
from flashpte.export.cli.progress import StageLog
from flashpte.export.common import progress
from flashpte.export.common.progress import GIGABYTES, Counted, counter


def test_a_count_is_a_line_with_numbers():
    line = Counted("compiling kernels", 37, 120)
    assert line == "compiling kernels: 37 of 120"
    assert Counted("load weights", 12_340_000_000, 61_000_000_000, GIGABYTES) == "load weights: 12.3 of 61.0 GB"
    again = pickle.loads(pickle.dumps(line))
    assert (again, again.stage, again.done, again.total) == (line, "compiling kernels", 37, 120)
    assert line.after("sm_90: ") == "sm_90: compiling kernels: 37 of 120"
    assert line.after("sm_90: ").done == 37


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(shown, "time", clock)
    return clock


def test_counts_are_told_every_second_and_at_the_end(clock):
    lines = []
    count = counter(lines.append, "load")
    for done in range(1, 11):
        clock.now += 0.25
        count(done, 10)
    assert [line.done for line in lines] == [4, 8, 10]
    counter(None, "load")(1, 1)


def test_a_log_has_a_line_every_ten_seconds_with_the_time_left(clock, capsys):
    with StageLog() as log:
        log("load weights")
        for done in range(26):
            log(Counted("load weights", done, 100))
            clock.now += 1
        log("export decode")
    lines = capsys.readouterr().err.splitlines()
    assert [line[12:] for line in lines] == [
        "load weights",
        "load weights: 10 of 100, about 90 s left",
        "load weights: 20 of 100, about 80 s left",
        "export decode",
        "done",
    ]


def test_long_waits_are_in_minutes_and_quiet_logs_are_silent(clock, capsys):
    with StageLog() as log, StageLog(quiet=True) as quiet:
        for done in (0, 10):
            log(Counted("compiling kernels", done, 100))
            quiet(Counted("compiling kernels", done, 100))
            clock.now += 60
    lines = capsys.readouterr().err.splitlines()
    assert "compiling kernels: 10 of 100, about 9 min left" in lines[1]
    assert len(lines) == 3


def test_a_terminal_has_a_bar(clock, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with StageLog() as log:
        log("load weights")
        log(Counted("load weights", 5, 10))
        (task,) = log._bar.tasks
        assert (task.completed, task.total) == (5, 10)
        log("export decode")
        (task,) = log._bar.tasks
        assert (task.completed, task.total, task.description) == (0, None, "export decode")
