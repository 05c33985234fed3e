"""What a chunk of the gated delta rule needs that does not depend on the state: prefill's first kernel.

With the decays' running sum ``c_i`` within the chunk and normalized keys and queries, the corrections of all 64
tokens solve one triangular system::

    (I + A) delta = beta (V - exp(c) K S),    A_ij = beta_i exp(c_i - c_j) k_i . k_j  for j < i, else 0

The kernel stores ``solve = (I + A)^-1 beta`` and ``scores``, ``P_ij = scale exp(c_i - c_j) q_i . k_j`` for ``j <= i``,
both in the dtype of the values, and four float32 factors of each token (:data:`FACTORS`). All decays that it computes
are at most 1. Products are on tensor cores and are summed in float32. The inverse is computed in float32
(:func:`flashpte.kernels.delta.device.unit_lower_inverse`).

Shapes: ``q, k [B, L, H_k, D_k]``, ``g, beta [B, L, H_v]``, ``solve, scores [B, H_v, NT, 64, 64]``,
``factors [B, H_v, NT, 4, 64]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from flashpte.kernels.delta.call import DeltaCall
from flashpte.kernels.delta.device import norm_factor, unit_lower_inverse
from flashpte.kernels.delta.tuning import CHUNK, ChunkedConfig
from flashpte.kernels.facts import register
from flashpte.kernels.launch import cdiv
from flashpte.kernels.primitives import INTERPRETED, load_tile

FACTORS = ("what a key reads", "what a query reads", "what a key writes", "the state's decay up to the token")
"""Row by row. The first three belong to the keys and queries as they are, so they also normalize and scale."""


class Prepared(NamedTuple):
    """What the kernel stores; see the module."""

    solve: torch.Tensor
    scores: torch.Tensor
    factors: torch.Tensor


@triton.jit
def _delta_prepare_kernel(
    q_ptr, k_ptr, g_ptr, beta_ptr, solve_ptr, scores_ptr, factors_ptr, L,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    SCALE: tl.constexpr, HEADS, GROUP, K_DIM: tl.constexpr, BLOCK_K: tl.constexpr,
    L2NORM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head."""
    chunk = tl.program_id(0).to(tl.int64)
    b = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    t = tl.arange(0, 64)
    d = tl.arange(0, BLOCK_K)
    start = chunk * 64
    rest = L - start
    there = t < rest
    # Tokens past the end have keys, queries and beta of 0 and do not decay, so they change nothing.
    gates = (b * L + start) * HEADS + head + t * HEADS
    decay = tl.cumsum(tl.load(g_ptr + gates, mask=there, other=0.0), 0)
    beta = tl.load(beta_ptr + gates, mask=there, other=0.0).to(tl.float32)
    q_ptr += b * stride_qb + start * stride_qt + head // GROUP * stride_qh
    k_ptr += b * stride_kb + start * stride_kt + head // GROUP * stride_kh
    k = load_tile(k_ptr, t, stride_kt, rest, d, K_DIM, True, BLOCK_K != K_DIM)
    q = load_tile(q_ptr, t, stride_qt, rest, d, K_DIM, True, BLOCK_K != K_DIM)
    k_norm = norm_factor(k.to(tl.float32), 1, L2NORM)
    q_norm = norm_factor(q.to(tl.float32), 1, L2NORM) * SCALE
    within = tl.where(t[:, None] >= t[None, :], tl.exp(decay[:, None] - decay[None, :]), 0.0) * k_norm[None, :]
    lower = tl.dot(k, tl.trans(k), input_precision=DOT) * within * (beta * k_norm)[:, None]
    lower = tl.where(t[:, None] > t[None, :], lower, 0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=DOT) * within * q_norm[:, None]
    block = (b * HEADS + head) * tl.num_programs(0) + chunk
    at = block * 4096 + t[:, None] * 64 + t[None, :]
    tl.store(scores_ptr + at, scores.to(scores_ptr.dtype.element_ty))
    solve = unit_lower_inverse(lower) * beta[None, :]
    tl.store(solve_ptr + at, solve.to(solve_ptr.dtype.element_ty))
    factors_ptr += block * 256 + t
    decayed = tl.exp(decay)
    last = tl.sum(tl.where(t == 63, decay, 0.0), 0)
    tl.store(factors_ptr, decayed * k_norm)
    tl.store(factors_ptr + 64, decayed * q_norm)
    tl.store(factors_ptr + 128, tl.exp(last - decay) * k_norm)
    tl.store(factors_ptr + 192, decayed)


register(_delta_prepare_kernel, "attention")


def launch_prepare(call: DeltaCall, config: ChunkedConfig) -> Prepared:
    """Launches the kernel for a call in the layout of :meth:`DeltaCall.for_launch`."""
    chunks = cdiv(call.length, CHUNK)
    shape = (call.batch, call.heads, chunks)
    solve, scores = (call.value.new_empty((*shape, CHUNK, CHUNK)) for _ in range(2))
    factors = call.value.new_empty((*shape, len(FACTORS), CHUNK), dtype=torch.float32)
    kernel = _delta_prepare_kernel if INTERPRETED else wrap_triton(_delta_prepare_kernel)
    kernel[(chunks, call.batch * call.heads)](
        *(call.query, call.key, call.g, call.beta, solve, scores, factors),
        call.length,
        *call.strides[:6],
        SCALE=call.scale,
        DOT="tf32x3" if call.value.dtype == torch.float32 else "ieee",
        num_warps=config.prepare_warps,
        **call.constants,
    )
    return Prepared(solve, scores, factors)
