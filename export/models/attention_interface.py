"""The attention that Hugging Face layers call during tracing: one SDPA node per layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from flashpte.export.common.errors import ExportError

ATTENTION_NAME = "fpte_sdpa"
"""Hugging Face name of :func:`attend`; it must not contain "flash", because transformers takes that for flash-attn."""


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_kwargs: Any,
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

    Returns:
        The result [1, T, H_q, D], and ``None`` instead of attention weights.

    Raises:
        ExportError: there is no mask, or dropout is not 0.
    """
    if attention_mask is None or dropout != 0.0:
        raise ExportError(f"{type(module).__name__}: exported attention needs a mask and no dropout")
    result = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return result.transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, attend)
