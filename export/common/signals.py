"""Signals that end a process: raised as exceptions so that cleanup runs, and held back while files are moved."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_raised: list[int] = []


class Terminated(KeyboardInterrupt):
    """The process was asked to end. A ``KeyboardInterrupt``, so that no ``except Exception`` swallows it.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def _raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    _raised.append(number)
    raise Terminated(number)


def raise_what_was_swallowed() -> None:
    """Raises :class:`Terminated` again if a signal raised it in :func:`raise_on_termination` and it was swallowed.

    The exception can arise anywhere, also in a finalizer or in a callback from a library's C++, which drop it.
    """
    if _raised and not isinstance(sys.exception(), KeyboardInterrupt):  # it is already propagating
        raise Terminated(_raised[0])


def signal_that_arrived() -> int | None:
    """The first signal that arrived in :func:`raise_on_termination`, whatever a library made of its exception."""
    return _raised[0] if _raised else None


@contextlib.contextmanager
def raise_on_termination() -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP raise :class:`Terminated`, so that cleanup runs.

    Signals that are ignored (``nohup``) or have another handler keep it. Python allows handlers only in the main
    thread; in any other thread this does nothing.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in ENDING}
        before = {n: h for n, h in handlers.items() if h in (signal.SIG_DFL, signal.default_int_handler)}
    for number in before:
        signal.signal(number, _raise_terminated)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _raised.clear()


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Holds Ctrl-C, SIGTERM and SIGHUP back until the block has ended; the first of them is then delivered."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler not in (None, signal.SIG_IGN):
            signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler not in (None, signal.SIG_IGN):
                signal.signal(number, handler)
        if arrived:
            signal.raise_signal(signal.Signals(arrived[0]))
