"""From a target and options to a lowered model, in stages that can be called one by one.

``plan_export`` -> ``export_programs`` -> ``replace_attention`` -> ``flashpte.export.lowering.lower``.
``export_model`` runs what follows the plan; ``preview_routing`` stops before weights are read and code is generated.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import ExportedProgram

from flashpte.export.errors import ExportError, UsageError
from flashpte.export.models.caches import KVCache, cache_bytes
from flashpte.export.models.methods import MethodSpec, constant_methods, export_method, plan_methods
from flashpte.export.models.registry import TargetSpec, get_target, targets_for
from flashpte.export.models.source import ModelFacts, cut_layers, decoder_layers, describe
from flashpte.export.options import DEFAULT_PREFILL_CHUNK, DTYPE_NAMES, VERIFY_WINDOW_RANGE, ExportOptions, Format
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
    """

    options: ExportOptions
    model: nn.Module
    facts: ModelFacts
    config: Mapping[str, Any]
    total_layers: int
    max_seq_len: int
    methods: tuple[MethodSpec, ...]
    checkpoint: Checkpoint | None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, caches and logits."""
        return DTYPES[self.options.dtype]

    @property
    def constant_methods(self) -> dict[str, Any]:
        """See :func:`flashpte.export.models.methods.constant_methods`."""
        return constant_methods(
            self.methods,
            max_seq_len=self.max_seq_len,
            vocab_size=self.facts.vocab_size,
            bos_id=self.facts.bos_id,
            eos_ids=self.facts.eos_ids,
        )

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
        return {
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
    max_seq_len = _sequence_length(spec, options, facts)
    chunk = _prefill_chunk(options, facts, max_seq_len)
    _check_verify_window(options, facts, max_seq_len)
    _check_cache_size(facts, max_seq_len, DTYPES[options.dtype])
    checkpoint = None
    if options.checkpoint is not None:
        checkpoint = Checkpoint(options.checkpoint)
        check_tensors(checkpoint, model, total_layers)
    methods = plan_methods(chunk, options.verify_window, options.method)
    return ExportPlan(options, model, facts, config, total_layers, max_seq_len, methods, checkpoint)


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


def _sequence_length(spec: TargetSpec, options: ExportOptions, facts: ModelFacts) -> int:
    if options.max_seq_len is None:
        default = min(spec.small_max_seq_len if options.small else spec.max_seq_len, facts.max_positions)
        if default < 2:
            raise ExportError(f"target {spec.name} has a default length of {default}: give --max-seq-len, at least 2")
        return default
    if not 2 <= options.max_seq_len <= facts.max_positions:
        raise UsageError(f"--max-seq-len {options.max_seq_len}: must be 2..{facts.max_positions} for this model")
    return options.max_seq_len


def _check_cache_size(facts: ModelFacts, max_seq_len: int, dtype: torch.dtype) -> None:
    needed = cache_bytes(facts.attention, max_seq_len, dtype)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ExportError(
            f"--max-seq-len {max_seq_len}: the KV caches take {needed / 1e9:.1f} GB, "
            f"this machine has {memory / 1e9:.1f} GB of memory"
        )


def _prefill_chunk(options: ExportOptions, facts: ModelFacts, max_seq_len: int) -> int:
    limit = max_seq_len if facts.window is None else min(facts.window, max_seq_len)
    if limit < 2:
        raise ExportError(f"the model's sliding_window is {facts.window}, must be at least 2")
    chunk = options.max_prefill_chunk
    if chunk is None:
        return min(limit, DEFAULT_PREFILL_CHUNK) if facts.window is None else limit
    if not 2 <= chunk <= limit:
        bound = "the sequence length" if limit == max_seq_len else "the sliding window"
        raise UsageError(f"--max-prefill-chunk {chunk}: must be 2..{limit} ({bound})")
    return chunk


def _check_verify_window(options: ExportOptions, facts: ModelFacts, max_seq_len: int) -> None:
    window = options.verify_window
    if window is None:
        return
    low, high = VERIFY_WINDOW_RANGE
    if not low <= window <= high:
        raise UsageError(f"--verify-window {window}: must be {low}..{high}")
    if window > max_seq_len:
        raise UsageError(f"--verify-window {window}: must not exceed --max-seq-len {max_seq_len}")
    if facts.window is not None and window > facts.window:
        raise UsageError(f"--verify-window {window}: must not exceed the model's sliding window of {facts.window}")


def load_weights(plan: ExportPlan) -> None:
    """Gives the plan's model its weights: the checkpoint's, random ones, or (to trace only) uninitialised memory."""
    if plan.checkpoint is not None:
        load_checkpoint(plan.checkpoint, plan.model, plan.total_layers, plan.dtype)
    elif plan.options.random_seed is not None:
        fill_random(plan.model, plan.dtype, plan.options.random_seed)
    else:
        fill_uninitialised(plan.model, plan.dtype)


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
    else:
        report("load weights")
        load_weights(plan)
    cache = KVCache(plan.facts.attention, plan.max_seq_len, plan.dtype)
    programs = {}
    for method in plan.methods:
        report(f"export {method.name}")
        programs[method.name] = export_method(plan.model, cache, method)
    return programs


def replace_attention(
    programs: Mapping[str, ExportedProgram], progress: Progress | None = None
) -> tuple[dict[str, ExportedProgram], dict[str, RoutingReport]]:
    """Runs :func:`flashpte.passes.replace_sdpa` on every program; the input is left as it was."""
    from flashpte.passes import replace_sdpa

    replaced, reports = {}, {}
    for name, program in programs.items():
        if progress is not None:
            progress(f"replace attention in {name}")
        replaced[name], reports[name] = replace_sdpa(program)
    return replaced, reports


def preview_routing(plan: ExportPlan, *, progress: Progress | None = None) -> dict[str, RoutingReport]:
    """What the replace pass does to each method of a plan; reads no weights and writes nothing."""
    programs = export_programs(plan, trace_only=True, progress=progress)
    return replace_attention(programs, progress)[1]


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
        programs, reports = replace_attention(programs, progress)
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
