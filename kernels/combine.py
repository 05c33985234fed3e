"""Splits of the keys: how many are active, what they store, and the kernel that combines their results.

Used by the split-K kernel (:mod:`flashpte.kernels.split_k`) and the Hopper kernel (:mod:`flashpte.kernels.hopper`). In
the Hopper kernel, a split that is alone writes the result itself.

For each row, a split stores its unnormalized accumulator, its running maximum (in the units of the scores, see
:mod:`flashpte.kernels.primitives`) and its running sum. A single log-sum-exp would not do. A row whose mask is the
dtype's minimum everywhere has a maximum of about -3.4e38, and adding the logarithm of the sum to it changes nothing.

The split-K kernel stores everything as float32. The Hopper kernel serves many rows, where these bytes matter: for 8
rows with D = 512 and 4,096 keys, they are as many as those of the keys. It stores the accumulator as float16 in units
of a power of two, chosen by the largest value of each row and slice of columns. That adds an eighth to the rounding
error of a bfloat16 result.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from flashpte.kernels import tuning
from flashpte.kernels.call import Launch
from flashpte.kernels.facts import register
from flashpte.kernels.launch import cdiv, dependent_launch, static_int
from flashpte.kernels.mask import KernelMask
from flashpte.kernels.primitives import INTERPRETED, wait_for_earlier_kernels, with_sink


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
    """How many tiles of ``BLOCK_N`` keys must be visited, and how many of those are full. Full tiles come first."""
    if MASK != 0:
        full_steps = tl.load(counts_ptr + tile_row * 4) * (MAP_BLOCK_N // BLOCK_N)
        steps = full_steps + tl.load(counts_ptr + tile_row * 4 + 1) * (MAP_BLOCK_N // BLOCK_N)
    else:
        # A causal mask is aligned to the top left, so no row sees a key beyond the last row.
        steps = tl.cdiv(tl.minimum(kv_len, q_len) if CAUSAL else kv_len, BLOCK_N)
        full_steps = 0 if CAUSAL else kv_len // BLOCK_N
    return steps, full_steps


@triton.jit
def active_splits(steps, num_splits, short_splits, BLOCK_N: tl.constexpr, LONG_KEYS: tl.constexpr):
    """How many of the ``num_splits`` splits are active.

    The number of splits is chosen for the length of the buffer, but the context may be far shorter. With few keys to
    visit, partial results would cost more bytes than the keys.
    """
    active = tl.where(steps * BLOCK_N >= LONG_KEYS, num_splits, tl.minimum(short_splits, num_splits))
    return tl.maximum(tl.minimum(active, steps), 1)


@triton.jit
def share_of(split, active, steps, full_steps, EDGE_WEIGHT: tl.constexpr):
    """First tile of split ``split`` of ``active``. The first ``full_steps`` of all ``steps`` tiles are full.

    A tile that is not full takes as long as ``EDGE_WEIGHT`` full tiles.
    """
    cost = full_steps + (steps - full_steps) * EDGE_WEIGHT
    # split * cost // active without overflow in 32 bits.
    at = split * (cost // active) + split * (cost % active) // active
    return tl.where(at <= full_steps, at, full_steps + (at - full_steps) // EDGE_WEIGHT)


@triton.jit
def _add_splits(
    state,
    partials,  # acc_ptr, stats_ptr, first_partial, rows per split, dv, index of the unit among the stats
    s,
    stored,
    active,
    WIDTH: tl.constexpr,
    STATS: tl.constexpr,
    EXP2_SCALE: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """Adds splits ``s`` to ``state``: accumulator ``[DV]``, maximum, sum. Memory exists for ``stored`` splits."""
    out, row_max, total = state
    acc_ptr, stats_ptr, first_partial, rows, dv, unit = partials
    partial = first_partial + s * rows
    stats = stats_ptr + partial * STATS
    split_max = tl.load(stats, mask=s < stored, other=float("-inf"))
    split_sum = tl.load(stats + 1, mask=s < stored, other=0.0)
    acc_ok = (s < stored)[:, None] & (dv < WIDTH)[None, :]
    acc = tl.load(acc_ptr + partial[:, None] * WIDTH + dv[None, :], mask=acc_ok, other=0.0).to(tl.float32)
    # Memory of inactive splits is uninitialized.
    split_max = tl.where(s < active, split_max, float("-inf"))
    split_sum = tl.where(s < active, split_sum, 0.0)
    new_max = tl.maximum(row_max, tl.max(split_max, 0))
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    weight = tl.exp2((split_max - base) * EXP2_SCALE)
    rescale = tl.exp2((row_max - base) * EXP2_SCALE)
    total = total * rescale + tl.sum(split_sum * weight, 0)
    if HOPPER:
        acc = acc * tl.load(stats + unit, mask=s < stored, other=0.0)[:, None]
    # Ignore the accumulator of a split that saw no key. It may be 0 * inf, from values that do not count either.
    out = out * rescale + tl.sum(tl.where((weight > 0.0)[:, None], acc * weight[:, None], 0.0), 0)
    return out, new_max, total


@triton.jit
def _combine_kernel(
    acc_ptr,  # float32 or float16 [rows of splits, WIDTH]
    stats_ptr,  # float32 [rows of splits, STATS]: running maximum and sum, units of the accumulator
    counts_ptr, out_ptr, stride_ob, stride_oh, stride_om, stride_od, stride_tb, stride_th,
    heads_kv, q_len, kv_len, num_splits, short_splits,
    sinks_ptr,  # [H_q], or None
    GROUP: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    MAP_BLOCK_M: tl.constexpr, MAP_BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr, WIDTH: tl.constexpr, STATS: tl.constexpr,
    SLICE: tl.constexpr,  # columns that share a unit
    CAUSAL: tl.constexpr, MASK: tl.constexpr, LONG_KEYS: tl.constexpr, EXP2_SCALE: tl.constexpr,
    # Whether the Hopper kernel stored the splits. There, a split that is alone writes the result, and other splits
    # store in the format of store_partial.
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
    # Read the first splits that exist in memory before the number of active ones is known, which takes equally long.
    s = tl.arange(0, BLOCK_S)
    partials = (acc_ptr, stats_ptr, first_partial, rows, dv, 2 + tl.program_id(2) * BLOCK_DV // SLICE)
    state = _add_splits(state, partials, s, num_splits, active, WIDTH, STATS, EXP2_SCALE, HOPPER)
    for first in range(BLOCK_S, active, BLOCK_S):
        state = _add_splits(state, partials, first + s, active, active, WIDTH, STATS, EXP2_SCALE, HOPPER)
    out, row_max, total = state
    if sinks_ptr is not None:
        total = with_sink(total, row_max, sinks_ptr, head, EXP2_SCALE)
    out = tl.div_rn(out, tl.broadcast_to(tl.where(total == 0.0, 1.0, total), out.shape))
    if HOPPER:
        dv = dv // 32 * 32 + dv % 8 // 2 * 8 + dv % 32 // 8 * 2 + dv % 2
    out_ptrs = out_ptr + b * stride_ob + head * stride_oh + m * stride_om + dv * stride_od
    ok = dv < V_HEAD_DIM
    if HOPPER:
        ok = ok & (active > 1)
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=ok)


register(_combine_kernel, "attention", early_start="DEPENDENT")


def launch_combine(
    mask: KernelMask, launch: Launch, heads_kv: int, kv_len: int, sinks: torch.Tensor | None = None
) -> None:
    """Launches the kernel that combines the partial results of splits.

    Args:
        mask: the mask that the splits walked.
        launch: the launch whose splits are combined. Its partials have rows in the order
            ``[B * H_kv, num_splits, L_q * H_q / H_kv]``, and possibly unused rows after these.
        heads_kv: H_kv, or H_q after a kernel that does not pack heads.
        kv_len: L_kv.
        sinks: ``[H_q]``, which join the denominators here; ``None`` if there are none.
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
        sinks,
        GROUP=group,
        V_HEAD_DIM=v_head_dim,
        BLOCK_N=config.block_n,
        LONG_KEYS=config.long_keys,
        HOPPER=isinstance(config, tuning.HopperConfig),
        BLOCK_S=tile.block_s,
        BLOCK_DV=tile.block_dv,
        WIDTH=partials.width,
        STATS=partials.numbers,
        SLICE=config.stored_columns if isinstance(config, tuning.HopperConfig) else partials.width,
        **{name: mask.constants[name] for name in ("MAP_BLOCK_M", "MAP_BLOCK_N", "CAUSAL", "MASK", "EXP2_SCALE")},
        num_warps=1,
        **dependent_launch(out),
    )
