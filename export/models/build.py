"""Builds Hugging Face modules without memory, cuts their layers, and reads the facts that an export needs.

Sizes are read from modules, not from configs: config fields differ between releases of transformers, but the modules
have the sizes that run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.overrides import TorchFunctionMode

from flashpte.export.common.errors import ExportError, Option, UsageError, wanted
from flashpte.export.models.attention_interface import ATTENTION_NAME
from flashpte.export.models.experts import EXPERTS_NAME
from flashpte.export.models.probe import attention_shape, probe_attention
from flashpte.export.models.rope import fix_rope, longest
from flashpte.export.state.kv_cache import attention_state
from flashpte.export.state.layer_state import LayerState

# What transformers and PyTorch raise for the fields of a config that do not fit together.
_REFUSALS = (
    StrictDataclassError,
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    AssertionError,
)

_LEAST_SIZES = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), 1),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "head_dim", "global_head_dim"), 1),
    "max_position_embeddings": 2,  # the shortest prefill
}


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """The facts about a model that an export needs.

    Attributes:
        states: the state of each layer, in layer order.
        vocab_size: V of the logits.
        hidden_size: C of the hidden states between layers.
        max_positions: most positions that the model was made for.
        window: the smallest sliding window or attention chunk in tokens; ``None`` if no layer has one.
        bos_id: id of the token that starts a sequence; ``None`` if the config has none.
        eos_ids: ids of the tokens that end a sequence; empty if the config has none.
        window_name: what ``window`` is, for people.
    """

    states: tuple[LayerState, ...]
    vocab_size: int
    hidden_size: int
    max_positions: int
    window: int | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    window_name: str = "sliding window"


class EmptyTensorsOnMeta(TorchFunctionMode):
    """Sends ``torch.empty`` to the meta device: weights use no memory, and computed buffers (RoPE) keep their values.

    ``torch.device("meta")`` would also move computed, non-persistent buffers, which no checkpoint restores.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def text_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's fields of a multimodal config; a text config's fields unchanged.

    Raises:
        ExportError: ``text_config`` is not an object.
    """
    text = fields.get("text_config")
    if text is None:
        return dict(fields)
    if not isinstance(text, Mapping):
        raise ExportError(f"not a valid config: text_config is a {type(text).__name__}, not an object")
    # set once, at the top level, for the whole model
    shared = ("tie_word_embeddings", "quantization_config")
    return {**{name: fields[name] for name in shared if name in fields}, **text}


def build_causal_lm(
    config_class: str, model_class: str, fields: Mapping[str, Any], check: Callable[[Any], None] | None = None
) -> nn.Module:
    """Builds a transformers causal language model for inference, with its weights on the meta device.

    Args:
        config_class: name of the config class in transformers.
        model_class: name of the model class in transformers.
        fields: fields of the config.
        check: called with the config before the model is built; it raises :class:`ExportError` to refuse it.

    Raises:
        ExportError: transformers is too old for the model, a field is invalid, or the model has a feature that cannot
            be exported (a quantized checkpoint, RoPE frequencies that depend on the input).
    """
    if not (hasattr(transformers, config_class) and hasattr(transformers, model_class)):
        raise ExportError(f"transformers {transformers.__version__} has no {model_class}; install a newer one")
    if quantization := fields.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise ExportError(
            f"config.json names a quantized checkpoint ({method}), which is read as a whole folder: give it to ",
            wanted("checkpoint"),
        )
    if problem := wrong_size(fields):
        raise ExportError(f"not a valid {config_class}: {problem}")
    try:
        config = getattr(transformers, config_class).from_dict(dict(fields))
        # attention layers look up this name on every call
        config._attn_implementation = ATTENTION_NAME
        config._experts_implementation = EXPERTS_NAME
        if check is not None:
            check(config)
        with EmptyTensorsOnMeta():
            model = getattr(transformers, model_class)(config)
    except KeyError as error:  # a name that transformers looks up in one of its tables
        value = error.args[0] if error.args else None
        field = next((f"{name} is " for name, held in fields.items() if held == value), "")
        raise ExportError(f"not a valid {config_class}: {field}{value!r}, unknown or missing") from error
    except _REFUSALS as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"not a valid {config_class}: {reason}") from error
    share_tied_head(model)
    _order_sets(model)
    fix_rope(model, longest(config))
    model.eval().requires_grad_(False)
    probe_attention(model, decoder_layers(model))
    return model


def _order_sets(model: nn.Module) -> None:
    """Replaces sets of strings in modules by sorted lists.

    Gemma 4 computes position embeddings for each layer type in a set. Their order in the trace would depend on the
    process's hash seed, and equal exports would have different bytes.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, set) and value and all(isinstance(item, str) for item in value) and name[0] != "_":
                setattr(module, name, sorted(value))


def wrong_size(fields: Mapping[str, Any]) -> str | None:
    """Describes the first impossible size among a config's fields; ``None`` if all are possible.

    transformers divides by some of these sizes.
    """
    for name, least in _LEAST_SIZES.items():
        value = fields.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            return f"{name} is {value!r}, must be a whole number of at least {least}"
    return None


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a Hugging Face causal language model.

    Raises:
        ExportError: the model does not keep as many modules in one list as its config has layers.
    """
    owner, name = _layers_place(model)
    return getattr(owner, name)


def _layers_place(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the list of decoder layers, and the list's name there."""
    base = _untyped(model).base_model
    if isinstance(getattr(base, "layers", None), nn.ModuleList):
        return base, "layers"
    count = _untyped(model).config.num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            owner, _, name = path.rpartition(".")
            return model.get_submodule(owner), name
    raise ExportError(f"{type(model).__name__} has no list of {count} decoder layers")


def _untyped(module: nn.Module) -> Any:
    """The same module as ``Any``, because type checkers do not know the attributes of Hugging Face modules."""
    return module


def cut_layers(model: nn.Module, count: int) -> None:
    """Keeps the first ``count`` layers, unchanged.

    The config keeps its number of layers. Built from a shortened config, some models make their last layer another kind
    (Gemma 4 forces full attention there), which would not fit the checkpoint.

    Raises:
        UsageError: ``count`` is less than 1 or more than the model's layers.
    """
    layers = decoder_layers(model)
    if not 1 <= count <= len(layers):
        raise UsageError(Option("layers", count), f": the model has {len(layers)} layers")
    owner, name = _layers_place(model)
    setattr(owner, name, layers[:count])


def attention_of(layer: nn.Module) -> LayerState:
    """The cache of a Hugging Face layer with attention.

    Raises:
        ExportError: the layer called no attention function.
    """
    shape = attention_shape(layer)
    if shape is None:
        raise ExportError(
            f"a layer of type {type(layer).__name__} has no attention that transformers lets others serve"
        )
    return attention_state(shape.kv_heads, shape.head_dim, shape.window, shape.chunk)


def describe(model: nn.Module, layer_state: Callable[[nn.Module], LayerState] = attention_of) -> ModelFacts:
    """Reads the facts from a model made by :func:`build_causal_lm`.

    Args:
        model: the model.
        layer_state: returns a layer's state; targets with layers other than Hugging Face attention provide their own.

    Raises:
        ExportError: a layer has no state that the target knows.
    """
    states = tuple(layer_state(layer) for layer in decoder_layers(model))
    windows = {
        window: getattr(state, "window_name", ModelFacts.window_name)
        for state in states
        if (window := getattr(state, "window", None)) is not None
    }
    config = _untyped(model).config
    eos = config.eos_token_id
    embedding = _untyped(model).get_input_embeddings()
    return ModelFacts(
        states=states,
        vocab_size=embedding.num_embeddings,
        hidden_size=embedding.embedding_dim,
        max_positions=longest(config),
        window=min(windows, default=None),
        bos_id=config.bos_token_id,
        eos_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        window_name=windows[min(windows)] if windows else ModelFacts.window_name,
    )


class TiedHead(nn.Module):
    """The output projection of a model with tied embeddings, which reads the embedding's weight in place.

    A head that registered the same parameter again would give the exported program a second input, and either of the
    two names could become the stored one. An embedding without a dense weight has ``project`` for its head.
    """

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self._embedding = (embedding,)  # a tuple, so that it is not a child module with a second name

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps hidden states [..., C] to logits [..., V]."""
        embedding = _untyped(self._embedding[0])
        return embedding.project(hidden) if hasattr(embedding, "project") else F.linear(hidden, embedding.weight)


def is_tied(model: nn.Module) -> bool:
    """Whether the output projection shares the embedding's weight."""
    return isinstance(getattr(model, "lm_head", None), TiedHead)


def embedding_name(model: nn.Module) -> str:
    """The path of the embedding in a Hugging Face causal language model."""
    embedding = _untyped(model).get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embedding)


def share_tied_head(model: nn.Module) -> None:
    """Replaces the head of a model whose config ties it to the embedding by a :class:`TiedHead`."""
    if _untyped(model).config.tie_word_embeddings:
        model.lm_head = TiedHead(_untyped(model).get_input_embeddings())
