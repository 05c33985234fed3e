"""The front door: exported programs in, a folder with a model and its manifest out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.export import ExportedProgram

from flashpte.export.errors import ExportError, UsageError
from flashpte.export.lowering.aot_inductor import PT2_NAME, write_pt2
from flashpte.export.lowering.cross_compile import cross_compile, find_arch
from flashpte.export.lowering.executorch import (
    MUTABLE_BUFFER_METADATA,
    Attention,
    mutable_buffer_metadata,
    write_pte,
)
from flashpte.export.lowering.manifest import build_manifest, describe_files, write_manifest
from flashpte.export.lowering.output import MANIFEST_NAME, atomic_folder, check_free_space, check_output_folder
from flashpte.export.lowering.self_check import can_disassemble, check_pt2, check_pte

Format = Literal["pte", "pt2"]
_SPARE_BYTES = 200_000_000  # code, caches and intermediate files, beside the weights


@dataclasses.dataclass(frozen=True)
class LoweredModel:
    """A finished output folder.

    Attributes:
        folder: the output folder.
        model: ``model.pte`` or ``model.pt2``.
        weights: ``aoti_cuda_blob.ptd``; ``None`` for a ``.pt2``, which holds its weights, or a model without any.
        manifest_path: ``manifest.json``.
        arch: architecture the kernels were compiled for.
        methods: names of the methods.
        manifest: what ``manifest.json`` says.
    """

    folder: Path
    model: Path
    weights: Path | None
    manifest_path: Path
    arch: str
    methods: tuple[str, ...]
    manifest: Mapping[str, Any]


def lower(
    programs: Mapping[str, ExportedProgram],
    *,
    output_dir: Path | str,
    arch: str | None = None,
    format: Format = "pte",
    attention: Attention = "flashpte",
    constant_methods: Mapping[str, Any] | None = None,
    manifest: Mapping[str, Any] | None = None,
    extra_files: Sequence[Path] = (),
    progress: Callable[[str], None] | None = None,
) -> LoweredModel:
    """Compiles programs for a GPU that need not be there and writes them to a folder.

    The same programs give the same bytes, on any machine and in any folder, with a GPU or without. Nothing is
    launched or timed. PyTorch, Triton and ExecuTorch are patched while this runs and restored afterwards, so only
    one call may run at a time in a process. The programs are left as they were.

    Args:
        programs: methods by name, ATen dialect (as ``torch.export.export`` gives them, or rewritten by
            ``replace_sdpa``). Methods share weights and mutated buffers of the same name.
        output_dir: folder to write. It appears when all is done; an earlier export there is replaced.
        arch: ``sm_80``, ``sm_86``, ``sm_89``, ``sm_90``, ``sm_100`` or ``sm_120``; ``None`` for the local GPU's,
            else sm_90. Kernels for sm_90 and later run on that architecture only.
        format: ``pte`` for ExecuTorch, ``pt2`` for a plain AOTInductor package (one method).
        attention: what becomes of SDPA nodes left in the programs. ``flashpte`` and ``math``: plain matrix
            multiplies and a softmax. ``executorch``: ExecuTorch's own Triton kernels (``pte`` only).
        constant_methods: values for methods of the ``.pte`` that return a constant.
            ``get_mutable_buffer_metadata`` is added.
        manifest: further entries for ``manifest.json``.
        extra_files: files copied into the folder, such as a tokenizer.
        progress: called with a short line at each stage.

    Raises:
        UnknownArchError: ``arch`` is not in the table.
        UsageError: the arguments do not fit together.
        ExportError: the output cannot be written, a tool is missing, or the result failed its check.
    """
    output = Path(output_dir)
    target = find_arch(arch)
    constants = dict(constant_methods or {})
    _check_arguments(programs, format, attention, constants, manifest or {}, extra_files)
    check_output_folder(output)
    check_free_space(output, 2 * _weight_bytes(programs) + _SPARE_BYTES)  # intermediate files, then the result
    if format == "pte":
        constants.setdefault(MUTABLE_BUFFER_METADATA, mutable_buffer_metadata(programs))

    tell = progress or (lambda stage: None)
    with atomic_folder(output) as (folder, scratch):
        restore_views = attention != "executorch"
        tell(f"compiling {', '.join(programs)} for {target.name}")
        with (
            cross_compile(target, scratch, format, restore_views, lambda source: tell("compiling host code")),
            _plain_errors(),
        ):
            if format == "pte":
                written = write_pte(programs, folder, attention, constants)
            else:
                written = [write_pt2(next(iter(programs.values())), folder)]
        tell(
            "checking the result"
            if can_disassemble()
            else "checking the result (no objdump: AVX-512 is not looked for)"
        )
        if format == "pte":
            check_pte(folder, programs, target, attention)
        else:
            check_pt2(folder / PT2_NAME, target)
        for file in extra_files:
            shutil.copyfile(file, folder / Path(file).name)
        tell("writing the manifest")
        document = build_manifest(
            programs,
            arch=target.name,
            package=format,
            attention=attention,
            constant_methods=constants,
            files=describe_files(folder),
            caller=manifest or {},
        )
        write_manifest(folder, document)
    names = {path.suffix: path.name for path in written}
    return LoweredModel(
        folder=output,
        model=output / names[f".{format}"],
        weights=output / names[".ptd"] if ".ptd" in names else None,
        manifest_path=output / MANIFEST_NAME,
        arch=target.name,
        methods=tuple(programs),
        manifest=document,
    )


_ERROR_LINE = re.compile(r"\berror: |multiple definition|undefined reference|cannot find")


class LoweringError(ExportError):
    """A program could not be compiled; the cause holds the compiler's own error."""


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Turns a compiler's error into one line, with the original as its cause."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        inner: BaseException | None = error
        while inner is not None:  # an error of ours that a compiler wrapped in one of its own
            if isinstance(inner, ExportError):
                raise inner from error
            inner = getattr(inner, "inner_exception", None) or inner.__cause__
        raise LoweringError(f"compiling failed: {type(error).__name__}: {_summary(str(error))}") from error


def _summary(message: str) -> str:
    """One line of a compiler's many: what its tools call an error, else how the message begins."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR_LINE.search(line)]
    return " ".join((errors or lines)[:3])[:400]


def _check_arguments(
    programs: Mapping[str, ExportedProgram],
    package: str,
    attention: str,
    constants: Mapping[str, Any],
    manifest: Mapping[str, Any],
    extra_files: Sequence[Path],
) -> None:
    if not programs:
        raise UsageError("no programs to lower")
    for name, program in programs.items():
        if not name.isidentifier():
            raise UsageError(f"method name {name!r} is not an identifier")
        if not isinstance(program, ExportedProgram):
            raise UsageError(f"method {name} is a {type(program).__name__}: pass what torch.export.export returns")
        if name in constants:
            raise UsageError(f"{name} is both a method and a constant method")
    if package not in get_args(Format):
        raise UsageError(f"unknown format {package!r} (known: {', '.join(get_args(Format))})")
    if attention not in get_args(Attention):
        raise UsageError(f"unknown attention {attention!r} (known: {', '.join(get_args(Attention))})")
    if package == "pt2":
        if len(programs) != 1:
            raise UsageError(
                f"a .pt2 holds one method, {len(programs)} were given ({', '.join(programs)}): methods of a package "
                "cannot share a KV cache; lower to .pte, or one method to each .pt2"
            )
        if attention == "executorch":
            raise UsageError("attention 'executorch' needs format 'pte': the kernels belong to ExecuTorch's backend")
    try:
        json.dumps(manifest)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the manifest's extra entries cannot be written as JSON: {error}") from error
    taken = {"model.pte", "model.pt2", "aoti_cuda_blob.ptd", MANIFEST_NAME}
    for file in map(Path, extra_files):
        if not file.is_file():
            raise ExportError(f"extra file {file} does not exist")
        if file.name in taken:
            raise UsageError(f"extra file {file} would replace another file of that name in the output")
        taken.add(file.name)


def _weight_bytes(programs: Mapping[str, ExportedProgram]) -> int:
    """Bytes of all parameters, buffers and constants, those that methods share counted once."""
    sizes: dict[str, int] = {}
    for program in programs.values():
        for name, value in {**program.state_dict, **program.constants}.items():
            if isinstance(value, torch.Tensor):
                sizes[name] = value.numel() * value.element_size()
    return sum(sizes.values())
