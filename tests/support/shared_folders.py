"""Folders that all processes of a test run share; variables of the environment name them (tests/conftest.py)."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path


@functools.cache
def _temporary(variable: str) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="flashpte-tests-")  # removed when the process ends


def shared_folder(variable: str) -> Path:
    """The folder that ``variable`` names, or one of this process."""
    return Path(os.environ.get(variable) or _temporary(variable).name)
