"""Splits of the keys: how many work, what they leave, and combining it.

Used by the split-K kernel (:mod:`flashpte.kernels.split_k`) and by the kernel for Hopper
(:mod:`flashpte.kernels.hopper`), of which a split that is alone writes the result itself.

A split leaves for every row its unnormalised accumulator, and its running maximum and sum. (Maximum and sum rather than
their log-sum-exp: a row whose mask is nothing but the dtype's minimum has a maximum of about -3.4e38, to which adding
the logarithm of the sum changes nothing.) Of the split-K kernel all are float32. The kernel for Hopper is for many
rows, where these bytes count (for 8 rows of D = 512 and 4,096 keys as many as those of the keys): it leaves the
accumulator as float16, in units (powers of two) that the largest value of each row and slice of columns says, which
adds an eighth to the rounding of a bfloat16 result.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch.library import wrap_triton

from flashpte.kernels import tuning
from flashpte.kernels.call import Launch
from flashpte.kernels.facts import register
from flashpte.kernels.launch import cdiv, dependent_launch, static_int
from flashpte.kernels.mask import KernelMask
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
    # split * cost // active, in 32 bits.
    at = split * (cost // active) + split * (cost % active) // active
    return tl.where(at <= full_steps, at, full_steps + (at - full_steps) // EDGE_WEIGHT)


@triton.jit
def _add_splits(
    state,
    partials,  # acc_ptr, stats_ptr, first_partial and rows from one split to the next, dv, which number is the unit
    s,
    stored,
    active,
    WIDTH: tl.constexpr,
    STATS: tl.constexpr,
    EXP2_SCALE: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """Adds splits ``s`` to ``state``: accumulator ``[DV]``, maximum, sum. Of ``stored`` there is memory to read."""
    out, row_max, total = state
    acc_ptr, stats_ptr, first_partial, rows, dv, unit = partials
    partial = first_partial + s * rows
    stats = stats_ptr + partial * STATS
    split_max = tl.load(stats, mask=s < stored, other=float("-inf"))
    split_sum = tl.load(stats + 1, mask=s < stored, other=0.0)
    acc_ok = (s < stored)[:, None] & (dv < WIDTH)[None, :]
    acc = tl.load(acc_ptr + partial[:, None] * WIDTH + dv[None, :], mask=acc_ok, other=0.0).to(tl.float32)
    # What lies behind the active splits is anything.
    split_max = tl.where(s < active, split_max, float("-inf"))
    split_sum = tl.where(s < active, split_sum, 0.0)
    new_max = tl.maximum(row_max, tl.max(split_max, 0))
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    weight = tl.exp2((split_max - base) * EXP2_SCALE)
    rescale = tl.exp2((row_max - base) * EXP2_SCALE)
    total = total * rescale + tl.sum(split_sum * weight, 0)
    if HOPPER:
        acc = acc * tl.load(stats + unit, mask=s < stored, other=0.0)[:, None]
    # What a split holds that saw no key does not count: it may be 0 * inf, from values that do not count either.
    out = out * rescale + tl.sum(tl.where((weight > 0.0)[:, None], acc * weight[:, None], 0.0), 0)
    return out, new_max, total


@triton.jit
def _combine_kernel(
    acc_ptr,  # float32 or float16 [rows of splits, WIDTH]
    stats_ptr,  # float32 [rows of splits, STATS]: running maximum and sum, units of the accumulator
    counts_ptr, out_ptr, stride_ob, stride_oh, stride_om, stride_od, stride_tb, stride_th,
    heads_kv, q_len, kv_len, num_splits, short_splits,
    GROUP: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    MAP_BLOCK_M: tl.constexpr, MAP_BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr, WIDTH: tl.constexpr, STATS: tl.constexpr,
    SLICE: tl.constexpr,  # columns that share a unit
    CAUSAL: tl.constexpr, MASK: tl.constexpr, LONG_KEYS: tl.constexpr, EXP2_SCALE: tl.constexpr,
    # After the kernel for Hopper, in which a split that is alone writes the result; others store what its
    # _store_partial says.
    HOPPER: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Combines the splits of one row, in ``BLOCK_DV`` columns."""
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
    partials = (acc_ptr, stats_ptr, first_partial, rows, dv, 2 + tl.program_id(2) * BLOCK_DV // SLICE)
    state = _add_splits(state, partials, s, num_splits, active, WIDTH, STATS, EXP2_SCALE, HOPPER)
    for first in range(BLOCK_S, active, BLOCK_S):
        state = _add_splits(state, partials, first + s, active, active, WIDTH, STATS, EXP2_SCALE, HOPPER)
    out, _, total = state
    out = tl.div_rn(out, tl.broadcast_to(tl.where(total == 0.0, 1.0, total), out.shape))
    if HOPPER:
        dv = dv // 32 * 32 + dv % 8 // 2 * 8 + dv % 32 // 8 * 2 + dv % 2
    out_ptrs = out_ptr + b * stride_ob + head * stride_oh + m * stride_om + dv * stride_od
    ok = dv < V_HEAD_DIM
    if HOPPER:
        ok = ok & (active > 1)
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=ok)


register(_combine_kernel, "attention", early_start="DEPENDENT")


def launch_combine(mask: KernelMask, launch: Launch, heads_kv: int, kv_len: int) -> None:
    """Combines what the splits stored.

    Args:
        mask: the mask that the splits walked.
        launch: the launch whose splits are combined; its partials have rows in the order
            ``[B * H_kv, num_splits, L_q * H_q / H_kv]``, and maybe more.
        heads_kv: H_kv, or H_q after a kernel that packs no heads.
        kv_len: L_kv.
    """
    config, partials, out = launch.config, launch.partials, launch.out
    assert not isinstance(config, tuning.TiledConfig)
    batch, heads_q, q_len, v_head_dim = out.shape
    group = heads_q // heads_kv
    sizes = [static_int(size) for size in out.shape]
    results = None if None in sizes else math.prod(size for size in sizes if size is not None)
    tile = tuning.choose_combine(config, v_head_dim, results)
    kernel = _combine_kernel if INTERPRETED else wrap_triton(_combine_kernel)
    kernel[(q_len * group * launch.enabled, batch * heads_kv, cdiv(partials.width, tile.block_dv))](
        partials.acc,
        partials.stats,
        mask.counts,
        out,
        *out.stride(),
        *mask.map_strides[:2],
        heads_kv,
        q_len,
        kv_len,
        launch.num_splits,
        config.short_splits,
        GROUP=group,
        V_HEAD_DIM=v_head_dim,
        BLOCK_N=config.block_n,
        LONG_KEYS=config.long_keys,
        HOPPER=isinstance(config, tuning.HopperConfig),
        BLOCK_S=tile.block_s,
        BLOCK_DV=tile.block_dv,
        WIDTH=partials.width,
        STATS=partials.numbers,
        SLICE=config.block_dv if isinstance(config, tuning.HopperConfig) else partials.width,
        **{name: mask.constants[name] for name in ("MAP_BLOCK_M", "MAP_BLOCK_N", "CAUSAL", "MASK", "EXP2_SCALE")},
        num_warps=1,
        **dependent_launch(out),
    )
