"""Compiled methods as files: a part is a zip with a shared library, a description, and constants of the compiler.

A part holds no weights and names no folder of its machine. :func:`flashpte.export.lowering.compile_method` writes one,
:func:`flashpte.export.lowering.lower` takes it in place of compiling the method.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import platform
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flashpte.export.common.errors import ExportError
from flashpte.export.files.atomic_file import atomic_file
from flashpte.export.files.dtypes import dtype_name, read_dtype
from flashpte.export.files.manifest import versions
from flashpte.export.files.names import GENERATOR
from flashpte.export.files.output_folder import OutputError
from flashpte.export.lowering.cross_compile.answers import Answer, Weight
from flashpte.export.lowering.cross_compile.toolchain import compiler_version, find_compiler

PART_VERSION = 1

_LIBRARY, _HEADER = "library.so", "part.json"
_WHEN = (1980, 1, 1, 0, 0, 0)  # the same part has the same bytes at any time
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError, AttributeError)


class PartError(ExportError):
    """A part is missing, damaged, or does not belong to the export."""


@dataclasses.dataclass(frozen=True)
class Part:
    """The description of a compiled method.

    Attributes:
        method: its name.
        arch: the architecture that it was compiled for.
        program: digest of the program (:func:`~.program_digest.program_digest`).
        plan: what the caller gave, such as the digest of a plan; ``""`` for nothing.
        versions: the result of :func:`build_versions` where it was compiled.
    """

    method: str
    arch: str
    program: str
    plan: str
    versions: Mapping[str, str]


@functools.cache
def _source_digest() -> str:
    """A digest of flashpte's own source, which changes between two releases."""
    digest = hashlib.sha256()
    for room in ("kernels", "passes", "export"):
        spec = importlib.util.find_spec(f"flashpte.{room}")
        for folder in map(Path, spec.submodule_search_locations or () if spec is not None else ()):
            for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cpp")):
                digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build_versions() -> dict[str, str]:
    """Versions of all that decides the bytes of a compiled method: packages, flashpte's source, compiler, processor.

    Raises:
        CrossCompileError: there is no C++ compiler.
    """
    compiler = compiler_version(find_compiler())
    return {**versions(), "flashpte's source": _source_digest(), "g++": compiler, "machine": platform.machine()}


def version_difference(there: Mapping[str, str]) -> str | None:
    """Names what differs between ``there`` and :func:`build_versions`; ``None`` if nothing does."""
    here = build_versions()
    names = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    return ", ".join(f"{name} {there.get(name, 'none')}, here {here.get(name, 'none')}" for name in names) or None


def write_part(path: Path, part: Part, answer: Answer) -> None:
    """Writes a part, which appears complete or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    values: list[bytes] = []
    weights: dict[str, Any] = {}
    for name, weight in answer.weights.items():
        described = {**dataclasses.asdict(weight), "dtype": dtype_name(weight.dtype)}
        if isinstance(weight.storage, bytes):
            described["storage"] = len(values)
            values.append(weight.storage)
        weights[name] = described
    header = {"generator": GENERATOR, "version": PART_VERSION, **dataclasses.asdict(part), "weights": weights}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in (
                (_HEADER, json.dumps(header, indent=1).encode()),
                (_LIBRARY, Path(answer.library).read_bytes()),
                *((f"constants/{number}", value) for number, value in enumerate(values)),
            ):
                archive.writestr(zipfile.ZipInfo(name, _WHEN), data, zipfile.ZIP_DEFLATED)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def read_part(path: Path) -> Part:
    """Reads and checks a part.

    Raises:
        PartError: it does not exist, is damaged, or has another format.
    """
    with _opened(path) as archive:
        header = _header(archive, path)
        if archive.testzip() is not None:
            raise zipfile.BadZipFile
        part = Part(**{field.name: header[field.name] for field in dataclasses.fields(Part)})
        if not isinstance(part.versions, dict):
            raise TypeError(part.versions)
    return part


def read_answer(path: Path, library: Path) -> Answer:
    """Reads the compiled method of a part.

    Args:
        path: the part.
        library: where to put its shared library.

    Raises:
        PartError: as for :func:`read_part`.
    """
    with _opened(path) as archive:
        weights = {name: _weight(described, archive) for name, described in _header(archive, path)["weights"].items()}
        code = archive.read(_LIBRARY)
    library.write_bytes(code)
    return Answer(str(library), weights)


def check_part(path: Path, *, method: str, arch: str, program: str) -> None:
    """Refuses a part that was compiled from another program or under other versions, or for another architecture.

    Raises:
        PartError: it was, or as for :func:`read_part`; the text is one line that names the file.
    """
    part = read_part(path)
    if (part.method, part.arch) != (method, arch):
        raise PartError(f"{path} holds {part.method} for {part.arch}, not {method} for {arch}")
    if (difference := version_difference(part.versions)) is not None:
        raise PartError(f"{path} was compiled under other versions ({difference}): compile it again")
    if part.program != program:
        raise PartError(f"{path} was compiled from another program than {method} is now: compile it again")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a part; every sign of damage inside the block becomes a :class:`PartError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError as error:
        raise PartError(f"{path} does not exist") from error
    except OSError as error:
        raise PartError(f"{path} cannot be read: {error.strerror}") from error
    except _BROKEN as error:
        raise PartError(f"{path} is damaged, or is no compiled method: compile it again") from error


def _header(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    header = json.loads(archive.read(_HEADER))
    if header["generator"] != GENERATOR:
        raise ValueError(header["generator"])
    if header["version"] != PART_VERSION:
        raise PartError(f"{path} has version {header['version']}, this flashpte reads {PART_VERSION}: compile it again")
    return dict(header)


def _weight(described: Mapping[str, Any], archive: zipfile.ZipFile) -> Weight:
    storage = described["storage"]
    size, strides, offset = described["layout"]
    properties = {**described["properties"]}
    return Weight(
        storage=storage if isinstance(storage, str) else archive.read(f"constants/{storage}"),
        layout=(tuple(size), tuple(strides), offset),
        dtype=read_dtype(described["dtype"]),
        on_gpu=described["on_gpu"],
        properties={**properties, "shape": tuple(properties["shape"]), "stride": tuple(properties["stride"])},
    )
