"""Finds out what the attention of a Hugging Face model is like by running it on tensors without values.

Names of projections, fields of configs and the kinds of layers differ from model to model. What reaches the attention
function does not: queries, keys and values by head, the scale, and the options that the layer asks for.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from flashpte.export.common.errors import ExportError
from flashpte.export.models import attention_interface
from flashpte.export.models.experts import is_experts, served
from flashpte.export.state.kv_cache import CHUNKED, FULL, SLIDING

_TOKENS = 3
_RECORD = "_flashpte_attention"
_KINDS = (FULL, SLIDING, CHUNKED)


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What one layer's attention is like.

    Attributes:
        heads: query heads H_q.
        kv_heads: key/value heads H_kv.
        head_dim: D of queries, keys and values.
        window: the sliding window in tokens; ``None`` for full or chunked attention.
        chunk: tokens of a chunk, whose rows attend to that chunk alone; ``None`` without chunks.
        beyond_sdpa: whether the layer asks for something that SDPA has no argument for.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    chunk: int | None = None
    beyond_sdpa: bool = False


def attention_shape(layer: nn.Module) -> AttentionShape | None:
    """What :func:`probe_attention` found in a decoder layer; ``None`` if the layer called no attention."""
    return getattr(layer, _RECORD, None)


def probe_attention(model: nn.Module, layers: nn.ModuleList) -> None:
    """Runs a model on a few tokens without values and remembers each layer's :class:`AttentionShape`.

    Args:
        model: a causal language model whose attention implementation is :func:`.attend`; parameters may be on meta.
        layers: its decoder layers.

    Raises:
        ExportError: the model cannot be called as the exported methods call it, or a layer asks for attention that
            they cannot give; the text names the module.
    """
    _check_kinds(model)
    owners = {id(module): layer for layer in layers for module in layer.modules()}
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[int, AttentionShape] = {}

    def record(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, asked: Any) -> None:
        layer, name = owners.get(id(module)), names.get(id(module), type(module).__name__)
        if layer is None:
            raise ExportError(f"{name} ({type(module).__name__}) is attention outside of the decoder layers")
        if id(layer) in found:
            raise ExportError(f"{name} is the second attention of its layer; a layer has one cache")
        if query.shape[1] % key.shape[1]:
            raise ExportError(
                f"the config has {query.shape[1]} attention heads, must be a multiple of its {key.shape[1]} key heads"
            )
        if not getattr(module, "is_causal", True):
            raise ExportError(f"{name} ({type(module).__name__}) is not causal: the model is no decoder")
        if value.shape != key.shape:
            raise ExportError(
                f"{name} ({type(module).__name__}) has values of {value.shape[-1]} elements and keys of "
                f"{key.shape[-1]}; caches hold one head dim"
            )
        found[id(layer)] = AttentionShape(
            query.shape[1],
            key.shape[1],
            key.shape[3],
            asked.get("sliding_window"),
            beyond_sdpa=attention_interface.is_beyond_sdpa(asked),
        )

    untyped: Any = model
    with _fake_parameters(model) as fake, attention_interface.observed(record):
        tokens, positions = torch.zeros(1, _TOKENS, dtype=torch.int64), torch.arange(_TOKENS)
        mask = torch.ones(1, 1, _TOKENS, _TOKENS, dtype=torch.bool)
        arguments = {
            "input_ids": tokens,
            "position_ids": positions[None],
            "attention_mask": dict.fromkeys(_KINDS, mask) if takes_mask_per_type(untyped.config) else mask,
            "past_key_values": _PassingCache(),
            "use_cache": True,
            "logits_to_keep": 1,
        }
        try:
            torch.func.functional_call(model, fake, (), arguments)
        except ExportError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ExportError(f"{type(model).__name__} cannot be called with a cache and masks: {reason}") from error
    for index, layer in enumerate(layers):
        if id(layer) in found:
            _check_window(model, index, found[id(layer)].window)
            setattr(layer, _RECORD, dataclasses.replace(found[id(layer)], chunk=_chunk(model, index)))


def _check_kinds(model: nn.Module) -> None:
    """Refuses kinds of layers that no cache or kernel serves, before their code fails in other words."""
    untyped: Any = model
    kinds = set(getattr(untyped.config, "layer_types", None) or ())
    if unknown := sorted(kinds.difference(_KINDS)):
        raise ExportError(f"{type(model).__name__} has layers of type {unknown[0]}, which this target does not export")
    for name, module in model.named_modules():
        if is_experts(module) and not served(module):
            raise ExportError(
                f"{name} ({type(module).__name__}) is a mixture of experts that transformers lets no others compute"
            )


def _check_window(model: nn.Module, index: int, window: int | None) -> None:
    """Refuses a layer whose mask, which its type names, would not fit the cache that its window gives it."""
    untyped: Any = model
    kinds = getattr(untyped.config, "layer_types", None)
    if kinds and takes_mask_per_type(untyped.config) and (kinds[index] == SLIDING) != (window is not None):
        raise ExportError(
            f"layer {index} of {type(model).__name__} is of type {kinds[index]}, and its attention has a window of "
            f"{window}"
        )


def _chunk(model: nn.Module, index: int) -> int | None:
    """The chunk of a layer whose type says that it has one, as transformers' own masks read it from the config."""
    untyped: Any = model
    kinds = getattr(untyped.config, "layer_types", None)
    return untyped.config.attention_chunk_size if kinds and kinds[index] == CHUNKED else None


def takes_mask_per_type(config: Any) -> bool:
    """Whether a model's layers look their mask up by the layer's type, because there are several types."""
    return len(set(getattr(config, "layer_types", None) or ())) > 1


@contextlib.contextmanager
def _fake_parameters(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            for name, tensor in model.named_parameters()
        }


class _PassingCache:
    """Stands for a cache: keeps nothing and returns the new keys and values."""

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0
