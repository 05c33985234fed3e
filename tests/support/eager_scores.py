"""Eager attention with a softcap or sinks, as models write it, for tests of the pass that finds both."""

from __future__ import annotations

import torch
import torch.nn.functional as F

MIN = torch.finfo(torch.float32).min
HEADS = 6


class Model(torch.nn.Module):
    """``forward(q, k, v, mask)`` calls ``attention(q, k, v, mask, sinks)`` with a parameter as sinks."""

    def __init__(self, attention, sinks=None):
        super().__init__()
        self.attention = attention
        given = torch.randn(HEADS, generator=torch.Generator().manual_seed(3)) if sinks is None else sinks
        self.sinks = torch.nn.Parameter(given)

    def forward(self, q, k, v, mask=None):
        out = self.attention(q, k, v, mask, self.sinks)
        return out.transpose(1, 2).contiguous().reshape(q.shape[0], q.shape[2], -1)


def repeat_kv(t, groups):
    return t[:, :, None].expand(-1, -1, groups, -1, -1).reshape(t.shape[0], -1, *t.shape[2:])


def scored(q, k, v, mask=None, softcap=None, scale=0.25):
    """Scores and values with heads repeated for the query heads, as Hugging Face's eager attention has them."""
    k, v = (repeat_kv(t, q.shape[1] // k.shape[1]) for t in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return scores if mask is None else scores + mask, v


def gpt_oss(q, k, v, mask, sinks):
    scores, v = scored(q, k, v, mask)
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    joined = torch.cat([scores, column], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    weights = F.softmax(joined, dim=-1, dtype=joined.dtype)[..., :-1]
    return torch.matmul(F.dropout(weights, 0.1, training=False).to(v.dtype), v)


def window(rows, keys=64, hidden=MIN):
    at = torch.arange(rows)[:, None] + keys - rows
    shown = (torch.arange(keys) <= at) & (torch.arange(keys) > at - 20)
    return torch.zeros(rows, keys).masked_fill(~shown, hidden)[None, None]
