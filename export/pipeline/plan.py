"""Plans an export: builds the model without memory for its weights and makes all decisions before they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashpte.export.common.errors import ExportError, Option, UsageError, wanted
from flashpte.export.common.options import DTYPE_NAMES, TARGET_VERIFY, ExportOptions, check_options
from flashpte.export.files.tokenizer_json import describe_tokenizer_json
from flashpte.export.models.build import ModelFacts, attention_of, cut_layers, decoder_layers, describe
from flashpte.export.models.eagle3_methods import draft_constants
from flashpte.export.models.executorch_runners import RunnerContract, check_runner, find_runner
from flashpte.export.models.methods import MIN_PREFILL_CHUNK, MethodSpec, constant_methods, plan_methods
from flashpte.export.models.registry import TargetSpec, get_target, targets_for
from flashpte.export.models.rope import FixedRope, fix_rope
from flashpte.export.pipeline.draft_plan import DraftPlan, plan_draft
from flashpte.export.pipeline.lengths import (
    check_cache_size,
    check_verify_window,
    forward_bound,
    prefill_chunk,
    sequence_length,
)
from flashpte.export.pipeline.weight_rules import weight_rules
from flashpte.export.state.layer_state import DRAFT_PART, StateRules
from flashpte.export.state.model_state import DRAFT_STATE, TARGET_STATE, state_rules
from flashpte.export.weights.checkpoint_folder import check_token_ids, read_json
from flashpte.export.weights.origin import Origin, open_origin
from flashpte.export.weights.random import RandomWeights
from flashpte.export.weights.recipe import PlannedWeight, Recipe, WeightSource, formats_of, plan_weights, rules_of

DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """A model on the meta device and all decisions that precede reading its weights.

    Attributes:
        options: options of the export.
        model: the causal language model; its weights are on the meta device until :func:`export_programs`.
        facts: its sizes and token ids.
        config: fields of the config that the model was built from.
        total_layers: layers before ``options.layers`` cut them.
        max_seq_len: positions that the caches hold.
        methods: the methods to export.
        recipe: assigns a format to each weight.
        weights: the model's weights, each with its format.
        source: source of the weights: an opened checkpoint, already checked against the model by name and shape, or a
            seed; ``None`` for an export that can only be traced.
        origin: the folder or file that the model comes from; ``None`` for random weights.
        draft: plan of the draft head; ``None`` without one.
        runner: the runner of ExecuTorch that the file is for; ``None`` for ``run-model``.
        rope: RoPE whose frequencies were fixed for ``max_seq_len`` tokens.
    """

    options: ExportOptions
    model: nn.Module
    facts: ModelFacts
    config: Mapping[str, Any]
    total_layers: int
    max_seq_len: int
    methods: tuple[MethodSpec, ...]
    recipe: Recipe
    weights: tuple[PlannedWeight, ...]
    source: WeightSource | None
    origin: Origin | None = None
    draft: DraftPlan | None = None
    runner: RunnerContract | None = None
    rope: tuple[FixedRope, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations, caches, logits and all weights without a rule of their own."""
        return DTYPES[self.options.dtype]

    @property
    def constant_methods(self) -> dict[str, Any]:
        """Values of the constant methods; see ``methods.constant_methods`` and ``eagle3_methods.draft_constants``."""
        values = constant_methods(
            self.methods,
            max_seq_len=self.max_seq_len,
            vocab_size=self.facts.vocab_size,
            bos_id=self.facts.bos_id,
            eos_ids=self.facts.eos_ids,
            samples=self.runner is not None and self.runner.samples,
        )
        if self.runner is not None:
            values |= self.runner.constants(len(self.facts.states))
        return values if self.draft is None else {**values, **draft_constants(self.draft, self.methods)}

    @property
    def kept_attention(self) -> tuple[str, ...]:
        """Methods whose attention is left to plain arithmetic, for comparisons."""
        return () if self.options.midm_sdpa else (TARGET_VERIFY,)

    @property
    def states(self) -> tuple[StateRules, ...]:
        """Rules for the state of each layer; the draft's come last."""
        target = state_rules(self.facts.states, TARGET_STATE)
        return (
            target
            if self.draft is None
            else (*target, *state_rules([self.draft.head.attention], DRAFT_STATE, DRAFT_PART))
        )

    @property
    def extra_files(self) -> tuple[Path, ...]:
        """Files of the checkpoint to copy beside the model."""
        return () if self.origin is None else self.origin.tokenizer_files()

    @property
    def weight_notes(self) -> tuple[str, ...]:
        """What the weights of a quantized file became, in lines for people."""
        notes = getattr(self.source, "notes", None)
        return () if notes is None else notes()

    @property
    def model_notes(self) -> tuple[str, ...]:
        """What to know about the model, in lines for people."""
        notes = tuple(fixed.note for fixed in self.rope)
        tested, model_type = get_target(self.options.target).tested, self.config.get("model_type")
        if not tested or model_type in tested:
            return notes
        untested = f"no test compares {model_type} with transformers; run-model --check compares this export on a GPU"
        return (*notes, untested)

    def manifest(self) -> dict[str, Any]:
        """The model's entries in ``manifest.json``; they hold no path, so equal exports have equal manifests."""
        options = self.options
        weights: Any = None
        if self.origin is not None:
            weights = self.origin.option
        elif options.random_seed is not None:
            weights = {"random_seed": options.random_seed}
        manifest: dict[str, Any] = {
            "target": options.target,
            "model": {
                "class": type(self.model).__name__,
                "layers": len(self.facts.states),
                "total_layers": self.total_layers,
                "dtype": options.dtype,
                "max_seq_len": self.max_seq_len,
                "sliding_window": self.facts.window,
                "config": dict(self.config),
            },
            "weights": weights,
            "weight_formats": self.recipe.to_dict(),
            "states": [rules.to_dict() for rules in self.states],
            "tokenizer": [path.name for path in self.extra_files],
            "tokenizer_json": describe_tokenizer_json(self.extra_files),
        }
        if self.rope:
            manifest["fixed_rope"] = [dataclasses.asdict(fixed) for fixed in self.rope]
        if self.runner is not None:
            manifest["runner"] = self.runner.name
        return manifest if self.draft is None else {**manifest, "draft": self.draft.manifest()}


def plan_export(options: ExportOptions) -> ExportPlan:
    """Builds the model without memory for its weights and makes all checks that do not need the weights.

    Raises:
        UsageError: an option is unknown, out of the model's range, or conflicts with another.
        ExportError: the config or the checkpoint is missing, is broken, or does not fit the target.
    """
    spec = get_target(options.target)
    check_options(options)
    origin = open_origin(options.checkpoint, options.gguf_file)
    config = _config_fields(spec, options, origin)
    model = spec.build(config)
    total_layers = len(decoder_layers(model))
    chosen = weight_rules(model, options)
    if options.layers is not None:
        cut_layers(model, options.layers)
    facts = describe(model, spec.layer_state or attention_of)
    if origin is not None:
        facts = _with_token_ids(facts, origin.token_ids())
    max_seq_len = sequence_length(spec, options, facts)
    rope = fix_rope(model, max_seq_len)
    draft = plan_draft(options, spec, facts)
    bound, reason = forward_bound(spec, facts, max_seq_len, draft)
    runner = find_runner(options.runner, spec)
    if runner is not None:
        check_runner(runner, spec, facts.states, max_seq_len, bound)
    whole_context = runner is not None and runner.whole_context
    chunk = max_seq_len if whole_context else prefill_chunk(spec, options, facts, bound, reason)
    window = options.verify_window if draft is None else draft.chain + 1
    check_verify_window(spec, options, window, bound, reason)
    caches = facts.states if draft is None else (*facts.states, draft.head.attention)
    check_cache_size(caches, max_seq_len, DTYPES[options.dtype])
    source: WeightSource | None = None
    if origin is not None:
        source = origin.weights(model, total_layers)
    elif options.random_seed is not None:
        source = RandomWeights(model, DTYPES[options.dtype], options.random_seed)
    held = rules_of(formats_of(source), model.state_dict())
    if held:
        _check_not_quantized_again(options)
    recipe = Recipe(options.dtype, (*held, *spec.weight_formats, *chosen))
    weights = plan_weights(model, recipe)
    _check_draft_embedding(model, draft)
    methods = plan_methods(
        chunk,
        window,
        options.method,
        min_prefill_chunk=1 if whole_context else max(MIN_PREFILL_CHUNK, spec.min_forward),
        decode=spec.min_forward == 1 and (draft is None or options.with_decode),
        draft=draft is not None,
    )
    layers = (config, total_layers, max_seq_len)
    return ExportPlan(options, model, facts, *layers, methods, recipe, weights, source, origin, draft, runner, rope)


def _check_not_quantized_again(options: ExportOptions) -> None:
    for name in ("qlinear", "qhead", "qembedding", "qrecipe"):
        if (value := getattr(options, name)) is not None:
            raise UsageError(Option(name, value), ": the weights are quantized already, and stay as they are")


def _check_draft_embedding(model: nn.Module, draft: DraftPlan | None) -> None:
    untyped: Any = model
    if draft is None or draft.head.embed_tokens is not None:
        return
    if not isinstance(untyped.get_input_embeddings(), nn.Embedding):
        raise ExportError(
            "the draft reads the target's embedding, which must stay dense: ",
            "leave it out of ",
            Option("qembedding"),
            " and ",
            Option("qrecipe"),
        )


def _config_fields(spec: TargetSpec, options: ExportOptions, origin: Origin | None) -> Mapping[str, Any]:
    if origin is not None:
        fields, described_by = origin.config(), origin.described_by
    elif options.config is not None:
        fields, described_by = read_json(options.config, "model config"), options.config
    else:
        chosen = spec.small_config if options.small else spec.config
        if chosen is None:
            size = "small" if options.small else "default"
            raise UsageError(
                f"target {spec.name} has no {size} model: give ", wanted("checkpoint"), " or ", wanted("config")
            )
        return chosen
    check_token_ids(fields, described_by)
    model_type = fields.get("model_type")
    others = targets_for(str(model_type))
    if (spec.name in others) if spec.model_types is None else (model_type in spec.model_types):
        return fields
    served = "other models" if spec.model_types is None else ", ".join(spec.model_types)
    raise ExportError(
        f"{described_by} has model_type {model_type!r}, target {spec.name} exports {served}",
        *(("; use ", Option("target", others[0])) if others else ()),
    )


def _with_token_ids(facts: ModelFacts, ids: Mapping[str, Any]) -> ModelFacts:
    eos = ids.get("eos_token_id", facts.eos_ids)
    return dataclasses.replace(
        facts,
        bos_id=ids.get("bos_token_id", facts.bos_id),
        eos_ids=(eos,) if isinstance(eos, int) else tuple(eos),
    )
