"""The entry point of lowering: compiles exported programs and writes a folder with a model and its manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from flashpte.export.common.errors import ExportError
from flashpte.export.common.gc_tuning import fewer_collections
from flashpte.export.common.options import Attention, Format
from flashpte.export.common.progress import Counted, counter
from flashpte.export.files.manifest import build_manifest, describe_files, write_manifest
from flashpte.export.files.mapped_tensors import mapped_file
from flashpte.export.files.names import MANIFEST_NAME, PT2_NAME
from flashpte.export.files.output_folder import OutputError, atomic_folder, check_free_space
from flashpte.export.lowering.aot_inductor import write_pt2
from flashpte.export.lowering.cross_compile import cross_compile, find_arch
from flashpte.export.lowering.describe_methods import describe_method
from flashpte.export.lowering.executorch import (
    MUTABLE_BUFFER_METADATA,
    mutable_buffer_metadata,
    write_pte,
)
from flashpte.export.lowering.explain import explain, origin
from flashpte.export.lowering.preflight import check_programs, check_request, check_surroundings
from flashpte.export.lowering.self_check import can_disassemble, check_pt2, check_pte
from flashpte.passes.graph.subclasses import unwrap_weights

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
        progress: called with a short line at each stage.

    Raises:
        UnknownArchError: ``arch`` is not in the table.
        UsageError: the arguments do not fit together.
        ExportError: the output cannot be written, a tool is missing, a program cannot be compiled
            (:class:`LoweringError`), or the result failed its check.
    """
    output = Path(output_dir)
    target = find_arch(arch)
    constants = dict(constant_methods or {})
    check_request(programs, format, attention, constants, manifest or {})
    check_surroundings(output, extra_files)
    programs = {name: unwrap_weights(program) for name, program in programs.items()}
    check_programs(programs, format)
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
            tell(Counted("compiling host code", next(wrappers), len(programs)))

        tell(f"compiling {', '.join(programs)} for {target.name}")
        with (
            _plain_errors("compiling failed", output, format),
            cross_compile(target, scratch, format, restore_views, host_code, counter(progress, "compiling kernels")),
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
        with _plain_errors("checking the result failed", output, format):
            if format == "pte":
                check_pte(folder, programs, target, attention)
            else:
                check_pt2(folder / PT2_NAME, target)
        tell("writing the manifest")
        with _plain_errors("writing the output failed", output, format):
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


_ERROR_LINE = re.compile(r"\berror: |multiple definition|undefined reference|cannot find")


class LoweringError(ExportError):
    """A program could not be compiled; ``__cause__`` is the compiler's own error."""


@contextlib.contextmanager
def _plain_errors(what: str, output: Path, package: str) -> Iterator[None]:
    """Turns an error of a compiler or of the disk into one line, with the original as its cause."""
    handled = sys.exception()  # an exception that the caller already handles is not a cause of ours
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        chain = list(_chain(error, handled))
        if any(map(_is_full_disk, chain)):
            raise OutputError(f"disk full at {_full_folder(chain, output.absolute().parent)}") from error
        for inner in chain:  # one of our errors, wrapped by a compiler
            if isinstance(inner, ExportError):
                if inner is error:
                    raise
                raise inner from error
        if (meaning := explain(chain, package)) is not None:
            raise LoweringError(f"{what}: {meaning}") from error
        raise LoweringError(f"{what}: {type(error).__name__}: {_summary(str(error)) or origin(error)}") from error


def _chain(error: BaseException, handled: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, up to ``handled``."""
    seen: set[int] = {id(handled)}
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop(0)
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            yield current
            waiting += [getattr(current, "inner_exception", None), current.__cause__, current.__context__]


_FULL_DISK = os.strerror(errno.ENOSPC)


def _is_full_disk(error: BaseException) -> bool:
    said = (str(error), *(str(getattr(error, name, "")) for name in ("stderr", "output")))
    return getattr(error, "errno", None) == errno.ENOSPC or any(_FULL_DISK in text for text in said)


def _full_folder(chain: Sequence[BaseException], parent: Path) -> str:
    """Names the disk that is full: that of the temporary folder, where compilers write, or of the output's parent."""
    said = " ".join(f"{error} {getattr(error, 'filename', '')}" for error in chain)
    temporary = tempfile.gettempdir()
    return temporary if str(parent) not in said and f"{temporary}/" in said else str(parent)


def _summary(message: str) -> str:
    """Shortens a compiler's message to one line: its lines that report errors, or else its first ones."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR_LINE.search(line)]
    return " ".join((errors or lines)[:3])[:400]


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
