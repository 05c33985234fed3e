"""The attention that Hugging Face layers call during tracing: one SDPA node per layer, or else eager attention.

The rewrite of attention replaces either. It gets softcaps and sinks from the operators that compute them, as it does in
any other program.
"""

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
"""Hugging Face name of :func:`attend`; transformers takes names with "flash", "sdpa" or "flex" for its own."""

_NOT_SERVED = {"position_bias": "a bias on the scores"}
"""Options of transformers' attention functions that change the result, and what they mean."""

_BEYOND_SDPA = ("softcap", "s_aux")
"""Options that SDPA has no argument for: a softcap, and sinks."""

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


def is_beyond_sdpa(asked: Mapping[str, Any]) -> bool:
    """Whether a layer's options include a softcap or sinks, which transformers' own SDPA attention ignores."""
    return any(asked.get(name) is not None for name in _BEYOND_SDPA)


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

    Softcapped scores and sinks, which SDPA does not have, become :func:`eager_attention`.

    Args:
        module: the attention layer, for messages and observers.
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
    if is_beyond_sdpa(kwargs):
        softcap, sinks = (kwargs.get(name) for name in _BEYOND_SDPA)
        return eager_attention(query, key, value, attention_mask, scaling, softcap, sinks), None
    result = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return result.transpose(1, 2), None


def eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention as transformers' eager functions write it, for scores that SDPA has no argument for.

    Args:
        query: [1, H_q, T, D], any float dtype.
        key: [1, H_kv, S, D], same dtype.
        value: [1, H_kv, S, D], same dtype.
        mask: bool [1, 1, T, S], true where a row attends; each row attends to something.
        scaling: factor on the scores; ``None`` means 1 / sqrt(D).
        softcap: c, which makes a score s ``c tanh(s / c)`` (Gemma 2, https://arxiv.org/abs/2408.00118).
        sinks: [H_q], a score of each head that takes part in the softmax and has no value (gpt-oss).

    Returns:
        [1, T, H_q, D].
    """
    heads, rows, head_dim = query.shape[1:]
    # The repeated heads vanish with the rewrite, whose kernels share keys and values among the heads of a group.
    keys, values = (
        tensor[:, :, None].expand(-1, -1, heads // tensor.shape[1], -1, -1).reshape(1, heads, -1, head_dim)
        for tensor in (key, value)
    )
    scores = (query @ keys.transpose(2, 3)).float() * (head_dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is None:
        weights = torch.softmax(scores, -1)
    else:
        column = sinks.view(1, heads, 1, 1).expand(1, heads, rows, 1)
        weights = torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]
    result = weights.to(values.dtype) @ values
    # [1, T, H_q, D] memory, as SDPA's result has on a CPU. The rewrite knows this form, and the kernel writes it so.
    result = result.permute(0, 2, 1, 3).clone(memory_format=torch.contiguous_format).permute(0, 2, 1, 3)
    return result.transpose(1, 2)


AttentionInterface.register(ATTENTION_NAME, attend)
