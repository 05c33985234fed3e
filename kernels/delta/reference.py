"""The plain definition of the gated delta rule that the kernels are tested against. Optimized code never uses it.

Each value head has a state ``S [D_k, D_v]``, 0 at first. A token with key k, value v, query q, decay ``g <= 0`` (the
logarithm of a factor) and ``beta`` changes it, and then reads it::

    S = exp(g) S
    S = S + k beta (v - k^T S)^T
    out = S^T q scale

This is ``torch_recurrent_gated_delta_rule`` of Hugging Face's ``models/qwen3_next`` and ``qwen3_5_moe``. The rule is
that of Gated Delta Networks (Yang, Kautz and Hatamizadeh, https://arxiv.org/abs/2412.06464).
"""

from __future__ import annotations

import torch

NORM_EPS = 1e-6
"""Added to the sum of squares of a query or a key before its root is taken."""


def delta_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    scale: float | None = None,
    l2norm: bool = True,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule, one token after the other, computed and returned in ``compute_dtype``.

    Args:
        query, key: ``[B, L, H_k, D_k]``. Head i serves the value heads ``i H_v / H_k`` up to ``(i + 1) H_v / H_k``.
        value: ``[B, L, H_v, D_v]``.
        g, beta: ``[B, L, H_v]``.
        state: ``[B, H_v, D_k, D_v]`` before the first token; 0 when ``None``.
        scale: factor of the result, ``1 / sqrt(D_k)`` when ``None``.
        l2norm: whether queries and keys are first divided by their length, ``sqrt(x . x + 1e-6)``.

    Returns:
        ``[B, L, H_v, D_v]``, and the state after the last token.
    """
    batch, length, heads_k, k_dim = query.shape
    heads, v_dim = value.shape[2:]
    scale = k_dim**-0.5 if scale is None else scale
    q, k, v, decay, b = (tensor.to(compute_dtype) for tensor in (query, key, value, g, beta))
    if l2norm:
        q, k = (x / (x.square().sum(-1, keepdim=True) + NORM_EPS).sqrt() for x in (q, k))
    q, k = ((x * factor).repeat_interleave(heads // heads_k, 2) for x, factor in ((q, scale), (k, 1.0)))
    shape = (batch, heads, k_dim, v_dim)
    held = v.new_zeros(shape) if state is None else state.to(compute_dtype, copy=True)
    out = v.new_empty((batch, length, heads, v_dim))
    for t in range(length):
        held = held * decay[:, t, :, None, None].exp()
        seen = (held * k[:, t, :, :, None]).sum(-2)
        delta = (v[:, t] - seen) * b[:, t, :, None]
        held = held + k[:, t, :, :, None] * delta[:, :, None]
        out[:, t] = (held * q[:, t, :, :, None]).sum(-2)
    return out, held
