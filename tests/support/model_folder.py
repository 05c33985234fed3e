"""A folder as export-model writes it but without the compiled code: files and a manifest that fits them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def write_model_folder(
    folder: Path,
    methods: Mapping[str, Any],
    constant_methods: Mapping[str, Any],
    described: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    package: str = "pte",
) -> Path:
    """Writes ``files`` and their manifest to ``folder`` and returns it; ``described`` holds a plan's entries."""
    files = files or {"model.pte": b"code", "aoti_cuda_blob.ptd": b"weights"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    manifest = {
        **(described or {}),
        "generator": "flashpte",
        "version": 2,
        "versions": {"torch": torch.__version__},
        "arch": "sm_90",
        "format": package,
        "methods": dict(methods),
        "constant_methods": dict(constant_methods),
        "files": {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
