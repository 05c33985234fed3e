"""The entry point of lowering: compiles exported programs and writes a folder with a model and its manifest."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from flashpte.export.common.errors import UsageError
from flashpte.export.common.gc_tuning import fewer_collections
from flashpte.export.common.options import Attention, Format
from flashpte.export.common.progress import Counted, counter
from flashpte.export.files.manifest import build_manifest, describe_files, write_manifest
from flashpte.export.files.mapped_tensors import mapped_file
from flashpte.export.files.names import MANIFEST_NAME, PT2_NAME
from flashpte.export.files.output_folder import atomic_folder, check_free_space
from flashpte.export.lowering.aot_inductor import write_pt2
from flashpte.export.lowering.cross_compile import cross_compile, find_arch
from flashpte.export.lowering.describe_methods import describe_method
from flashpte.export.lowering.executorch import (
    MUTABLE_BUFFER_METADATA,
    mutable_buffer_metadata,
    write_pte,
)
from flashpte.export.lowering.parts import check_part, read_answer
from flashpte.export.lowering.plain_errors import plain_errors
from flashpte.export.lowering.preflight import check_programs, check_request, check_surroundings
from flashpte.export.lowering.prepare import plain_program
from flashpte.export.lowering.program_digest import program_digest
from flashpte.export.lowering.self_check import can_disassemble, check_pt2, check_pte

_SPARE_BYTES = 200_000_000  # for code, caches and intermediate files, in addition to the weights


@dataclasses.dataclass(frozen=True)
class LoweredModel:
    """A finished output folder.

    Attributes:
        folder: the output folder.
        model: ``model.pte`` or ``model.pt2``.
        weights: ``aoti_cuda_blob.ptd``; ``None`` for a ``.pt2``, which holds its weights, or a model without weights.
        manifest_path: ``manifest.json``.
        arch: architecture that the kernels were compiled for.
        methods: names of the methods.
        manifest: contents of ``manifest.json``.
    """

    folder: Path
    model: Path
    weights: Path | None
    manifest_path: Path
    arch: str
    methods: tuple[str, ...]
    manifest: Mapping[str, Any]


@fewer_collections()
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
    device_tensors: bool = False,
    compiled: Mapping[str, Path] | None = None,
    progress: Callable[[str], None] | None = None,
) -> LoweredModel:
    """Compiles programs for a GPU and writes them to a folder; this machine needs no GPU.

    The same programs give the same bytes in any folder, with a GPU or without, with the same versions of PyTorch,
    Triton, ExecuTorch and g++. Nothing is launched or timed. PyTorch, Triton and ExecuTorch are patched during the call
    and restored afterwards, so a process can run only one call at a time. The programs are not changed.

    Args:
        programs: methods by name, in the ATen dialect (as ``torch.export.export`` returns them, or rewritten by
            ``replace_sdpa``). Methods share weights and mutated buffers of the same name.
        output_dir: folder to write. It appears when all work is done and replaces an earlier export there.
        arch: ``sm_80``, ``sm_86``, ``sm_89``, ``sm_90``, ``sm_100`` or ``sm_120``; ``None`` for the local GPU's
            architecture, or sm_90 without a GPU. Kernels for sm_90 and later run on that architecture only.
        format: ``pte`` for ExecuTorch, ``pt2`` for a plain AOTInductor package (one method).
        attention: how to compile SDPA nodes left in the programs. ``flashpte`` and ``math``: plain matrix
            multiplies and a softmax. ``executorch``: ExecuTorch's own Triton kernels (``pte`` only).
        constant_methods: values for methods of the ``.pte`` that return a constant.
            ``get_mutable_buffer_metadata`` is added.
        manifest: additional entries for ``manifest.json``.
        extra_files: files copied into the folder, such as a tokenizer.
        device_tensors: methods of the ``.pte`` take and return tensors in GPU memory; otherwise the program copies them
            from and to host memory.
        compiled: files of methods that :func:`compile_method` has compiled, by method; the others are compiled here
            (``pte`` only). The bytes are the same.
        progress: called with a short line at each stage.

    Raises:
        UnknownArchError: ``arch`` is not in the table.
        UsageError: the arguments do not fit together.
        ExportError: the output cannot be written, a tool is missing, a program cannot be compiled
            (:class:`LoweringError`), a file in ``compiled`` is damaged or does not belong to its program
            (:class:`PartError`), or the result failed its check.
    """
    output = Path(output_dir)
    target = find_arch(arch)
    constants = dict(constant_methods or {})
    parts = dict(compiled or {})
    check_request(programs, format, attention, constants, manifest or {})
    if parts and (format != "pte" or not parts.keys() <= programs.keys()):
        raise UsageError(f"compiled methods ({', '.join(parts)}) must be methods of the programs, and the format pte")
    check_surroundings(output, extra_files)
    programs = {name: plain_program(program, format) for name, program in programs.items()}
    check_programs(programs, format)
    for name, path in parts.items():
        check_part(path, method=name, arch=target.name, program=program_digest(programs[name], attention))
    check_free_space(output, _needed_bytes(programs) + _SPARE_BYTES)
    if format == "pte":
        constants.setdefault(MUTABLE_BUFFER_METADATA, mutable_buffer_metadata(programs))

    tell = progress or (lambda stage: None)
    # Describe methods before compiling, which may set guards on the programs' dynamic sizes.
    methods = {name: describe_method(program) for name, program in programs.items()}
    with atomic_folder(output) as (folder, scratch):
        restore_views = attention != "executorch"
        wrappers = itertools.count(1)

        def host_code(source: str) -> None:
            tell(Counted("compiling host code", next(wrappers), len(left)))

        left = [name for name in programs if name not in parts]
        tell(f"compiling {', '.join(left)} for {target.name}" if left else f"joining {', '.join(parts)}")
        with (
            plain_errors("compiling failed", output, format),
            cross_compile(
                target,
                scratch,
                format,
                restore_views,
                host_code,
                counter(progress, "compiling kernels"),
                answers={name: read_answer(path, scratch / f"{name}.so") for name, path in parts.items()},
            ),
        ):
            if format == "pte":
                written = write_pte(programs, folder, attention, constants, device_tensors)
            else:
                written = [write_pt2(next(iter(programs.values())), folder)]
        tell(
            "checking the result"
            if can_disassemble()
            else "checking the result (no objdump: AVX-512 is not looked for)"
        )
        with plain_errors("checking the result failed", output, format):
            if format == "pte":
                check_pte(folder, programs, target, attention)
            else:
                check_pt2(folder / PT2_NAME, target)
        tell("writing the manifest")
        with plain_errors("writing the output failed", output, format):
            for file in extra_files:
                shutil.copyfile(file, folder / Path(file).name)
            document = build_manifest(
                methods,
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


def _needed_bytes(programs: Mapping[str, ExportedProgram]) -> int:
    """Bytes that lowering writes for all parameters, buffers and constants; those that methods share count once.

    Each is in an intermediate file and in the result. One that is mapped from a file needs no intermediate file.
    """
    sizes: dict[str, int] = {}
    for program in programs.values():
        for name, value in {**program.state_dict, **program.constants}.items():
            if isinstance(value, torch.Tensor):
                copies = 1 if mapped_file(value.untyped_storage()) is not None else 2
                sizes[name] = copies * value.numel() * value.element_size()
    return sum(sizes.values())
