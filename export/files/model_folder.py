"""Reads and checks a folder that ``export-model`` wrote, before anything in it is run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from flashpte.export.common.errors import Option, ProgramError
from flashpte.export.files.manifest import READ_VERSIONS, sha256
from flashpte.export.files.names import GENERATOR, MANIFEST_NAME, MODEL_NAMES
from flashpte.export.files.signature import MethodSignature, read_signature


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """An export whose manifest was read.

    Attributes:
        path: the folder.
        manifest: contents of ``manifest.json``.
        signatures: inputs and outputs of each method, by name.
        verified: whether the files' sizes and hashes were compared with the manifest's.
    """

    path: Path
    manifest: Mapping[str, Any] = dataclasses.field(repr=False)
    signatures: Mapping[str, MethodSignature] = dataclasses.field(repr=False)
    verified: bool

    @property
    def format(self) -> str:
        """``pte`` or ``pt2``."""
        return str(self.manifest["format"])

    @property
    def arch(self) -> str:
        """The architecture that its kernels were compiled for, such as ``sm_90``."""
        return str(self.manifest["arch"])

    @property
    def torch_version(self) -> str:
        """The version of PyTorch that compiled it."""
        return str(self.manifest["versions"]["torch"])

    @property
    def model_file(self) -> Path:
        """``model.pte`` or ``model.pt2``."""
        return self.path / MODEL_NAMES[self.format]

    @property
    def constants(self) -> Mapping[str, Any]:
        """Values of the constant methods, such as ``get_max_seq_len``."""
        return self.manifest["constant_methods"]

    @property
    def buffers(self) -> dict[str, Mapping[str, Any]]:
        """Dtype and shape of every buffer that a method writes to, by FQN."""
        found: dict[str, Mapping[str, Any]] = {}
        for method in self.manifest["methods"].values():
            found.update(method.get("buffers", {}))
        return found


def open_folder(
    path: Path | str, *, unverified: bool = False, progress: Callable[[str], None] | None = None
) -> ModelFolder:
    """Reads a folder's manifest and compares the files with it.

    Args:
        path: the folder.
        unverified: do not compare sizes and hashes; any files with the right names are then run.
        progress: called with a short line for each file that is read.

    Raises:
        ProgramError: there is no manifest, flashpte did not write it, or a file is missing, truncated or another file.
    """
    folder = read_folder(path, unverified=unverified)
    return folder if unverified else verify_files(folder, progress)


def read_folder(path: Path | str, *, unverified: bool = False) -> ModelFolder:
    """The quick part of :func:`open_folder`: reads the manifest and, unless ``unverified``, compares file sizes.

    Raises:
        ProgramError: see :func:`open_folder`.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    known = ModelFolder(folder, manifest, {}, verified=False)
    try:
        signatures = {name: read_signature(name, method) for name, method in manifest["methods"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProgramError(f"{folder / MANIFEST_NAME}: cannot read its methods ({error!r})") from error
    files = manifest["files"]
    if known.model_file.name not in files:
        raise ProgramError(f"{folder / MANIFEST_NAME} does not list {known.model_file.name}")
    for name in files:
        _check_inside(folder, name)
    for name in files:
        _check_present(folder, name)
    if not unverified:
        for name, entry in files.items():
            _check_size(folder, name, entry)
    return dataclasses.replace(known, signatures=signatures)


def verify_files(folder: ModelFolder, progress: Callable[[str], None] | None = None) -> ModelFolder:
    """The slow part of :func:`open_folder`: reads every file and compares its hash.

    Raises:
        ProgramError: a file is not the one that the manifest describes.
    """
    for name, entry in folder.manifest["files"].items():
        if progress is not None:
            progress(f"verifying {name}")
        _check_hash(folder.path, name, entry)
    return dataclasses.replace(folder, verified=True)


def _read_manifest(folder: Path) -> Mapping[str, Any]:
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist"
        raise ProgramError(f"model folder {folder} {state}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        inner = sorted(found.parent for found in folder.glob(f"*/{MANIFEST_NAME}"))
        wanted = f"one of {', '.join(map(str, inner))}" if inner else "a folder that export-model wrote"
        raise ProgramError(f"{folder} has no {MANIFEST_NAME}: give {wanted}") from error
    except OSError as error:
        raise ProgramError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ProgramError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("generator") != GENERATOR:
        raise ProgramError(f"{path} was not written by export-model")
    if manifest.get("version") not in READ_VERSIONS:
        readable = " and ".join(map(str, READ_VERSIONS))
        raise ProgramError(f"{path} has version {manifest.get('version')!r}, this flashpte reads {readable}")
    for key, kind in (
        ("files", dict),
        ("methods", dict),
        ("constant_methods", dict),
        ("versions", dict),
        ("arch", str),
    ):
        if not isinstance(manifest.get(key), kind):
            raise ProgramError(f"{path} has no {key!r}")
    if manifest.get("format") not in MODEL_NAMES:
        raise ProgramError(f"{path} has format {manifest.get('format')!r}; known: {', '.join(MODEL_NAMES)}")
    if "torch" not in manifest["versions"]:
        raise ProgramError(f"{path} does not say which torch compiled it")
    return manifest


def _check_inside(folder: Path, name: str) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise ProgramError(f"{folder / MANIFEST_NAME} names {name}, which is outside of the folder")


def _check_present(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise ProgramError(f"{folder / name} is missing: {MANIFEST_NAME} lists it")


def _check_size(folder: Path, name: str, entry: Any) -> None:
    size = os.stat(folder / name).st_size
    expected = entry.get("bytes") if isinstance(entry, dict) else None
    if size != expected:
        kind = "truncated" if isinstance(expected, int) and size < expected else "another file"
        raise ProgramError(f"{folder / name} has {size} bytes, {MANIFEST_NAME} says {expected}: {kind}")


def _check_hash(folder: Path, name: str, entry: Any) -> None:
    try:
        found = sha256(folder / name)
    except OSError as error:
        raise ProgramError(f"cannot read {folder / name}: {error.strerror}") from error
    if found != entry.get("sha256"):
        raise ProgramError(
            f"{folder / name} is not the file that {MANIFEST_NAME} describes (SHA-256 {found[:12]}..., "
            f"not {str(entry.get('sha256'))[:12]}...): export again, or pass ",
            Option("unverified"),
            " to run it all the same",
        )
