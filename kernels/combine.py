"""Splits of the keys: how many work, and combining what they computed.

Used by the split-K kernel (:mod:`flashpte.kernels.split_k`), which describes what a split leaves, and by the kernel for
Hopper (:mod:`flashpte.kernels.hopper`), of which a split that is alone writes the result itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from flashpte.kernels import tuning
from flashpte.kernels.launch import cdiv, dependent_launch, static_int
from flashpte.kernels.primitives import INTERPRETED, wait_for_earlier_kernels


@triton.jit
def key_steps(
    counts_ptr,
    tile_row,
    q_len,
    kv_len,
    BLOCK_N: tl.constexpr,
    MAP_BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
):
    """How many tiles of ``BLOCK_N`` keys have to be visited: all, and of those the full ones, which come first."""
    if MASK != 0:
        full_steps = tl.load(counts_ptr + tile_row * 4) * (MAP_BLOCK_N // BLOCK_N)
        steps = full_steps + tl.load(counts_ptr + tile_row * 4 + 1) * (MAP_BLOCK_N // BLOCK_N)
    else:
        # Causal is aligned to the top left: no row sees a key beyond the last row.
        steps = tl.cdiv(tl.minimum(kv_len, q_len) if CAUSAL else kv_len, BLOCK_N)
        full_steps = 0 if CAUSAL else kv_len // BLOCK_N
    return steps, full_steps


@triton.jit
def active_splits(steps, num_splits, short_splits, BLOCK_N: tl.constexpr, LONG_KEYS: tl.constexpr):
    """Into how many of ``num_splits`` the visited keys are cut.

    A buffer is cut for its length, which the context may be far from: with few keys to visit, partial results would
    cost more bytes than keys do.
    """
    active = tl.where(steps * BLOCK_N >= LONG_KEYS, num_splits, tl.minimum(short_splits, num_splits))
    return tl.maximum(tl.minimum(active, steps), 1)


@triton.jit
def share_of(split, active, steps, full_steps, EDGE_WEIGHT: tl.constexpr):
    """Where split ``split`` of ``active`` begins among ``steps`` tiles, of which the ``full_steps`` first are full.

    A tile that is not full takes as long as ``EDGE_WEIGHT`` full ones.
    """
    cost = full_steps + (steps - full_steps) * EDGE_WEIGHT
    at = (split.to(tl.int64) * cost // active).to(tl.int32)
    return tl.where(at <= full_steps, at, full_steps + (at - full_steps) // EDGE_WEIGHT)


@triton.jit
def _add_splits(
    state,
    acc_ptr,
    stats_ptr,
    first_partial,
    rows,
    s,
    stored,
    active,
    dv,
    V_HEAD_DIM: tl.constexpr,
    EXP2_SCALE: tl.constexpr,
):
    """Adds splits ``s`` to ``state``: accumulator ``[DV]``, maximum, sum. Of ``stored`` there is memory to read."""
    out, row_max, total = state
    partial = first_partial + s * rows
    split_max = tl.load(stats_ptr + partial * 2, mask=s < stored, other=float("-inf"))
    split_sum = tl.load(stats_ptr + partial * 2 + 1, mask=s < stored, other=0.0)
    acc_ok = (s < stored)[:, None] & (dv < V_HEAD_DIM)[None, :]
    acc = tl.load(acc_ptr + partial[:, None] * V_HEAD_DIM + dv[None, :], mask=acc_ok, other=0.0)
    # What lies behind the active splits is anything.
    split_max = tl.where(s < active, split_max, float("-inf"))
    split_sum = tl.where(s < active, split_sum, 0.0)
    new_max = tl.maximum(row_max, tl.max(split_max, 0))
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    weight = tl.exp2((split_max - base) * EXP2_SCALE)
    rescale = tl.exp2((row_max - base) * EXP2_SCALE)
    # What a split holds that saw no key does not count: it may be 0 * inf, from values that do not count either.
    out = out * rescale + tl.sum(tl.where((weight > 0.0)[:, None], acc * weight[:, None], 0.0), 0)
    total = total * rescale + tl.sum(split_sum * weight, 0)
    return out, new_max, total


@triton.jit
def _combine_kernel(
    acc_ptr,
    stats_ptr,
    counts_ptr,
    out_ptr,
    stride_ob,
    stride_oh,
    stride_om,
    stride_od,
    stride_tb,
    stride_th,
    heads_kv,
    q_len,
    kv_len,
    num_splits,
    short_splits,
    GROUP: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAP_BLOCK_M: tl.constexpr,
    MAP_BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    LONG_KEYS: tl.constexpr,
    ALONE_WRITES: tl.constexpr,  # whether a split that is alone has written the result
    EXP2_SCALE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0)
    bh = tl.program_id(1)
    b = (bh // heads_kv).to(tl.int64)
    m = (row // GROUP).to(tl.int64)
    head = (bh % heads_kv).to(tl.int64) * GROUP + row % GROUP
    dv = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    tile_row = b * stride_tb + (bh % heads_kv) * stride_th + m // MAP_BLOCK_M
    wait_for_earlier_kernels(DEPENDENT)
    steps, _ = key_steps(counts_ptr, tile_row, q_len, kv_len, BLOCK_N, MAP_BLOCK_N, CAUSAL, MASK)
    active = active_splits(steps, num_splits, short_splits, BLOCK_N, LONG_KEYS)
    rows = q_len * GROUP
    first_partial = bh.to(tl.int64) * num_splits * rows + row
    state = (tl.zeros([BLOCK_DV], tl.float32), tl.full([], float("-inf"), tl.float32), tl.zeros([], tl.float32))
    # The first are read, as far as they are in memory, before it is known how many work: that takes as long.
    s = tl.arange(0, BLOCK_S)
    state = _add_splits(
        state, acc_ptr, stats_ptr, first_partial, rows, s, num_splits, active, dv, V_HEAD_DIM, EXP2_SCALE
    )
    for first in range(BLOCK_S, active, BLOCK_S):
        state = _add_splits(
            state, acc_ptr, stats_ptr, first_partial, rows, first + s, active, active, dv, V_HEAD_DIM, EXP2_SCALE
        )
    out, _, total = state
    out = tl.div_rn(out, tl.broadcast_to(tl.where(total == 0.0, 1.0, total), out.shape))
    out_ptrs = out_ptr + b * stride_ob + head * stride_oh + m * stride_om + dv * stride_od
    ok = dv < V_HEAD_DIM
    if ALONE_WRITES:
        ok = ok & (active > 1)
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=ok)


def launch_combine(
    acc: torch.Tensor,
    stats: torch.Tensor,
    counts: torch.Tensor,
    map_strides: tuple[int, int],
    out: torch.Tensor,
    heads_kv: int,
    kv_len: int,
    config: tuning.SplitKConfig | tuning.HopperConfig,
    num_splits: int | torch.SymInt,
    enabled: int | torch.SymInt,
    constants: dict[str, Any],
) -> None:
    """Combines what the splits left.

    Args:
        acc, stats: float32 ``[B * H_kv, num_splits, L_q * H_q / H_kv, D_v]`` and ``[..., 2]``, at least as long.
        counts, map_strides: of the tile map, and its strides per batch entry and head.
        out: ``[B, H_q, L_q, D_v]``, written.
        heads_kv: H_kv, or H_q after a kernel that packs no heads.
        kv_len: L_kv.
        config, num_splits: of the kernel that ran.
        enabled: 0 or 1, may be symbolic.
        constants: ``MAP_BLOCK_M``, ``MAP_BLOCK_N``, ``CAUSAL``, ``MASK``, ``EXP2_SCALE``; others are left out.
    """
    batch, heads_q, q_len, v_head_dim = out.shape
    group = heads_q // heads_kv
    sizes = [static_int(size) for size in out.shape]
    results = None if None in sizes else math.prod(size for size in sizes if size is not None)
    tile = tuning.choose_combine(config, v_head_dim, results)
    kernel = _combine_kernel if INTERPRETED else wrap_triton(_combine_kernel)
    kernel[(q_len * group * enabled, batch * heads_kv, cdiv(v_head_dim, tile.block_dv))](
        acc,
        stats,
        counts,
        out,
        *out.stride(),
        *map_strides,
        heads_kv,
        q_len,
        kv_len,
        num_splits,
        config.short_splits,
        GROUP=group,
        V_HEAD_DIM=v_head_dim,
        BLOCK_N=config.block_n,
        LONG_KEYS=config.long_keys,
        ALONE_WRITES=isinstance(config, tuning.HopperConfig),
        BLOCK_S=tile.block_s,
        BLOCK_DV=tile.block_dv,
        **{name: constants[name] for name in ("MAP_BLOCK_M", "MAP_BLOCK_N", "CAUSAL", "MASK", "EXP2_SCALE")},
        num_warps=tile.num_warps,
        **dependent_launch(out),
    )
