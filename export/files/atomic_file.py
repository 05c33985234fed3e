"""Writes a file that appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields the path of a file to write, which replaces ``path`` at the end of the block.

    The file is in ``path``'s folder, under a hidden name of this process. If anything ends the block early, ``path`` is
    unchanged and the file is deleted.

    Raises:
        OSError: the file cannot be moved to ``path``.
    """
    temporary = path.with_name(f".flashpte-{os.getpid()}-{path.name}"[:255])
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
