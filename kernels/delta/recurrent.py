"""The gated delta rule one token after the other: decode, and verify of a few drafts.

A program holds ``[D_k, BLOCK_V]`` of one head's state in registers for all tokens of the call. So the state is read
once and written once, and its bytes are the limit. Each token reads the decayed state with its key and its query at
once. With ``S`` decayed, ``out = S^T q + (k . q) delta`` saves the second reduction over the new state.

Shapes: ``q, k [B, L, H_k, D_k]``, ``v, out [B, L, H_v, D_v]``, ``g, beta [B, L, H_v]``, state ``[B, H_v, D_k, D_v]``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from flashpte.kernels.delta.call import MAX_TOKENS, DeltaCall, check
from flashpte.kernels.delta.device import norm_factor
from flashpte.kernels.delta.tuning import RecurrentConfig, choose_recurrent
from flashpte.kernels.facts import register
from flashpte.kernels.launch import cdiv, dependent_launch, static_int
from flashpte.kernels.primitives import INTERPRETED, let_dependents_start, wait_for_earlier_kernels


@triton.jit
def _load_token(pointers, t, there, strides, d_ok, v_ok):
    """Query, key, value, decay and beta of token ``t``, float32; zeros unless ``there``."""
    q_ptrs, k_ptrs, v_ptrs, g_ptr, beta_ptr = pointers
    stride_q, stride_k, stride_v, stride_g = strides
    q = tl.load(q_ptrs + t * stride_q, mask=d_ok & there, other=0.0).to(tl.float32)
    k = tl.load(k_ptrs + t * stride_k, mask=d_ok & there, other=0.0).to(tl.float32)
    v = tl.load(v_ptrs + t * stride_v, mask=v_ok & there, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + t * stride_g, mask=there, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + t * stride_g, mask=there, other=0.0).to(tl.float32)
    return q, k, v, g, beta


@triton.jit
def _delta_recurrent_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, state_ptr, out_ptr, new_state_ptr, L,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    SCALE: tl.constexpr, HEADS, GROUP, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, L2NORM: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """All tokens of ``BLOCK_V`` columns of one head's state. Without a first state, ``state_ptr`` is ``None``."""
    b = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    d = tl.arange(0, BLOCK_K)
    column = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    d_ok, v_ok = d < K_DIM, column < V_DIM
    at = (b * HEADS + head) * K_DIM * V_DIM + d[:, None] * V_DIM + column[None, :]
    ok = d_ok[:, None] & v_ok[None, :]
    gates = b * L * HEADS + head
    pointers = (
        q_ptr + b * stride_qb + head // GROUP * stride_qh + d,
        k_ptr + b * stride_kb + head // GROUP * stride_kh + d,
        v_ptr + b * stride_vb + head * stride_vh + column,
        g_ptr + gates,
        beta_ptr + gates,
    )
    strides = (stride_qt, stride_kt, stride_vt, HEADS)
    out_ptrs = out_ptr + gates * V_DIM + column
    wait_for_earlier_kernels(DEPENDENT)
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if state_ptr is not None:
        state = tl.load(state_ptr + at, mask=ok, other=0.0)
    q, k, v, g, beta = _load_token(pointers, 0, L > 0, strides, d_ok, v_ok)
    for t in range(L):
        # The next token's loads do not depend on the state, so they are on their way during this one's reductions.
        next_q, next_k, next_v, next_g, next_beta = _load_token(pointers, t + 1, t + 1 < L, strides, d_ok, v_ok)
        q = q * (norm_factor(q, 0, L2NORM) * SCALE)
        k = k * norm_factor(k, 0, L2NORM)
        state = state * tl.exp(g)
        delta = (v - tl.sum(state * k[:, None], 0)) * beta
        out = tl.sum(state * q[:, None], 0) + tl.sum(k * q, 0) * delta
        state += k[:, None] * delta[None, :]
        tl.store(out_ptrs + t * (HEADS * V_DIM), out.to(out_ptr.dtype.element_ty), mask=v_ok)
        q, k, v, g, beta = next_q, next_k, next_v, next_g, next_beta
    tl.store(new_state_ptr + at, state, mask=ok)
    let_dependents_start(DEPENDENT)


register(_delta_recurrent_kernel, "attention", early_start="DEPENDENT")


def launch_recurrent(call: DeltaCall, config: RecurrentConfig | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the kernel.

    Args:
        call: at most :data:`MAX_TOKENS` tokens.
        config: tile choice; by default that for the shape.

    Returns:
        ``[B, L, H_v, D_v]``, contiguous, and the state after the last token, float32.
    """
    check(call, MAX_TOKENS)
    call = call.for_launch()
    config = choose_recurrent(call.k_dim) if config is None else config
    out, new_state = call.empty_results()
    if static_int(call.batch) == 0:
        return out, new_state
    dependent = {"DEPENDENT": False} if INTERPRETED else dependent_launch(call.value)
    kernel = _delta_recurrent_kernel if INTERPRETED else wrap_triton(_delta_recurrent_kernel)
    kernel[(cdiv(call.v_dim, config.block_v), call.batch * call.heads)](
        *(call.query, call.key, call.value, call.g, call.beta, call.state, out, new_state),
        call.length,
        *call.strides,
        SCALE=call.scale,
        V_DIM=call.v_dim,
        BLOCK_V=config.block_v,
        num_warps=config.num_warps,
        **call.constants,
        **dependent,
    )
    return out, new_state
