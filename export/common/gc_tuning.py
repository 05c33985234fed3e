"""Memory of the process: fewer garbage collections while a program is compiled, and freed memory given back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator

_NEW_OBJECTS = 100_000


@contextlib.contextmanager
def fewer_collections() -> Iterator[None]:
    """Inside, Python collects garbage after 100,000 new objects instead of 700.

    Graphs and symbolic sizes are millions of long-lived objects; scanning the young ones that often takes 5% to 10% of
    the time. A higher threshold, or collection turned off, is left as it is.
    """
    before = gc.get_threshold()
    if 0 < before[0] < _NEW_OBJECTS:
        gc.set_threshold(_NEW_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def return_freed_memory() -> None:
    """Gives memory that was freed back to the system, where the C library can (glibc)."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
