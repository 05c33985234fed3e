"""Turns a plan into a lowered model, in stages that can be called one by one.

``plan_export`` -> ``export_programs`` -> ``rewrite_products`` -> ``replace_attention`` ->
``flashpte.export.lowering.lower``.
``export_model`` runs all stages after the plan; ``preview_routing`` reads no weights and generates no code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch.export import ExportedProgram

from flashpte.export.common.gc_tuning import fewer_collections
from flashpte.export.common.options import Format, check_has_weights
from flashpte.export.common.progress import GIGABYTES, counter
from flashpte.export.files.mapped_tensors import MappedZeros
from flashpte.export.files.output_folder import check_free_space, folder_beside
from flashpte.export.models.eagle3_methods import export_with_draft
from flashpte.export.models.methods import MethodSpec, export_method
from flashpte.export.models.runner_methods import export_for_runner
from flashpte.export.pipeline.fused_products import rewrite_products
from flashpte.export.pipeline.plan import ExportPlan
from flashpte.export.pipeline.work import product_work
from flashpte.export.state.model_state import ModelState
from flashpte.export.weights.recipe import fill_weights, weight_bytes

if TYPE_CHECKING:
    from flashpte.export.lowering import LoweredModel
    from flashpte.passes import RoutingReport

Progress = Callable[[str], None]


def load_weights(plan: ExportPlan, folder: Path | None = None, progress: Progress | None = None) -> None:
    """Gives the plan's model its weights: the checkpoint's, random ones, or (only for tracing) uninitialized memory.

    Args:
        plan: from :func:`plan_export`.
        folder: an empty folder for the weights' bytes, which are then not in memory (:func:`.fill_weights`).
        progress: called every second with a line that says how far it is (:class:`~.progress.Counted`).
    """
    fill_weights(plan.model, plan.weights, plan.source, folder, counter(progress, "load weights", GIGABYTES))
    if plan.draft is not None:
        plan.draft.load_weights(plan.dtype, plan.options.random_seed)


@fewer_collections()
def export_programs(
    plan: ExportPlan,
    *,
    trace_only: bool = False,
    weights_folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, ExportedProgram]:
    """Exports the plan's methods; programs share weights and caches by name and by memory.

    Args:
        plan: from :func:`plan_export`.
        trace_only: leave the weights uninitialized; the graphs are right, but their results are not.
        weights_folder: an empty folder for the bytes of weights and states, which must stay as long as the programs.
        progress: called with the name of each stage.

    Returns:
        Programs by method name, in the plan's order.
    """
    report = progress or (lambda stage: None)
    if trace_only:
        fill_weights(plan.model, plan.weights, None)
        if plan.draft is not None:
            plan.draft.fill_uninitialised(plan.dtype)
    else:
        report("load weights")
        load_weights(plan, weights_folder, report)
    zeros = MappedZeros(weights_folder) if weights_folder is not None else None
    cache = ModelState(plan.facts.states, plan.max_seq_len, plan.dtype, zeros)
    export: Callable[[MethodSpec], ExportedProgram] = functools.partial(export_method, plan.model, cache)
    if plan.runner is not None:
        export = functools.partial(export_for_runner, plan.runner, plan.model, cache)
    if plan.draft is not None:
        draft_cache = ModelState([plan.draft.head.attention], plan.max_seq_len, plan.dtype)
        export = functools.partial(export_with_draft, plan.model, cache, plan.draft, draft_cache)
    programs = {}
    for method in plan.methods:
        report(f"export {method.name}")
        programs[method.name] = export(method)
    return programs


def replace_attention(
    programs: Mapping[str, ExportedProgram], progress: Progress | None = None, keep: Collection[str] = ()
) -> tuple[dict[str, ExportedProgram], dict[str, RoutingReport]]:
    """Runs :func:`flashpte.passes.replace_sdpa` on every program; does not change the input programs.

    Args:
        programs: methods by name.
        progress: called with the name of each stage.
        keep: methods to return unchanged, without a report.

    Returns:
        The new programs and the routing reports, by method.
    """
    from flashpte.passes import replace_sdpa

    replaced, reports = {}, {}
    for name, program in programs.items():
        if name in keep:
            replaced[name] = program
            continue
        if progress is not None:
            progress(f"replace attention in {name}")
        replaced[name], reports[name] = replace_sdpa(program)
    return replaced, reports


def preview_routing(plan: ExportPlan, *, progress: Progress | None = None) -> dict[str, RoutingReport]:
    """Routing reports of the replace pass for each method of a plan; reads no weights and writes nothing."""
    programs = export_programs(plan, trace_only=True, progress=progress)
    return replace_attention(programs, progress, plan.kept_attention)[1]


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """The result of :func:`export_model`.

    Attributes:
        plan: what was exported.
        lowered: the lowered files, one for each architecture.
        reports: the reports of the replace pass, by method.
    """

    plan: ExportPlan
    lowered: tuple[LoweredModel, ...]
    reports: dict[str, RoutingReport]


def arch_names(arch: str | Sequence[str] | None) -> tuple[str, ...]:
    """The architectures that :func:`export_model` compiles for.

    Raises:
        UnknownArchError: one is not in the table.
    """
    from flashpte.export.lowering import find_arch

    return tuple(find_arch(name).name for name in ([arch] if arch is None or isinstance(arch, str) else arch))


def export_model(
    plan: ExportPlan,
    output_dir: Path,
    *,
    arch: str | Sequence[str] | None = None,
    format: Format = "pte",
    compiled: Mapping[str, Mapping[str, Path]] | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Exports the programs, replaces attention and lowers them; ``export-model --help`` describes the command line.

    Args:
        plan: from :func:`plan_export`, with a checkpoint or a random seed.
        output_dir: folder to write; it appears when everything in it is complete.
        arch: GPU architecture (``sm_90``); ``None`` for the local GPU's, or ``sm_90`` without a GPU. Several get a
            folder each, ``output_dir/sm_80`` and so on, with weights that are stored once.
        format: ``"pte"``, or ``"pt2"`` for one method as a plain AOTInductor package.
        compiled: files of methods that are compiled already, by architecture and method (:mod:`.entries`).
        progress: called with the name of each stage.

    Raises:
        UsageError: the plan has no weights, or the format cannot hold its methods.
        ExportError: reading, exporting or writing failed.
    """
    from flashpte.export.lowering import lower
    from flashpte.export.lowering.preflight import check_surroundings
    from flashpte.export.lowering.several_arches import lower_for_each

    check_has_weights(plan.options)
    check_surroundings(output_dir, plan.extra_files)  # ``lower`` checks again, but only minutes later
    arches = arch_names(arch)
    # The weights' files, then the results.
    check_free_space(output_dir, (1 + len(arches)) * weight_bytes(plan.weights))
    with folder_beside(output_dir) as folder:
        programs = export_programs(plan, weights_folder=folder, progress=progress)
        manifest = plan.manifest()
        reports: dict[str, RoutingReport] = {}
        if plan.options.attention == "flashpte":
            programs, products, manifest["fused_weights"] = rewrite_products(programs, folder, progress)
            manifest["products"] = {
                method: {rewrite: report.to_dict() for rewrite, report in each.items()}
                for method, each in products.items()
            }
            programs, reports = replace_attention(programs, progress, plan.kept_attention)
        manifest["work"] = {name: product_work(program) for name, program in programs.items()}
        manifest["routing"] = {name: report.to_dict() for name, report in reports.items()}

        def lower_one(name: str, folder: Path, progress: Progress | None) -> LoweredModel:
            return lower(
                programs,
                output_dir=folder,
                arch=name,
                format=format,
                attention=plan.options.attention,
                constant_methods=plan.constant_methods,
                manifest=manifest,
                extra_files=plan.extra_files,
                device_tensors=plan.runner is not None and plan.runner.device_tensors,
                compiled=(compiled or {}).get(name),
                progress=progress,
            )

        lowered: tuple[LoweredModel, ...]
        if len(arches) == 1:
            lowered = (lower_one(arches[0], output_dir, progress),)
        else:
            lowered = lower_for_each(lower_one, arches, output_dir, progress, len(programs))
    return ExportResult(plan, lowered, reports)
