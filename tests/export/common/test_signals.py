"""Signals end a process even where a library drops the exception that they raise."""

import signal

import pytest

from flashpte.export.cli.progress import StageLog
from flashpte.export.common.signals import Terminated, raise_on_termination


@pytest.fixture(autouse=True)
def handlers():
    """Restores Python's own signal handlers, whatever this process was started with."""
    own = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("quiet", [True, False])
def test_what_was_swallowed_is_raised_when_the_next_stage_begins(number, quiet, capsys):
    with raise_on_termination(), StageLog(quiet=quiet) as stage:
        stage("first")
        with pytest.raises(Terminated):
            signal.raise_signal(number)
        with pytest.raises(Terminated) as error:
            stage("second")
        assert error.value.number == number
    with raise_on_termination(), StageLog(quiet=quiet) as stage:
        stage("of another command")
    assert "second" not in capsys.readouterr().err


def ended_while_cleaning_up():
    with raise_on_termination(), StageLog() as stage:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            stage("cleaning up")


def test_stages_of_a_cleanup_are_shown(capsys):
    """While the exception propagates, no second one is raised."""
    with pytest.raises(Terminated):
        ended_while_cleaning_up()
    assert "cleaning up" in capsys.readouterr().err


def test_a_signal_that_is_ignored_stays_so():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with raise_on_termination(), StageLog(quiet=True) as stage:
        signal.raise_signal(signal.SIGHUP)
        stage("on")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
