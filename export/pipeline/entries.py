"""Does an export in entries, each in a process of its own and on any machine: compile each method, then join them.

An entry that compiles reads the checkpoint's config and the names and shapes of its weights, and no value of a weight.
It traces all methods, because methods must agree on what is fused, and compiles one. The entry that joins does all that
an export does but compile.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from flashpte.export.common.errors import ExportError
from flashpte.export.common.options import ExportOptions, check_has_weights
from flashpte.export.files.plan_file import Entry, PlanFile
from flashpte.export.lowering import PartError, compile_method, find_arch
from flashpte.export.lowering.parts import build_versions, read_part, version_difference
from flashpte.export.lowering.preflight import check_surroundings, check_tools
from flashpte.export.pipeline.fused_products import rewrite_products
from flashpte.export.pipeline.plan import ExportPlan, plan_export
from flashpte.export.pipeline.programs import (
    ExportResult,
    Progress,
    arch_names,
    export_model,
    export_programs,
    replace_attention,
)


def plan_entries(options: ExportOptions, output_dir: Path, *, arch: str | Sequence[str] | None = None) -> PlanFile:
    """Divides an export to a ``.pte`` into entries, for :func:`~flashpte.export.files.plan_file.write_plan_file`.

    Args:
        options: what to export.
        output_dir: folder that the last entry writes.
        arch: as for :func:`~flashpte.export.pipeline.export_model`.

    Raises:
        UsageError, ExportError: as for :func:`~flashpte.export.pipeline.plan_export`, or a compiler is missing.
    """
    check_has_weights(options)
    check_tools()
    methods = tuple(method.name for method in plan_export(options).methods)
    return PlanFile(options, output_dir, arch_names(arch), methods, build_versions())


def part_path(parts: Path, entry: Entry) -> Path:
    """The file that an entry writes."""
    return parts / f"{entry.id}.zip"


def compile_entry(plan_file: PlanFile, id: str, parts: Path, *, progress: Progress | None = None) -> Path:
    """Compiles the method of one entry, without the weights' values, into ``parts``.

    Args:
        plan_file: the plan.
        id: the entry's id.
        parts: folder for the parts of all entries; made if missing.
        progress: called with the name of each stage.

    Returns:
        The part's path. The file appears when all work is done.

    Raises:
        UsageError: the plan has no such entry.
        ExportError: versions differ from the plan's, or as for :func:`flashpte.export.lowering.compile_method`.
    """
    entry = plan_file.entry(id)
    _check_versions(plan_file)
    check_tools()
    _check_writable(parts)
    find_arch(entry.arch)
    plan = _plan_again(plan_file)
    programs = export_programs(plan, trace_only=True, progress=progress)
    if plan.options.attention == "flashpte":
        programs, _, _ = rewrite_products(programs, progress=progress, only=(entry.method,), values=False)
        programs, _ = replace_attention({entry.method: programs[entry.method]}, progress, plan.kept_attention)
    return compile_method(
        entry.method,
        programs[entry.method],
        output=part_path(parts, entry),
        arch=entry.arch,
        attention=plan.options.attention,
        plan=plan_file.digest,
        progress=progress,
    )


def join_entries(plan_file: PlanFile, parts: Path, *, progress: Progress | None = None) -> ExportResult:
    """Does the rest of an export whose methods are compiled; the files are those of one ``export_model``.

    Args:
        plan_file: the plan.
        parts: folder with the parts of all entries.
        progress: called with the name of each stage.

    Raises:
        PartError: parts are missing, damaged, or of another plan or program; the text names them in one line.
        ExportError: versions differ from the plan's, or as for :func:`~flashpte.export.pipeline.export_model`.
    """
    _check_versions(plan_file)
    missing = [entry.id for entry in plan_file.entries if not part_path(parts, entry).exists()]
    if missing:
        count = f"{len(missing)} of {len(plan_file.entries)}"
        raise PartError(f"{count} parts are missing in {parts}: run the entries {', '.join(missing)} first")
    compiled: dict[str, dict[str, Path]] = {arch: {} for arch in plan_file.arches}
    for entry in plan_file.entries:
        path = part_path(parts, entry)
        if read_part(path).plan != plan_file.digest:
            raise PartError(f"{path} belongs to another plan: run the entry {entry.id} of this one again")
        compiled[entry.arch][entry.method] = path
    plan = _plan_again(plan_file)
    check_surroundings(plan_file.output_dir, plan.extra_files)
    return export_model(plan, plan_file.output_dir, arch=plan_file.arches, compiled=compiled, progress=progress)


def _plan_again(plan_file: PlanFile) -> ExportPlan:
    plan = plan_export(plan_file.options)
    methods = tuple(method.name for method in plan.methods)
    if methods != plan_file.methods:
        planned = ", ".join(plan_file.methods)
        raise ExportError(f"the model has the methods {', '.join(methods)}, not {planned} of the plan: plan it again")
    return plan


def _check_versions(plan_file: PlanFile) -> None:
    if (difference := version_difference(plan_file.versions)) is not None:
        raise ExportError(f"the plan is for other versions ({difference}): install the same, or plan again")


def _check_writable(folder: Path) -> None:
    found = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not found.is_dir() or not os.access(found, os.W_OK | os.X_OK):
        raise ExportError(f"cannot write into {found}: not a folder, or no permission")
