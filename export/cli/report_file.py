"""Writes the ``--report`` file: a plain file appears complete or not at all; a pipe or device is written directly."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashpte.export.common.errors import ExportError
from flashpte.export.files.atomic_file import atomic_file

if TYPE_CHECKING:
    from flashpte.passes import RoutingReport


def check_output_file(flag: str, path: Path) -> None:
    """Checks that the file of a flag such as ``--report`` can be written, and leaves no file behind.

    Raises:
        ExportError: it cannot be written.
    """
    try:
        if path.is_dir():
            raise ExportError(f"{flag} {path} is a folder; give a file")
        if _is_special(path):
            if not os.access(path, os.W_OK):
                raise ExportError(f"{flag} {path} cannot be written: no permission")
            return
        folder = path.resolve().parent
        if not folder.is_dir():
            raise ExportError(f"{flag} {path}: the folder {folder} does not exist")
        handle, probe = tempfile.mkstemp(prefix=".export-model-", dir=folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise ExportError(f"{flag} {path} cannot be written: {_reason(error)}") from error
    os.close(handle)
    os.unlink(probe)


def write_report(path: Path, model: Mapping[str, Any], reports: Mapping[str, RoutingReport]) -> None:
    """Writes the manifest's entries on the model, and the routing of every attention node by method, as JSON.

    Raises:
        ExportError: the file cannot be written.
    """
    content = {"version": 1, **model, "routing": {name: report.to_dict() for name, report in reports.items()}}
    text = json.dumps(content, indent=2) + "\n"
    try:
        if _is_special(path):
            path.write_text(text, encoding="utf-8")
        else:
            with atomic_file(path.resolve()) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except (OSError, RuntimeError) as error:
        raise ExportError(f"--report {path} cannot be written: {_reason(error)}") from error


def _is_special(path: Path) -> bool:
    """Whether the path is a pipe, a terminal or a device such as /dev/null, which must not be replaced by a file."""
    return path.exists() and not path.is_file()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
