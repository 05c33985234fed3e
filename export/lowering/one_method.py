"""Compiles one method and saves it, so that the methods of a program can be compiled on several machines."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.export import ExportedProgram

from flashpte.export.common.gc_tuning import fewer_collections
from flashpte.export.common.options import Attention
from flashpte.export.common.progress import Counted, counter
from flashpte.export.files.output_folder import folder_beside
from flashpte.export.lowering.cross_compile import cross_compile, find_arch
from flashpte.export.lowering.cross_compile.answers import Answer
from flashpte.export.lowering.cross_compile.methods import MethodKept
from flashpte.export.lowering.executorch import write_pte
from flashpte.export.lowering.parts import Part, build_versions, write_part
from flashpte.export.lowering.plain_errors import LoweringError, plain_errors
from flashpte.export.lowering.preflight import check_programs, check_request, check_tools
from flashpte.export.lowering.prepare import plain_program
from flashpte.export.lowering.program_digest import program_digest


@fewer_collections()
def compile_method(
    method: str,
    program: ExportedProgram,
    *,
    output: Path | str,
    arch: str | None = None,
    attention: Attention = "flashpte",
    plan: str = "",
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Compiles one method of a ``.pte`` and writes a file for :func:`~flashpte.export.lowering.lower`'s ``compiled``.

    The file holds no weights, and the weights' values are not read: a program that was traced over uninitialized memory
    gives the same file. Only its shapes, dtypes and constants count.

    Args:
        method: the method's name.
        program: the method, as for ``lower``.
        output: the file to write. It appears when all work is done and replaces an earlier one.
        arch: as for ``lower``.
        attention: as for ``lower``.
        plan: kept in the file for the caller (:attr:`.Part.plan`).
        progress: called with a short line at each stage.

    Returns:
        The file's path.

    Raises:
        UnknownArchError: ``arch`` is not in the table.
        UsageError: the arguments do not fit together.
        ExportError: the file cannot be written, a tool is missing, or the program cannot be compiled
            (:class:`LoweringError`).
    """
    path = Path(output)
    target = find_arch(arch)
    check_request({method: program}, "pte", attention, {}, {})
    check_tools()
    program = plain_program(program, "pte")
    check_programs({method: program}, "pte")
    # Before compiling, which may set guards on the program's dynamic sizes.
    part = Part(method, target.name, program_digest(program, attention), plan, build_versions())

    saved = False

    def save(answer: Answer) -> None:
        nonlocal saved
        write_part(path, part, answer)
        saved = True

    def host_code(source: str) -> None:
        tell(Counted("compiling host code", 1, 1))

    tell = progress or (lambda stage: None)
    tell(f"compiling {method} for {target.name}")
    # The folder is on the local disk: many small files are slow on one that machines share.
    with folder_beside(Path(tempfile.gettempdir(), method)) as scratch, plain_errors("compiling failed", path, "pte"):
        restore_views, on_kernels = attention != "executorch", counter(progress, "compiling kernels")
        with (
            contextlib.suppress(MethodKept),
            cross_compile(target, scratch, "pte", restore_views, host_code, on_kernels, keep=save),
        ):
            write_pte({method: program}, scratch, attention, {})
    if not saved:
        raise LoweringError(f"compiling failed: method {method} computes nothing")
    return path
