"""How a command line ends: exit codes, one line for every error, and no noise of the libraries it uses."""

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
from flashpte.export.common.signals import Terminated

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def report_errors(
    program: str,
    body: Callable[[], int],
    *,
    verbose: bool,
    state: Callable[[], str] = lambda: "",
    nothing_done: str = "",
) -> int:
    """Calls ``body`` and turns whatever ends it into an exit code and at most one line on stderr.

    Args:
        program: name of the command, begins the line.
        body: returns the exit code when nothing goes wrong.
        verbose: print the traceback of an error as well.
        state: called after an error; what has been done all the same, "" for nothing.
        nothing_done: said after an interruption when ``state`` has nothing to say.

    Returns:
        1 after an error, 2 after a :class:`UsageError`, 130 after Ctrl-C, 128 and the signal's number after SIGTERM and
        SIGHUP.
    """

    def fail(message: str, code: int) -> int:
        if verbose:
            traceback.print_exc()
        print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
        return code

    try:
        return body()
    except UsageError as error:
        return fail(error.spelled(spell_flag), EXIT_USAGE)
    except ExportError as error:
        return fail("; ".join(filter(None, (error.spelled(spell_flag), state()))), EXIT_FAILED)
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Terminated) else signal.SIGINT
        what = "interrupted" if number == signal.SIGINT else "terminated"
        print("; ".join(filter(None, (f"{program}: {what}", state() or nothing_done))), file=sys.stderr)
        return 128 + number
    except Exception as error:  # the door of the program: whatever it is, the user gets one line and an exit code
        hint = "" if verbose else " (run again with -v for the traceback)"
        return fail(f"unexpected {type(error).__name__}: {error}{hint}", EXIT_FAILED)


@contextlib.contextmanager
def stdout_may_close(out: TextIO | None = None) -> Iterator[None]:
    """A reader that went away (``| head``) is no error; a full disk behind stdout (``out``) is."""
    out = out or sys.stdout
    try:
        yield
        out.flush()
    except OSError as error:
        # Python flushes once more when it exits, and would complain.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        if not isinstance(error, BrokenPipeError):
            raise ExportError(f"cannot print the result: {error.strerror}") from error


@contextlib.contextmanager
def quiet_libraries(verbose: bool) -> Iterator[None]:
    """Keeps the libraries' warnings and prints away: stdout is for results, stderr for progress and errors."""
    if verbose:
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # some log the traceback of an error that is reported in one line anyway
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
