"""Signals that end a process: raised as exceptions so that cleanup runs, and held back while files change places."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

_HELD_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """The process was asked to end. A ``KeyboardInterrupt``, so that no ``except Exception`` swallows it.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def _raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(number)


@contextlib.contextmanager
def raise_on_termination() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise :class:`Terminated`, where they would end the process without any cleanup.

    A signal that is ignored (``nohup``) or handled by somebody else stays so. Python allows handlers in the main
    thread only; in another one this does nothing.
    """
    chosen = []
    if threading.current_thread() is threading.main_thread():
        chosen = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in chosen:
        signal.signal(number, _raise_terminated)
    try:
        yield
    finally:
        for number in chosen:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Holds Ctrl-C, SIGTERM and SIGHUP back until the block has ended; the first of them is then delivered."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {number: signal.getsignal(number) for number in _HELD_BACK}
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
