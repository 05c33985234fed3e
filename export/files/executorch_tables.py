"""Reads the tables at the head of ExecuTorch's files with its own schemas and its own program ``flatc``.

``executorch.exir`` reads them in the same way, but importing it takes several seconds, because it imports PyTorch's
compilers. Running a program needs none of them.

The layout of the heads is that of ``schema/extended_header.cpp`` (``.pte``) and
``extension/flat_tensor/serialize/flat_tensor_header.h`` (``.ptd``) of ExecuTorch 1.5. Offsets and sizes are in bytes.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

PROGRAM = "exir/_serialize/program.fbs"
FLAT_TENSOR = "extension/flat_tensor/serialize/flat_tensor.fbs"

DTYPES = dict(
    enumerate((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32))
) | {7: torch.float64, 11: torch.bool, 15: torch.bfloat16}
"""Dtypes by their number in ``scalar_type.fbs``."""

_PTE_HEADER, _PTD_HEADER = struct.Struct("<4sIQQQ"), struct.Struct("<4sIQQQQ")
_HEADER_OFFSET = 8  # after the root table's offset and the file identifier


class NoExecutorchError(Exception):
    """ExecuTorch is not installed, or without its schemas or ``flatc``."""


def read_program(content: bytes | memoryview) -> tuple[dict[str, Any], int]:
    """The program's table of a ``.pte``, and where its segments begin (0 if there are none).

    Raises:
        ValueError: the content is of another kind, or truncated.
        NoExecutorchError: see there.
    """
    size, base = len(content), 0
    head = bytes(content[_HEADER_OFFSET : _HEADER_OFFSET + _PTE_HEADER.size])
    if len(head) == _PTE_HEADER.size:
        magic, _, program_size, segments, segments_size = _PTE_HEADER.unpack(head)
        if magic == b"eh00":
            size, base = program_size, segments
            if max(size, base + segments_size) > len(content):
                raise ValueError("its header does not fit")
    return _table(PROGRAM, b"ET12", content[:size]), base


def read_flat_tensor(content: bytes | memoryview) -> tuple[dict[str, Any], int]:
    """The table of a ``.ptd``, and where its segments begin.

    Raises:
        ValueError: the content is of another kind, or truncated.
        NoExecutorchError: see there.
    """
    head = bytes(content[_HEADER_OFFSET : _HEADER_OFFSET + _PTD_HEADER.size])
    if len(head) < _PTD_HEADER.size:
        raise ValueError("it is too short")
    magic, _, offset, size, base, segments_size = _PTD_HEADER.unpack(head)
    if magic != b"FH01" or base + segments_size > len(content):
        raise ValueError("its header does not fit")
    # Offsets in the table are relative to the file's start.
    return _table(FLAT_TENSOR, b"FT01", content[: offset + size]), base


def _table(schema: str, identifier: bytes, content: bytes | memoryview) -> dict[str, Any]:
    if content[4:8] != identifier:
        raise ValueError(f"it has no file identifier {identifier.decode()}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "table.bin"
        file.write_bytes(content)
        flags = ("--json", "--defaults-json", "--strict-json", "--raw-binary")
        command = [_flatc(), *flags, "-o", folder, str(_package() / schema), "--", str(file)]
        made = file.with_suffix(".json")
        if subprocess.run(command, capture_output=True).returncode or not made.exists():
            raise ValueError("flatc cannot read its table")
        text = made.read_text()
    # flatc writes numbers that JSON does not have.
    text = re.sub(r'("double_val": -?)inf', r"\1Infinity", text)
    table = json.loads(re.sub(r'("double_val": )-?nan', r"\1NaN", text))
    assert isinstance(table, dict)
    return table


@functools.cache
def _package() -> Path:
    found = importlib.util.find_spec("executorch")
    for place in (found.submodule_search_locations or ()) if found is not None else ():
        if (Path(place) / PROGRAM).is_file():
            return Path(place)
    raise NoExecutorchError("ExecuTorch is not installed: pip install 'flashpte[export]'")


@functools.cache
def _flatc() -> str:
    """The program that ExecuTorch brings, or else the one that its variable or the path names."""
    own = _package() / "data" / "bin" / "flatc"
    if own.is_file() and not os.access(own, os.X_OK):
        own.chmod(own.stat().st_mode | 0o111)
    found = str(own) if own.is_file() else shutil.which(os.environ.get("FLATC_EXECUTABLE", "flatc"))
    if found is None:
        raise NoExecutorchError("flatc is missing: it comes with ExecuTorch (pip install 'flashpte[export]')")
    return found
