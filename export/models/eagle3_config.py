"""Parses and checks the config of an EAGLE-3 draft head, from either family of checkpoints.

Two families of ``config.json`` are in use:

- *flat* (SafeAILab's EAGLE, SpecForge, ModelOpt): the fields of a Llama config at the top, with ``eagle_config``;
- *speculators* (vLLM's speculators library): ``speculators_model_type`` at the top, the layer's fields nested in
  ``transformer_layer_config``.

They hold the same information with different defaults and number the tapped layers differently. A field is used, or is
known not to matter when a draft runs, or must have the one value that is implemented. Any other field is refused by
name, because a draft that ignores a flag proposes nonsense.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flashpte.export.common.errors import ExportError

AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"

# model_type of the draft's layer -> transformers' config class; a qwen3 layer normalizes queries and keys per head
CONFIG_CLASSES = {"llama": "LlamaConfig", "qwen3": "Qwen3Config"}

_NORM_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")

_DRAFT_FIELDS = (*_NORM_FLAGS, AUX_LAYERS, "draft_vocab_size", "target_hidden_size", "tie_word_embeddings")

_LAYER_FIELDS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias", "max_position_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
)

_WINDOW_FIELDS = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")

# field -> the only value that is implemented
_FIXED: dict[str, Any] = {
    "num_hidden_layers": 1,
    "logit_scale": 1.0,
    "is_causal": True,
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "has_lm_head": True,
    "parallel_draft_step": 1,
    "partial_rotary_factor": 1.0,
}

# Training, bookkeeping and token ids, which do not affect what a draft computes.
_INERT = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout", "pretraining_tp"),
        *("chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "problem_type", "return_dict"),
        *("output_attentions", "output_hidden_states", "base_model_tp_plan", "base_model_pp_plan"),
        *("base_model_ep_plan", "has_no_defaults_at_init", "keys_to_ignore_at_inference", "is_decoder"),
        *("embed_requires_grad", "enable_sp_ulysses", "speculators_version", "target_model_type"),
        *("parallel_draft_heads_num_layers", "position_embedding_type", "model_type"),
    }
)

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """The config of an EAGLE-3 draft head, which says what it computes.

    Shape legend: C hidden size of the draft, C_t of the target, V target vocabulary, V_d draft vocabulary.

    Attributes:
        family: ``"speculators"``, ``"flat"``, or ``"random"`` for a random draft made to fit a target.
        model_type: ``llama`` or ``qwen3``, the kind of the draft's only layer.
        layer: fields of the transformers config of that layer.
        draft_vocab_size: V_d.
        target_hidden_size: C_t that the checkpoint was trained for; ``None`` for the draft's own hidden size.
        taps: the target's hidden states to fuse: 0 is the embedding, k the output of layer k - 1; ``None`` for the
            target's default.
        norm_before_residual: whether the residual is the normalized feature instead of the feature.
        norm_before_fc: whether one RMSNorm covers the concatenated taps before they are fused.
        fc_norm: whether each tap has its own RMSNorm before they are concatenated and fused.
        norm_output: whether the next step of the chain gets the feature after the last norm instead of before it.
        tie_word_embeddings: whether the embedding replaces a missing output projection.
        window: sliding window of the draft's attention in tokens; ``None`` for full attention.
    """

    family: str
    model_type: str
    layer: Mapping[str, Any]
    draft_vocab_size: int
    target_hidden_size: int | None = None
    taps: tuple[int, ...] | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    tie_word_embeddings: bool = False
    window: int | None = None

    @property
    def manifest(self) -> dict[str, Any]:
        """JSON-ready summary for ``manifest.json``."""
        flags = {name: getattr(self, name) for name in _NORM_FLAGS}
        return {"family": self.family, "model_type": self.model_type, "vocab_size": self.draft_vocab_size, **flags}


def parse_draft_config(fields: Mapping[str, Any], origin: Path) -> DraftConfig:
    """Reads the config of a draft head of either family.

    Args:
        fields: contents of the ``config.json``.
        origin: path of that file, for errors.

    Raises:
        ExportError: a field is missing, unknown, wrong or not implemented; the text names it.
    """
    if "speculators_model_type" in fields or "transformer_layer_config" in fields:
        return _parse_speculators(fields, origin)
    return _parse_flat(fields, origin)


def _parse_speculators(fields: Mapping[str, Any], origin: Path) -> DraftConfig:
    if (kind := fields.get("speculators_model_type")) != "eagle3":
        raise ExportError(f"{origin}: speculators_model_type is {kind!r}; only eagle3 drafts are exported")
    layer = _mapping(fields, "transformer_layer_config", origin)
    proposal = _mapping(fields, "speculators_config", origin)
    if (algorithm := proposal.get("algorithm", "eagle3")) != "eagle3":
        raise ExportError(f"{origin}: speculators_config names the algorithm {algorithm!r}, must be eagle3")
    nested = ("speculators_model_type", "transformer_layer_config", "speculators_config")
    _check_fields(fields, {*_DRAFT_FIELDS, *nested}, origin)
    _check_fields(layer, {*_LAYER_FIELDS, *_WINDOW_FIELDS, "tie_word_embeddings"}, origin, "transformer_layer_config.")
    if fields.get("norm_before_residual") is None:
        # a missing flag means false in speculators and true in vLLM
        raise ExportError(f"{origin} does not say norm_before_residual, which changes what the draft computes; add it")
    tied = {"tie_word_embeddings": _flag(fields, "tie_word_embeddings", origin) or layer.get("tie_word_embeddings")}
    return _build("speculators", layer, {**fields, **tied}, _layer_ids(fields, origin), origin)


def _parse_flat(fields: Mapping[str, Any], origin: Path) -> DraftConfig:
    eagle = _mapping(fields, "eagle_config", origin)
    _check_fields(fields, {*_DRAFT_FIELDS, *_LAYER_FIELDS, *_WINDOW_FIELDS, "eagle_config"}, origin)
    _check_fields(eagle, {AUX_LAYERS, *_NORM_FLAGS}, origin, "eagle_config.")
    flags = dict(fields)
    for name in _NORM_FLAGS:
        if eagle.get(name) is not None:
            if fields.get(name) not in (None, eagle[name]):
                raise ExportError(f"{origin}: {name} and eagle_config.{name} contradict each other")
            flags[name] = eagle[name]
    taps = _layer_ids(fields, origin)
    nested = _layer_ids(eagle, origin, "eagle_config.")
    if nested is not None:
        # in eagle_config, a number names the layer whose output is tapped (SGLang adds 1); at the top level, numbers
        # are vLLM's
        nested = tuple(layer + 1 for layer in nested)
        if taps not in (None, nested):
            raise ExportError(f"{origin}: {AUX_LAYERS} and eagle_config.{AUX_LAYERS} name different layers")
        taps = nested
    return _build("flat", fields, flags, taps, origin)


def _build(
    family: str, layer: Mapping[str, Any], draft: Mapping[str, Any], taps: tuple[int, ...] | None, origin: Path
) -> DraftConfig:
    model_type = layer.get("model_type", "llama")
    if model_type not in CONFIG_CLASSES:
        raise ExportError(
            f"{origin}: the draft's layer has model_type {model_type!r}; exported are {', '.join(CONFIG_CLASSES)}"
        )
    _check_rope(layer, origin)
    flags = {name: _flag(draft, name, origin) for name in (*_NORM_FLAGS, "tie_word_embeddings")}
    if flags["norm_before_fc"] and flags["fc_norm"]:
        raise ExportError(f"{origin}: norm_before_fc and fc_norm exclude each other")
    vocabulary = _size(draft, "draft_vocab_size", origin) or _size(layer, "vocab_size", origin)
    if vocabulary is None:
        raise ExportError(f"{origin} has neither draft_vocab_size nor vocab_size")
    return DraftConfig(
        family=family,
        model_type=model_type,
        layer={name: layer[name] for name in _LAYER_FIELDS if layer.get(name) is not None},
        draft_vocab_size=vocabulary,
        target_hidden_size=_size(draft, "target_hidden_size", origin),
        taps=taps,
        window=_window(layer, origin),
        **flags,
    )


def _check_fields(fields: Mapping[str, Any], known: Collection[str], origin: Path, prefix: str = "") -> None:
    for name, value in fields.items():
        if value is None or name in known or name in _INERT:
            continue
        if name not in _FIXED:
            raise ExportError(
                f"{origin} has the field {prefix}{name} ({value!r}), which is not understood; "
                "it may change what the draft computes"
            )
        if value != _FIXED[name]:
            raise ExportError(f"{origin}: {prefix}{name} is {value!r}; only {_FIXED[name]!r} is implemented")


def _mapping(fields: Mapping[str, Any], name: str, origin: Path) -> Mapping[str, Any]:
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ExportError(f"{origin}: {name} is a {type(value).__name__}, not an object")
    return value


def _flag(fields: Mapping[str, Any], name: str, origin: Path) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise ExportError(f"{origin}: {name} is {value!r}, must be true or false")
    return bool(value)


def _size(fields: Mapping[str, Any], name: str, origin: Path) -> int | None:
    value = fields.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ExportError(f"{origin}: {name} is {value!r}, must be a whole number of at least 1")
    return value


def _layer_ids(fields: Mapping[str, Any], origin: Path, prefix: str = "") -> tuple[int, ...] | None:
    value = fields.get(AUX_LAYERS)
    if value is None or value == []:
        return None
    whole = isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)
    if not whole or len(set(value)) != len(value):
        raise ExportError(f"{origin}: {prefix}{AUX_LAYERS} is {value!r}, must be a list of different layer numbers")
    return tuple(value)


def _check_rope(layer: Mapping[str, Any], origin: Path) -> None:
    for name in ("rope_scaling", "rope_parameters"):
        rope = _mapping(layer, name, origin)
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise ExportError(f"{origin}: {name} differs between kinds of layers, which is not implemented")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in _ROPE_TYPES:
            raise ExportError(f"{origin}: RoPE of type {kind!r} is not implemented; known: {', '.join(_ROPE_TYPES)}")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ExportError(f"{origin}: {name}.partial_rotary_factor is not 1, which is not implemented")


def _window(layer: Mapping[str, Any], origin: Path) -> int | None:
    kinds, window = layer.get("layer_types"), layer.get("sliding_window")
    if kinds is None:
        if window is not None and layer.get("use_sliding_window") is not False:
            raise ExportError(
                f"{origin}: sliding_window is {window!r}, but neither layer_types nor use_sliding_window: false says "
                "whether the draft's layer has it"
            )
        return None
    if kinds == ["full_attention"]:
        return None
    if kinds != ["sliding_attention"]:
        raise ExportError(f"{origin}: layer_types is {kinds!r}; one full_attention or sliding_attention is exported")
    if window is None:
        raise ExportError(f"{origin}: layer_types names sliding_attention, but there is no sliding_window")
    return _size(layer, "sliding_window", origin)
