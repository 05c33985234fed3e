"""The attention that Hugging Face layers call during tracing: one SDPA node per layer."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from flashpte.export.common.errors import ExportError

ATTENTION_NAME = "fpte_attention"
"""Hugging Face name of :func:`attend`; transformers takes names with "flash", "sdpa" or "flex" in them
for its own implementations."""


_NOT_SERVED = {"softcap": "softcapped scores", "s_aux": "learned sinks", "position_bias": "a bias on the scores"}
"""Options of transformers' attention functions that change the result, and what they mean."""

Observer = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, Mapping[str, Any]], None]
_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar("observer", default=None)


@contextlib.contextmanager
def observed(observe: Observer) -> Iterator[None]:
    """Inside, :func:`attend` first calls ``observe(module, query, key, value, other options)``."""
    token = _observer.set(observe)
    try:
        yield
    finally:
        _observer.reset(token)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Hugging Face attention implementation: one SDPA call with grouped heads and a bool mask.

    Args:
        module: the attention layer (unused; part of the interface).
        query: [1, H_q, T, D], any float dtype.
        key: [1, H_kv, S, D], same dtype.
        value: [1, H_kv, S, D], same dtype.
        attention_mask: bool [1, 1, T, S], true where a row attends.
        dropout: must be 0.
        scaling: factor on the scores; ``None`` means 1 / sqrt(D).
        kwargs: other options of the layer. A sliding window is in the mask already.

    Returns:
        The result [1, T, H_q, D], and ``None`` instead of attention weights.

    Raises:
        ExportError: there is no mask, dropout is not 0, or the layer asks for something else than softmax attention.
    """
    if attention_mask is None or dropout != 0.0:
        raise ExportError(f"{type(module).__name__}: exported attention needs a mask and no dropout")
    for name, meaning in _NOT_SERVED.items():
        if kwargs.get(name) is not None:
            raise ExportError(f"{type(module).__name__} has {meaning} ({name}), which exports do not serve yet")
    if (observe := _observer.get()) is not None:
        observe(module, query, key, value, kwargs)
    result = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return result.transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, attend)
