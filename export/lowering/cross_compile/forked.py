"""Worker processes: forked with everything loaded, and ended with all that they started."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from flashpte.export.common.signals import ENDING, deferred_signals

_PR_SET_PDEATHSIG = 1  # of prctl(2)


def can_fork() -> bool:
    """Whether this process may start others: a daemon of ``multiprocessing`` may not."""
    return not multiprocessing.current_process().daemon


def start(processes: list[BaseProcess], work: Callable[..., None], arguments: Sequence[Any], daemon: bool) -> bool:
    """Forks a process that runs ``work(*arguments)`` and appends it to ``processes``.

    Args:
        processes: list to append to, for :func:`end`.
        work: function to run; it should call :func:`become_worker` first.
        arguments: its arguments, which need not be picklable.
        daemon: whether the process starts no others by ``multiprocessing``.

    Returns:
        Whether there was memory for another process.
    """
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments, daemon=daemon)
    # No signal may arrive between starting a process and recording it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        process.start()
        processes.append(process)
    except OSError:
        return False
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return True


def received(running: dict[connection.Connection, Any]) -> list[tuple[connection.Connection, Any]]:
    """Waits for running processes and returns what they sent; removes those that have ended from ``running``."""
    messages = []
    for ready in connection.wait(list(running)):
        assert isinstance(ready, connection.Connection)
        try:
            messages.append((ready, ready.recv()))
        except (EOFError, pickle.UnpicklingError):  # the process has ended
            del running[ready]
            ready.close()
    return messages


def end(processes: Sequence[BaseProcess]) -> None:
    """Kills processes that :func:`start` returned, with what they started, and waits for them."""
    with deferred_signals():
        for process in processes:
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # also kills an assembler or compiler that it started
            process.kill()  # it may not have joined its group yet
        for process in processes:
            process.join()


def become_worker() -> None:
    """The first call in a forked process: its own group, the usual signals, no output, and no second thread."""
    os.setpgid(0, 0)
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody reads the results any more: the parent has died
    with contextlib.suppress(OSError, AttributeError):  # Linux: ends with the parent even if it writes nothing
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Never free the parent's objects: a compiler context waits for its threads when freed, and a fork has none.
    gc.freeze()
    torch.set_num_threads(1)  # the threads of the parent's pool do not exist here; a loop that they share would hang
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # the parent meets the same errors and reports them
        os.dup2(nowhere, stream)
