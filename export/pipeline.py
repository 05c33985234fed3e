"""From a target and options to a lowered model, in stages that can be called one by one.

``plan_export`` -> ``export_programs`` -> ``replace_attention`` -> ``flashpte.export.lowering.lower``.
``export_model`` runs what follows the plan; ``preview_routing`` stops before weights are read and code is generated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import ExportedProgram

from flashpte.export.errors import ExportError, UsageError
from flashpte.export.garbage import fewer_collections
from flashpte.export.lengths import (
    check_cache_size,
    check_verify_window,
    forward_bound,
    prefill_chunk,
    sequence_length,
)
from flashpte.export.models.caches import KVCache
from flashpte.export.models.eagle3_methods import draft_constants, export_with_draft
from flashpte.export.models.eagle3_plan import DraftPlan, plan_draft
from flashpte.export.models.methods import (
    MIN_PREFILL_CHUNK,
    MethodSpec,
    constant_methods,
    export_method,
    plan_methods,
)
from flashpte.export.models.registry import TargetSpec, get_target, targets_for
from flashpte.export.models.source import ModelFacts, cut_layers, decoder_layers, describe
from flashpte.export.options import DTYPE_NAMES, TARGET_VERIFY, ExportOptions, Format
from flashpte.export.weights.folder import check_token_ids, read_config, read_json, read_token_ids, tokenizer_files
from flashpte.export.weights.random import fill_random, fill_uninitialised
from flashpte.export.weights.safetensors import Checkpoint, check_tensors, load_checkpoint

if TYPE_CHECKING:
    from flashpte.export.lowering import LoweredModel
    from flashpte.passes import RoutingReport

Progress = Callable[[str], None]

DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """A model on the meta device and everything that is decided before its weights are read.

    Attributes:
        options: what was asked for.
        model: the causal language model; its weights are on the meta device until :func:`export_programs`.
        facts: its sizes and token ids.
        config: fields of the config that the model was built from.
        total_layers: layers before ``options.layers`` cut them.
        max_seq_len: positions that the caches hold.
        methods: the methods to export.
        checkpoint: the opened checkpoint, its tensors checked against the model by name and shape.
        draft: the draft head, likewise; ``None`` without one.
    """

    options: ExportOptions
    model: nn.Module
    facts: ModelFacts
    config: Mapping[str, Any]
    total_layers: int
    max_seq_len: int
    methods: tuple[MethodSpec, ...]
    checkpoint: Checkpoint | None
    draft: DraftPlan | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, caches and logits."""
        return DTYPES[self.options.dtype]

    @property
    def constant_methods(self) -> dict[str, Any]:
        """See :func:`flashpte.export.models.methods.constant_methods`, and ``draft_constants`` for those of a draft."""
        values = constant_methods(
            self.methods,
            max_seq_len=self.max_seq_len,
            vocab_size=self.facts.vocab_size,
            bos_id=self.facts.bos_id,
            eos_ids=self.facts.eos_ids,
        )
        return values if self.draft is None else {**values, **draft_constants(self.draft, self.methods)}

    @property
    def kept_attention(self) -> tuple[str, ...]:
        """Methods whose attention is left to plain arithmetic, for comparisons."""
        return () if self.options.midm_sdpa else (TARGET_VERIFY,)

    @property
    def extra_files(self) -> tuple[Path, ...]:
        """Files of the checkpoint to copy beside the model."""
        return () if self.options.checkpoint is None else tuple(tokenizer_files(self.options.checkpoint))

    def manifest(self) -> dict[str, Any]:
        """What manifest.json says about the model; holds no path, so equal exports have equal manifests."""
        options = self.options
        weights: Any = None
        if self.checkpoint is not None:
            weights = "checkpoint"
        elif options.random_seed is not None:
            weights = {"random_seed": options.random_seed}
        manifest = {
            "target": options.target,
            "model": {
                "class": type(self.model).__name__,
                "layers": len(self.facts.attention),
                "total_layers": self.total_layers,
                "dtype": options.dtype,
                "max_seq_len": self.max_seq_len,
                "sliding_window": self.facts.window,
                "config": dict(self.config),
            },
            "weights": weights,
            "tokenizer": [path.name for path in self.extra_files],
        }
        return manifest if self.draft is None else {**manifest, "draft": self.draft.manifest()}


def plan_export(options: ExportOptions) -> ExportPlan:
    """Builds the model without memory for its weights and checks everything that needs none.

    Raises:
        UsageError: an option is unknown, out of the model's range, or conflicts with another.
        ExportError: the config or the checkpoint is missing, broken, or does not fit the target.
    """
    spec = get_target(options.target)
    if options.dtype not in DTYPES:
        raise UsageError(f"unknown dtype {options.dtype!r}; known: {', '.join(DTYPES)}")
    if options.checkpoint is not None and (options.config or options.small or options.random_seed is not None):
        raise UsageError("a checkpoint brings its own config and weights: leave out config, small and random_seed")
    if options.config is not None and options.small:
        raise UsageError("config and small both name a size")
    config = _config_fields(spec, options)
    model = spec.build(config)
    total_layers = len(decoder_layers(model))
    if options.layers is not None:
        cut_layers(model, options.layers)
    facts = describe(model)
    if options.checkpoint is not None:
        facts = _with_token_ids(facts, read_token_ids(options.checkpoint))
    max_seq_len = sequence_length(spec, options, facts)
    draft = plan_draft(options, spec, facts)
    bound, reason = forward_bound(spec, facts, max_seq_len, draft)
    chunk = prefill_chunk(spec, options, facts, bound, reason)
    window = options.verify_window if draft is None else draft.chain + 1
    check_verify_window(spec, options, window, bound, reason)
    caches = facts.attention if draft is None else (*facts.attention, draft.head.attention)
    check_cache_size(caches, max_seq_len, DTYPES[options.dtype])
    checkpoint = None
    if options.checkpoint is not None:
        checkpoint = Checkpoint(options.checkpoint)
        check_tensors(checkpoint, model, total_layers)
    methods = plan_methods(
        chunk,
        window,
        options.method,
        min_prefill_chunk=max(MIN_PREFILL_CHUNK, spec.min_forward),
        decode=spec.min_forward == 1 and (draft is None or options.with_decode),
        draft=draft is not None,
    )
    return ExportPlan(options, model, facts, config, total_layers, max_seq_len, methods, checkpoint, draft)


def _config_fields(spec: TargetSpec, options: ExportOptions) -> Mapping[str, Any]:
    if options.checkpoint is not None:
        if not options.checkpoint.is_dir():
            raise ExportError(f"checkpoint {options.checkpoint} is not an existing folder")
        fields, origin = read_config(options.checkpoint), options.checkpoint / "config.json"
    elif options.config is not None:
        fields, origin = read_json(options.config, "model config"), options.config
    else:
        chosen = spec.small_config if options.small else spec.config
        if chosen is None:
            size = "small" if options.small else "default"
            raise UsageError(f"target {spec.name} has no {size} model: give --checkpoint DIR or --config FILE")
        return chosen
    check_token_ids(fields, origin)
    model_type = fields.get("model_type")
    if model_type not in spec.model_types:
        others = targets_for(str(model_type))
        hint = f"; use --target {others[0]}" if others else ""
        raise ExportError(
            f"{origin} has model_type {model_type!r}, target {spec.name} exports {', '.join(spec.model_types)}{hint}"
        )
    return fields


def _with_token_ids(facts: ModelFacts, ids: Mapping[str, Any]) -> ModelFacts:
    eos = ids.get("eos_token_id", facts.eos_ids)
    return dataclasses.replace(
        facts,
        bos_id=ids.get("bos_token_id", facts.bos_id),
        eos_ids=(eos,) if isinstance(eos, int) else tuple(eos),
    )


def load_weights(plan: ExportPlan) -> None:
    """Gives the plan's model its weights: the checkpoint's, random ones, or (to trace only) uninitialised memory."""
    if plan.checkpoint is not None:
        load_checkpoint(plan.checkpoint, plan.model, plan.total_layers, plan.dtype)
    elif plan.options.random_seed is not None:
        fill_random(plan.model, plan.dtype, plan.options.random_seed)
    else:
        fill_uninitialised(plan.model, plan.dtype)
    if plan.draft is not None:
        plan.draft.load_weights(plan.dtype, plan.options.random_seed)


@fewer_collections()
def export_programs(
    plan: ExportPlan, *, trace_only: bool = False, progress: Progress | None = None
) -> dict[str, ExportedProgram]:
    """Exports the plan's methods; programs share weights and caches by name and by memory.

    Args:
        plan: from :func:`plan_export`.
        trace_only: leave the weights uninitialised: graphs are right, results are not.
        progress: called with the name of each stage.

    Returns:
        Programs by method name, in the plan's order.
    """
    report = progress or (lambda stage: None)
    if trace_only:
        fill_uninitialised(plan.model, plan.dtype)
        if plan.draft is not None:
            plan.draft.fill_uninitialised(plan.dtype)
    else:
        report("load weights")
        load_weights(plan)
    cache = KVCache(plan.facts.attention, plan.max_seq_len, plan.dtype)
    export: Callable[[MethodSpec], ExportedProgram] = functools.partial(export_method, plan.model, cache)
    if plan.draft is not None:
        draft_cache = KVCache([plan.draft.head.attention], plan.max_seq_len, plan.dtype)
        export = functools.partial(export_with_draft, plan.model, cache, plan.draft, draft_cache)
    programs = {}
    for method in plan.methods:
        report(f"export {method.name}")
        programs[method.name] = export(method)
    return programs


def replace_attention(
    programs: Mapping[str, ExportedProgram], progress: Progress | None = None, keep: Collection[str] = ()
) -> tuple[dict[str, ExportedProgram], dict[str, RoutingReport]]:
    """Runs :func:`flashpte.passes.replace_sdpa` on every program; the input is left as it was.

    Args:
        programs: methods by name.
        progress: called with the name of each stage.
        keep: methods to hand on as they are; they are not in the reports.
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
    """What the replace pass does to each method of a plan; reads no weights and writes nothing."""
    programs = export_programs(plan, trace_only=True, progress=progress)
    return replace_attention(programs, progress, plan.kept_attention)[1]


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What :func:`export_model` leaves behind: the lowered files and, by method, what the pass did."""

    lowered: LoweredModel
    reports: dict[str, RoutingReport]


def export_model(
    plan: ExportPlan,
    output_dir: Path,
    *,
    arch: str | None = None,
    format: Format = "pte",
    progress: Progress | None = None,
) -> ExportResult:
    """Exports, replaces and lowers; ``export-model --help`` describes the same for a command line.

    Args:
        plan: from :func:`plan_export`, with a checkpoint or a random seed.
        output_dir: folder to make; it appears when everything in it is complete.
        arch: GPU architecture (``sm_90``); ``None`` for the local GPU's, else ``sm_90``.
        format: ``"pte"``, or ``"pt2"`` for one method as a plain AOTInductor package.
        progress: called with the name of each stage.

    Raises:
        UsageError: the plan has no weights, or the format cannot hold its methods.
        ExportError: reading, exporting or writing failed.
    """
    from flashpte.export.lowering import lower
    from flashpte.export.lowering.preflight import check_surroundings

    if plan.checkpoint is None and plan.options.random_seed is None:
        raise UsageError("no weights: give --checkpoint DIR or --random-weights")
    check_surroundings(output_dir, plan.extra_files)  # lower asks again, but minutes from now
    programs = export_programs(plan, progress=progress)
    reports: dict[str, RoutingReport] = {}
    if plan.options.attention == "flashpte":
        programs, reports = replace_attention(programs, progress, plan.kept_attention)
    manifest = plan.manifest()
    manifest["routing"] = {name: report.to_dict() for name, report in reports.items()}
    lowered = lower(
        programs,
        output_dir=output_dir,
        arch=arch,
        format=format,
        attention=plan.options.attention,
        constant_methods=plan.constant_methods,
        manifest=manifest,
        extra_files=plan.extra_files,
        progress=progress,
    )
    return ExportResult(lowered, reports)
