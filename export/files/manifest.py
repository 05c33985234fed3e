"""Writes ``manifest.json``, which describes a lowered model to people and tools."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashpte.export.files.names import GENERATOR, MANIFEST_NAME

MANIFEST_VERSION = 2
"""Version 2 has rules for each layer's state (``states``); a runner of version 1 would go back wrongly."""

READ_VERSIONS = (1, 2)
_VERSIONED = ("flashpte", "torch", "triton", "executorch", "transformers")
_CHUNK = 8 << 20


def versions() -> dict[str, str]:
    """Versions of the packages that affect the output; packages that are not installed are omitted."""
    found = {}
    for name in _VERSIONED:
        if name in sys.modules and hasattr(sys.modules[name], "__version__"):
            found[name] = str(sys.modules[name].__version__)  # torch's version includes its build
        else:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
    return found


def sha256(path: Path) -> str:
    """The SHA-256 of a file as hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every file in a folder except the manifest, by relative path."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }


def build_manifest(
    methods: Mapping[str, Mapping[str, Any]],
    *,
    arch: str,
    package: str,
    attention: str,
    constant_methods: Mapping[str, Any],
    files: Mapping[str, Any],
    caller: Mapping[str, Any],
) -> dict[str, Any]:
    """Builds the manifest, ready for JSON and the same for the same input; its own keys override ``caller``'s.

    ``methods`` holds lowering's description of each method: inputs, outputs and the buffers that it writes to.
    """
    return {
        **caller,
        "generator": GENERATOR,
        "version": MANIFEST_VERSION,
        "versions": versions(),
        "arch": arch,
        "format": package,
        "attention": attention,
        "methods": dict(methods),
        "constant_methods": dict(constant_methods),
        "files": dict(files),
    }


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """Writes ``manifest.json`` and returns its path."""
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(manifest, indent=2) + "\n")
    return path
