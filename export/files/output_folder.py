"""Writes output folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flashpte.export.common.errors import ExportError
from flashpte.export.common.signals import deferred_signals
from flashpte.export.files.names import GENERATOR, MANIFEST_NAME


class OutputError(ExportError):
    """The output folder cannot be written."""


def check_output_folder(output: Path) -> None:
    """Checks that ``output`` can be created, is empty, or holds only an earlier export by flashpte.

    Raises:
        OutputError: none of these holds; the text is one line that says what to do.
    """
    try:
        _check_place(output, resolve_output(output))
    except OSError as error:  # the name is too long, or a folder must not be listed
        raise OutputError(f"cannot use {output}: {error.strerror}") from error


def resolve_output(output: Path) -> Path:
    """Follows links to the real folder, because renaming must move the folder and not a link to it.

    Raises:
        OutputError: the link is broken or leads in a circle.
    """
    if output.is_symlink() and not output.exists():
        raise OutputError(f"{output} is a link to {os.readlink(output)}, which does not exist")
    try:
        return output.resolve()
    except RuntimeError as error:  # a loop of links further up
        raise OutputError(f"cannot use {output}: its links lead in a circle") from error


def _check_place(named: Path, output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise OutputError(f"{named} is a file: name a folder")
    # The finished folder is renamed into place, which cannot replace the current folder or a mount point.
    if output == Path.cwd():
        raise OutputError(f"{named} is the current folder, which cannot be replaced: name another one, such as out")
    if output.is_mount():
        raise OutputError(f"{named} is a mount point, which cannot be replaced: name a folder inside it")
    parent = output.parent
    while not parent.exists():
        parent = parent.parent
    for folder in (parent, output):
        if folder.exists() and (not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK)):
            raise OutputError(f"cannot write into {folder}: not a folder, or no permission")
    if output.is_dir() and any(output.iterdir()):
        written = _written_files(output)
        if written is None:
            raise OutputError(f"{named} is not empty and was not written by flashpte: name another folder or empty it")
        foreign = _foreign_entry(output, written)
        if foreign is not None:
            raise OutputError(
                f"{named} holds {foreign}, which is not part of the earlier export there: move it, or name another "
                "folder"
            )


def _written_files(folder: Path) -> set[Path] | None:
    """The files of the export that a folder holds, or of one in each of its folders; ``None`` if there is another."""
    if (folder / MANIFEST_NAME).exists():
        return _described_files(folder)
    found: set[Path] = set()
    for inner in folder.iterdir():  # one for each architecture
        files = _described_files(inner)
        if files is None:
            return None
        found |= files
    return found


def _described_files(folder: Path) -> set[Path] | None:
    """The files of the export that a folder's manifest describes; ``None`` without a manifest by flashpte."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or manifest.get("generator") != GENERATOR:
        return None
    files = manifest.get("files")
    return {folder / MANIFEST_NAME, *(folder / str(name) for name in files or () if isinstance(files, dict))}


def _foreign_entry(folder: Path, written: set[Path]) -> Path | None:
    """The first entry of a folder that is neither a written file nor a folder that holds one."""
    folders = {parent for path in written for parent in path.parents}
    for path in sorted(folder.rglob("*")):
        is_folder = path.is_dir() and not path.is_symlink()
        if path not in (folders if is_folder else written):
            return path.relative_to(folder)
    return None


def check_free_space(folder: Path, needed: int) -> None:
    """Checks that the file system of ``folder``, which need not exist yet, has ``needed`` bytes free.

    Raises:
        OutputError: it has less; the text gives both sizes.
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

    Both are on ``output``'s file system. If anything ends the block early (an error, Ctrl-C), ``output`` is unchanged
    and both folders are deleted. Signals wait while folders are moved or deleted.

    Raises:
        OutputError: ``output`` cannot be written, or :func:`check_output_folder` now refuses it.
    """
    named, output = output, resolve_output(output)
    with folder_beside(output) as staging:
        result, scratch = staging / "result", staging / "scratch"
        result.mkdir()
        scratch.mkdir()
        yield result, scratch
        with deferred_signals():
            _commit(result, named, output, staging / "replaced")
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def folder_beside(output: Path) -> Iterator[Path]:
    """Yields an empty folder on ``output``'s file system, and deletes it when the block ends.

    Raises:
        OutputError: ``output``'s parent folder cannot be written.
    """
    parent = resolve_output(output).parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        # The name has a fixed length; one derived from the output's could be too long.
        folder = Path(tempfile.mkdtemp(prefix=".flashpte-", dir=parent))
    except OSError as error:
        raise OutputError(f"cannot write into {parent}: {error.strerror}") from error
    try:
        yield folder
    finally:
        with deferred_signals():
            shutil.rmtree(folder, ignore_errors=True)


def _commit(result: Path, named: Path, output: Path, replaced: Path) -> None:
    check_output_folder(named)  # check again: the folder may have appeared or changed during the export
    try:
        if output.exists():
            output.rename(replaced)
        try:
            result.rename(output)
        except OSError:
            if replaced.exists():
                replaced.rename(output)
            raise
    except OSError as error:
        raise OutputError(f"cannot put the finished files at {named}: {error.strerror}") from error
