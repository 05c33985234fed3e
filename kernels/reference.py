"""The plain definition of attention that every kernel is tested against. Optimized code never uses it.

Semantics are those of ``torch.nn.functional.scaled_dot_product_attention``. ``is_causal`` is aligned to the top left. A
bool mask is True where a query may attend. A float mask is added to the scores. A row that attends to nothing is 0.

Two operands go beyond that function. A softcap ``c`` makes a scaled score ``s`` ``c tanh(s / c)`` before the mask
(Gemma 2, https://arxiv.org/abs/2408.00118). A sink is one more score of each query head, in the units of the scaled
scores, which takes part in the softmax and has no value (gpt-oss, https://arxiv.org/abs/2508.10925).
"""

from __future__ import annotations

import torch


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    compute_dtype: torch.dtype = torch.float32,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention, computed in ``compute_dtype`` and returned in the query's dtype.

    Args:
        query: ``[B, H_q, L_q, D]``.
        key: ``[B, H_kv, L_kv, D]`` with H_q a multiple of H_kv.
        value: ``[B, H_kv, L_kv, D_v]``.
        mask: broadcastable to ``[B, H_q, L_q, L_kv]``, bool or float.
        is_causal: row ``m`` sees keys ``0..m``.
        scale: factor of the scores, ``1 / sqrt(D)`` when ``None``.
        compute_dtype: dtype of the arithmetic. The tests compare with ``torch.float64``.
        softcap: the limit of the scores; 0 for none.
        sinks: ``[H_q]``, any float dtype.

    Returns:
        ``[B, H_q, L_q, D_v]``, contiguous.
    """
    batch, heads_q, q_len, head_dim = query.shape
    heads_kv, kv_len, v_head_dim = key.shape[1], key.shape[2], value.shape[3]
    group = heads_q // heads_kv
    scale = head_dim**-0.5 if scale is None else scale
    q = query.to(compute_dtype).reshape(batch, heads_kv, group, q_len, head_dim)
    scores = torch.einsum("bhgmd,bhnd->bhgmn", q, key.to(compute_dtype)) * scale
    scores = scores.reshape(batch, heads_q, q_len, kv_len)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if is_causal:
        rows = torch.arange(q_len, device=query.device)[:, None]
        scores = scores.masked_fill(torch.arange(kv_len, device=query.device)[None] > rows, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if kv_len == 0:
        return query.new_zeros(batch, heads_q, q_len, v_head_dim)
    if sinks is not None:
        column = sinks.to(compute_dtype).view(1, heads_q, 1, 1).expand(batch, -1, q_len, 1)
        scores = torch.cat((scores, column), -1)
    row_max = scores.amax(-1, keepdim=True)
    probs = torch.exp(scores - row_max.masked_fill(row_max == float("-inf"), 0.0))
    row_sum = probs.sum(-1, keepdim=True)
    probs = (probs / row_sum.masked_fill(row_sum == 0, 1.0))[..., :kv_len]
    probs = probs.reshape(batch, heads_kv, group, q_len, kv_len)
    out = torch.einsum("bhgmn,bhnd->bhgmd", probs, value.to(compute_dtype))
    return out.reshape(batch, heads_q, q_len, v_head_dim).to(query.dtype)
