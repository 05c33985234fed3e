"""Output folders that are either complete or not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flashpte.export.errors import ExportError

MANIFEST_NAME = "manifest.json"
GENERATOR = "flashpte"  # the manifest's "generator": marks a folder as ours


class OutputError(ExportError):
    """The output folder cannot be written."""


def check_output_folder(output: Path) -> None:
    """Raises unless ``output`` can be created, is empty, or holds an earlier export of ours (which is replaced).

    Raises:
        OutputError: with one line that says what to do.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file: name a folder")
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    for folder in (parent, output):
        if folder.exists() and (not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK)):
            raise OutputError(f"cannot write into {folder}: not a folder, or no permission")
    if output.is_dir() and any(output.iterdir()) and not _is_ours(output):
        raise OutputError(f"{output} is not empty and was not written by flashpte: name another folder or empty it")


def _is_ours(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("generator") == GENERATOR


def check_free_space(folder: Path, needed: int) -> None:
    """Raises unless the file system that holds ``folder`` (or will) has ``needed`` bytes free.

    Raises:
        OutputError: with both numbers.
    """
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(f"not enough disk space at {folder}: about {_size(needed)} needed, {_size(free)} free")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


@contextlib.contextmanager
def atomic_folder(output: Path) -> Iterator[tuple[Path, Path]]:
    """Yields two empty folders, ``(result, scratch)``; on success ``result`` becomes ``output``.

    Both are on ``output``'s file system. Whatever ends the block early (an error, Ctrl-C), ``output`` is as it was
    and both folders are gone.
    """
    output = output.absolute()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise OutputError(f"cannot write into {output.parent}: {error.strerror}") from error
    try:
        result, scratch = staging / "result", staging / "scratch"
        result.mkdir()
        scratch.mkdir()
        yield result, scratch
        replaced = staging / "replaced"
        if output.exists():
            output.rename(replaced)
        try:
            result.rename(output)
        except BaseException:
            if replaced.exists():
                replaced.rename(output)
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
