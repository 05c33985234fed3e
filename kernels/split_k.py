"""Split-K attention for few query rows: decode (L_q = 1) and speculative-decoding verify (L_q = 2..16).

One program per (split of the keys, tile of packed rows, batch x key/value head). The ``L_q x H_q / H_kv`` query rows
that share a key/value head are packed into the rows of one tile, so that they read each key and value once and verify
costs about as much as decode. Every program keeps an online softmax over its share of the keys; a second kernel
combines the splits (:mod:`flashpte.kernels.combine`). With one split the first kernel writes the result itself.

Bound by memory: the keys and values are read once per tile of packed rows. With a tile map, the splits divide the
live tiles, so the cost follows the context and not the buffer.

Shapes: ``query [B, H_q, L_q, D]``, ``key [B, H_kv, L_kv, D]``, ``value [B, H_kv, L_kv, D_v]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from flashpte.kernels import tuning
from flashpte.kernels.combine import Partials, active_splits, key_steps, launch_combine, share_of
from flashpte.kernels.contract import MAX_ROWS, GivenMap, check_attention
from flashpte.kernels.facts import register
from flashpte.kernels.hopper import launch_hopper, serves
from flashpte.kernels.intervals import Intervals, launch_interval_map, mask_arguments
from flashpte.kernels.launch import (
    attention_shape,
    cdiv,
    dependent_launch,
    empty_output,
    exponent_scale,
    static_int,
    with_unit_stride,
)
from flashpte.kernels.primitives import (
    INTERPRETED,
    attend_tile,
    consecutive_end,
    index_bounds,
    let_dependents_start,
    normalise,
    score_scale,
    tile_runs,
    visited_key,
    wait_for_earlier_kernels,
)
from flashpte.kernels.tile_map import launch_tile_map, map_strides


@triton.jit
def _split_k_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,  # of intervals, their bounds
    interval_values_ptr,
    tiles_ptr,
    counts_ptr,
    out_ptr,
    acc_ptr,  # float32 [B * H_kv, num_splits, L_q * GROUP, D_v]
    stats_ptr,  # float32 [B * H_kv, num_splits, L_q * GROUP, 2]: running maximum and sum
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    stride_ob,
    stride_oh,
    stride_om,
    stride_od,
    stride_tb,  # of the tile map, in rows of tiles
    stride_th,
    n_key_tiles,
    stride_bs,  # of the intervals: bounds per side, values per batch entry and term
    stride_ib,
    stride_it,
    heads_kv,
    q_len,
    kv_len,
    scale,
    short_splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAP_BLOCK_M: tl.constexpr,  # holds all rows
    MAP_BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    TERMS: tl.constexpr,
    INDEX_TERM: tl.constexpr,
    SINGLE_SPLIT: tl.constexpr,
    SEPARATE_FULL: tl.constexpr,
    LONG_KEYS: tl.constexpr,
    EXP2_SCALE: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
    EDGE_WEIGHT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    # Splits are the outermost grid dimension: those that have nothing to do come last, and the others spread evenly.
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    bh = tl.program_id(1)
    b = (bh // heads_kv).to(tl.int64)
    h = (bh % heads_kv).to(tl.int64)
    tile_row = b * stride_tb + h * stride_th
    wait_for_earlier_kernels(DEPENDENT)
    steps, full_steps = key_steps(counts_ptr, tile_row, q_len, kv_len, BLOCK_N, MAP_BLOCK_N, CAUSAL, MASK)
    active = active_splits(steps, num_splits, short_splits, BLOCK_N, LONG_KEYS)
    if split >= active:
        return
    n_rows = q_len * GROUP
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = row < n_rows
    # Rows past the end repeat the last one, so that every pointer made from them is in range.
    safe_row = tl.minimum(row, n_rows - 1)
    m = safe_row // GROUP
    head = h * GROUP + safe_row % GROUP
    d = tl.arange(0, BLOCK_D)
    q_rows = q_ptr + b * stride_qb + head * stride_qh + m * stride_qm
    q = tl.load(q_rows[:, None] + d[None, :], mask=row_ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    mask = (q_rows, 0, interval_values_ptr, 0, m, m)
    if MASK == 3:
        bound_rows = mask_ptr + b * stride_mb + m
        interval_values_ptr += b * stride_ib
        lower, upper = index_bounds(bound_rows, stride_bs) if INDEX_TERM else (m, m)
        mask = (bound_rows, stride_bs, interval_values_ptr, stride_it, lower, upper)
    elif MASK != 0:
        mask_rows = mask_ptr + b * stride_mb + head * stride_mh + m.to(tl.int64) * stride_mm
        mask = (mask_rows, stride_mn, interval_values_ptr, 0, m, m)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    keys = (k_ptr, stride_kn, v_ptr, stride_vn, kv_len)
    query_rows = (q, q_rows, m, score_scale(scale, EXP2_SCALE))

    row_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_R], tl.float32)
    state = (tl.zeros([BLOCK_R, BLOCK_DV], tl.float32), row_max, row_sum)
    tiles = tiles_ptr + tile_row * n_key_tiles
    runs = (0, 0)
    if MASK != 0:
        runs = tile_runs(counts_ptr + tile_row * 4, MAP_BLOCK_N)
    first = share_of(split, active, steps, full_steps, EDGE_WEIGHT)
    last = share_of(split + 1, active, steps, full_steps, EDGE_WEIGHT)
    edge = tl.minimum(tl.maximum(first, full_steps), last)
    first_key = first * BLOCK_N
    if not SEPARATE_FULL:
        edge = first
    elif MASK != 0:
        if runs[0] < 0:
            edge = consecutive_end(tiles, first, edge, MAP_BLOCK_N, BLOCK_N)
        first_key = visited_key(tiles, runs, first, full_steps, MAP_BLOCK_N, BLOCK_N)
    for step in tl.range(first, edge if SEPARATE_FULL else first, num_stages=STAGES):
        start_n = first_key + (step - first) * BLOCK_N
        state = attend_tile(
            state,
            query_rows,
            keys,
            mask,
            start_n,
            HEAD_DIM,
            V_HEAD_DIM,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_N,
            False,
            False,
            0,
            0,
            0,
            EXP2_SCALE,
            EXACT,
        )
    # What needs checks: tiles past the end of the keys, tiles that the mask shows in part, scattered full tiles.
    for step in tl.range(edge, last, num_stages=1 if SEPARATE_FULL else STAGES):
        start_n = step * BLOCK_N
        if MASK != 0:
            start_n = visited_key(tiles, runs, step, full_steps, MAP_BLOCK_N, BLOCK_N)
        state = attend_tile(
            state,
            query_rows,
            keys,
            mask,
            start_n,
            HEAD_DIM,
            V_HEAD_DIM,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_N,
            True,
            CAUSAL,
            MASK,
            TERMS,
            INDEX_TERM,
            EXP2_SCALE,
            EXACT,
            EARLY_VALUES=SEPARATE_FULL and BLOCK_R <= 16 and BLOCK_DV <= 256,
        )

    let_dependents_start(DEPENDENT)
    acc, row_max, row_sum = state
    dv = tl.arange(0, BLOCK_DV)
    store_ok = row_ok[:, None] & (dv < V_HEAD_DIM)[None, :]
    if SINGLE_SPLIT:
        out_ptrs = out_ptr + b * stride_ob + (head * stride_oh + m.to(tl.int64) * stride_om)[:, None]
        out = normalise(acc, row_sum).to(out_ptr.dtype.element_ty)
        tl.store(out_ptrs + dv[None, :] * stride_od, out, mask=store_ok)
    else:
        partial = (bh.to(tl.int64) * num_splits + split) * n_rows + row
        tl.store(acc_ptr + partial[:, None] * V_HEAD_DIM + dv[None, :], acc, mask=store_ok)
        tl.store(stats_ptr + partial * 2, row_max, mask=row_ok)
        tl.store(stats_ptr + partial * 2 + 1, row_sum, mask=row_ok)


register(_split_k_kernel, "attention", early_start="DEPENDENT")


def launch_split_k(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    tiles: torch.Tensor | None,
    counts: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dim_order: Sequence[int],
    config: tuning.SplitKConfig | tuning.HopperConfig | None = None,
    intervals: Intervals | None = None,
    out: torch.Tensor | None = None,
    enabled: int | torch.SymInt = 1,
    map_block_n: int = tuning.SPLIT_K_MAP_BLOCK_N,
) -> torch.Tensor:
    """Launches the split-K kernels.

    Args:
        query: ``[B, H_q, L_q, D]``; L_q at most 16 (a symbolic L_q is taken to be).
        key, value: ``[B, H_kv, L_kv, D]`` and ``[B, H_kv, L_kv, D_v]``; unit stride in the last dimension or they are
            copied.
        mask: ``[Bm, Hm, Lm, Nm]``, size 1 where broadcast; bool or float.
        tiles, counts: the mask's or the intervals' tile map with ``block_m = 16``,
            ``block_n =`` :data:`tuning.SPLIT_K_MAP_BLOCK_N`, ``head_group = H_q / H_kv`` and ``row_tiles = 1``; made
            here when ``None``.
        is_causal: top-left aligned.
        scale: factor of the scores.
        dim_order: memory order of the result's dimensions, outermost first.
        config: tile choice, which also says which kernel; by default the current arch's.
        intervals: a mask in another form, instead of ``mask``.
        out: where to write the result; allocated here when ``None``.
        map_block_n: keys per tile of the map, where it is not :data:`tuning.SPLIT_K_MAP_BLOCK_N`.
        enabled: 0 or 1, may be symbolic: with 0, at run time no program of the attention kernels is launched.

    Returns:
        ``[B, H_q, L_q, D_v]`` in the query's dtype.
    """
    maps = (GivenMap(tiles, counts, map_block_n),)
    check_attention(query, key, value, mask, is_causal, dim_order, intervals, maps, MAX_ROWS)
    batch, heads_q, q_len, head_dim = query.shape
    heads_kv, kv_len, v_head_dim = key.shape[1], key.shape[2], value.shape[3]
    static_rows = static_int(q_len)
    group = heads_q // heads_kv
    query, key, value = with_unit_stride(query), with_unit_stride(key), with_unit_stride(value)
    if config is None:
        config = _choose(query, key, value, mask, is_causal, scale)
    if out is None:
        out = empty_output(query, v_head_dim, dim_order)
    if tiles is None and intervals is not None:
        tiles, counts = launch_interval_map(intervals, kv_len, MAX_ROWS, map_block_n, 1)
    elif tiles is None and mask is not None:
        tiles, counts = launch_tile_map(mask, q_len, kv_len, MAX_ROWS, map_block_n, group, 1)
    mask_tensors, mask_strides, interval_strides, mask_flags = mask_arguments(mask, intervals, query)
    counts_or_any = query if counts is None else counts
    tiles_or_any = query if tiles is None else tiles
    tile_strides = (0, 0, 0) if tiles is None else map_strides(tiles)
    n_rows = q_len * group
    single = config.num_splits == 1
    # Of a dynamic L_q as many rows as there can be here, not as many as the program admits.
    stored_rows = batch * heads_q * config.num_splits * (MAX_ROWS if static_rows is None else static_rows)
    partials = Partials.make(out, config, None if single else stored_rows)
    exp2_scale = exponent_scale(query.dtype, mask)
    constants: dict[str, Any] = {
        "MAP_BLOCK_M": MAX_ROWS,
        "MAP_BLOCK_N": map_block_n,
        "CAUSAL": is_causal,
        **mask_flags,
        "EXP2_SCALE": exp2_scale,
    }
    if isinstance(config, tuning.HopperConfig):
        launch_hopper(
            config,
            *(query, key, value),
            *(mask_tensors, mask_strides, interval_strides),
            *(tiles_or_any, counts_or_any, tile_strides),
            out,
            partials,
            scale,
            group,
            config.num_splits,
            enabled,
            constants,
        )
    else:
        split_k = _split_k_kernel if INTERPRETED else wrap_triton(_split_k_kernel)
        split_k[(cdiv(n_rows, config.block_rows), batch * heads_kv, config.num_splits * enabled)](
            query,
            key,
            value,
            *mask_tensors,
            tiles_or_any,
            counts_or_any,
            out,
            partials.acc,
            partials.stats,
            query.stride(0),
            query.stride(1),
            query.stride(2),
            key.stride(0),
            key.stride(1),
            key.stride(2),
            value.stride(0),
            value.stride(1),
            value.stride(2),
            *mask_strides,
            *out.stride(),
            *tile_strides,
            *interval_strides,
            heads_kv,
            q_len,
            kv_len,
            scale,
            config.short_splits,
            GROUP=group,
            HEAD_DIM=head_dim,
            V_HEAD_DIM=v_head_dim,
            BLOCK_D=tuning.padded_head_dim(head_dim),
            BLOCK_DV=tuning.padded_head_dim(v_head_dim),
            BLOCK_R=config.block_rows,
            BLOCK_N=config.block_n,
            **constants,
            SINGLE_SPLIT=single,
            SEPARATE_FULL=config.separate_full,
            LONG_KEYS=config.long_keys,
            EXACT=query.dtype == torch.float32,
            STAGES=config.num_stages,
            EDGE_WEIGHT=config.edge_weight,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **dependent_launch(query),
        )
    if not single:
        splits = (config, config.num_splits)
        launch_combine(partials, counts_or_any, tile_strides[:2], out, heads_kv, kv_len, *splits, enabled, constants)
    return out


def _choose(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuning.SplitKConfig | tuning.HopperConfig:
    """The current arch's kernel and tile."""
    shape, arch = attention_shape(query, key, value, mask), tuning.current_arch(query.device)
    # Hopper's does not split the keys of a causal mask.
    hopper = None if is_causal or not serves(query, key, value, scale) else tuning.choose_hopper_split_k(shape, arch)
    return tuning.choose_split_k(shape, arch) if hopper is None else hopper
