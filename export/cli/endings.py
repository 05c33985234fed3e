"""How a command ends: exit codes, one line for each error, and no noise from the libraries it uses."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

from flashpte.export.cli.flag_names import spell_flag
from flashpte.export.common.errors import ExportError, UsageError
from flashpte.export.common.signals import Terminated, signal_that_arrived

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def report_errors(
    program: str,
    body: Callable[[], int],
    *,
    verbose: bool,
    state: Callable[[], str] = lambda: "",
    nothing_done: str = "",
) -> int:
    """Calls ``body`` and turns any exception into an exit code and one line on stderr.

    Args:
        program: name of the command; the line begins with it.
        body: returns the exit code when nothing goes wrong.
        verbose: also print the traceback of an error.
        state: called after an error; returns what was completed despite it, "" for nothing.
        nothing_done: printed after an interruption when ``state`` returns "".

    Returns:
        The code that ``body`` returned; 1 after an error, 2 after a :class:`UsageError`, 130 after Ctrl-C, 128 plus the
        signal's number after SIGTERM and SIGHUP.
    """

    def end(number: int) -> int:
        what = "interrupted" if number == signal.SIGINT else "terminated"
        print("; ".join(filter(None, (f"{program}: {what}", state() or nothing_done))), file=sys.stderr)
        return 128 + number

    def fail(message: str, code: int) -> int:
        if verbose:
            traceback.print_exc()
        # The error may be what a library made of the signal's exception.
        number = signal_that_arrived()
        if number is not None:
            return end(number)
        print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
        return code

    try:
        return body()
    except UsageError as error:
        return fail(error.spelled(spell_flag), EXIT_USAGE)
    except ExportError as error:
        return fail("; ".join(filter(None, (error.spelled(spell_flag), state()))), EXIT_FAILED)
    except KeyboardInterrupt as error:
        return end(error.number if isinstance(error, Terminated) else signal.SIGINT)
    except Exception as error:  # the outermost handler: the user gets one line and an exit code for any error
        hint = "" if verbose else " (run again with -v for the traceback)"
        return fail(f"unexpected {type(error).__name__}: {error}{hint}", EXIT_FAILED)


@contextlib.contextmanager
def stdout_may_close(out: TextIO | None = None) -> Iterator[None]:
    """Ignores a reader that closed the pipe (``| head``); raises when writing to ``out`` (stdout) fails otherwise.

    Raises:
        ExportError: the result cannot be written, as on a full disk.
    """
    out = out or sys.stdout
    try:
        yield
        out.flush()
    except OSError as error:
        # Python flushes again at exit and would print an error.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        if not isinstance(error, BrokenPipeError):
            raise ExportError(f"cannot print the result: {error.strerror}") from error


@contextlib.contextmanager
def quiet_libraries(verbose: bool) -> Iterator[None]:
    """Hides warnings and prints of libraries: stdout is for results, stderr for progress and errors."""
    if verbose:
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # some libraries log tracebacks of errors that are reported in one line anyway
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
