"""Carries the state of the gated delta rule through the chunks of a prompt: prefill's second kernel.

A program has ``BLOCK_V`` columns of one head's state in registers and visits the chunks in order. It computes each
chunk's result from the state before it, so no state is stored but the last::

    delta = solve (V - exp(c) K S)
    out = scale exp(c) Q S + P delta
    S = exp(c_63) S + K^T exp(c_63 - c) delta

Factors of rows apply after a product with K or Q, or to ``delta``. So keys and queries go to the tensor cores as they
are in memory. The state and ``delta`` are rounded to the dtype of the values for products, and never in between.

Shapes: as in :mod:`flashpte.kernels.delta.prepare`; ``v, out [B, L, H_v, D_v]``, state ``[B, H_v, D_k, D_v]`` float32.
The limit is the latency of a chunk: 64 chunks of 4,096 tokens follow each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from flashpte.kernels import tuning
from flashpte.kernels.delta.call import DeltaCall, check
from flashpte.kernels.delta.prepare import launch_prepare
from flashpte.kernels.delta.tuning import ChunkedConfig, choose_chunked
from flashpte.kernels.facts import register
from flashpte.kernels.launch import cdiv, static_int
from flashpte.kernels.primitives import INTERPRETED, load_tile


@triton.jit
def _delta_scan_kernel(
    q_ptr, k_ptr, v_ptr, solve_ptr, scores_ptr, factors_ptr, state_ptr, out_ptr, new_state_ptr, L,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    HEADS, GROUP, K_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All chunks of ``BLOCK_V`` columns of one head. Without a first state, ``state_ptr`` is ``None``."""
    b = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    first = tl.program_id(0) * BLOCK_V
    t = tl.arange(0, 64)
    d = tl.arange(0, BLOCK_K)
    column = tl.arange(0, BLOCK_V)
    chunks = tl.cdiv(L, 64)
    block = (b * HEADS + head) * chunks
    q_ptr += b * stride_qb + head // GROUP * stride_qh
    k_ptr += b * stride_kb + head // GROUP * stride_kh
    v_ptr += b * stride_vb + head * stride_vh + first
    out_ptr += (b * L * HEADS + head) * V_DIM + first
    at = (b * HEADS + head) * K_DIM * V_DIM + first + d[:, None] * V_DIM + column[None, :]
    ok = (d < K_DIM)[:, None] & (first + column < V_DIM)[None, :]
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if state_ptr is not None:
        state = tl.load(state_ptr + at, mask=ok, other=0.0)
    dtype = v_ptr.dtype.element_ty
    square = t[:, None] * 64 + t[None, :]
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        start = tl.full([], 64, tl.int64) * chunk
        rest = L - start
        k = load_tile(k_ptr + start * stride_kt, t, stride_kt, rest, d, K_DIM, True, BLOCK_K != K_DIM)
        q = load_tile(q_ptr + start * stride_qt, t, stride_qt, rest, d, K_DIM, True, BLOCK_K != K_DIM)
        v = load_tile(v_ptr + start * stride_vt, t, stride_vt, rest, column, V_DIM - first, True, V_DIM % BLOCK_V != 0)
        solve = tl.load(solve_ptr + (block + chunk) * 4096 + square)
        scores = tl.load(scores_ptr + (block + chunk) * 4096 + square)
        factors = factors_ptr + (block + chunk) * 256
        reads = tl.load(factors + t)
        query_reads = tl.load(factors + 64 + t)
        writes = tl.load(factors + 128 + t)
        decay = tl.load(factors + 192 + 63)
        before = state.to(dtype)
        wanted = v.to(tl.float32) - tl.dot(k, before, input_precision=DOT) * reads[:, None]
        delta = tl.dot(solve, wanted.to(dtype), input_precision=DOT)
        out = tl.dot(q, before, input_precision=DOT) * query_reads[:, None]
        out += tl.dot(scores, delta.to(dtype), input_precision=DOT)
        out_ptrs = out_ptr + start * (HEADS * V_DIM) + t[:, None] * (HEADS * V_DIM) + column[None, :]
        tl.store(out_ptrs, out.to(dtype), mask=(t < rest)[:, None] & (first + column < V_DIM)[None, :])
        written = (delta * writes[:, None]).to(dtype)
        state = tl.dot(tl.trans(k), written, state * decay, input_precision=DOT)
    tl.store(new_state_ptr + at, state, mask=ok)


register(_delta_scan_kernel, "attention")


def launch_chunked(call: DeltaCall, config: ChunkedConfig | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches both kernels of prefill.

    Args:
        call: any number of tokens.
        config: tile choice; by default that for the shape and arch.

    Returns:
        ``[B, L, H_v, D_v]``, contiguous, and the state after the last token, float32.
    """
    check(call)
    call = call.for_launch(aligned=True)
    if config is None:
        config = choose_chunked(call.value.itemsize, tuning.current_arch(call.value.device))
    out, new_state = call.empty_results()
    if static_int(call.batch) == 0:
        return out, new_state
    prepared = launch_prepare(call, config)
    kernel = _delta_scan_kernel if INTERPRETED else wrap_triton(_delta_scan_kernel)
    kernel[(cdiv(call.v_dim, config.block_v), call.batch * call.heads)](
        *(call.query, call.key, call.value, *prepared, call.state, out, new_state),
        call.length,
        *call.strides,
        V_DIM=call.v_dim,
        BLOCK_V=config.block_v,
        DOT="tf32x3" if call.value.dtype == torch.float32 else "ieee",
        STAGES=config.scan_stages,
        num_warps=config.scan_warps,
        **call.constants,
    )
    return out, new_state
