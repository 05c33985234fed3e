"""Tiled attention for many query rows: prefill.

One program per (tile of query rows, query head, batch). Arithmetic-bound, so the point is to visit no key tile that no
row attends to, and to pay for masking only where a tile is partly masked:

* without a mask, full tiles run with no checks and the last one checks the end of the keys;
* causal (top-left aligned), tiles below the diagonal run with no checks and those on it compare positions;
* with a mask, its tile map lists the full tiles, which run with no checks, and the partial ones, which load the mask.

Shapes: ``query [B, H_q, L_q, D]``, ``key [B, H_kv, L_kv, D]``, ``value [B, H_kv, L_kv, D_v]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from flashpte.kernels import tuning
from flashpte.kernels.combine import Partials, launch_combine
from flashpte.kernels.contract import GivenMap, check_attention
from flashpte.kernels.facts import register
from flashpte.kernels.hopper import launch_hopper, serves
from flashpte.kernels.intervals import Intervals, launch_interval_map, mask_arguments
from flashpte.kernels.launch import (
    attention_shape,
    broadcast_stride,
    cdiv,
    empty_output,
    exponent_scale,
    static_int,
    with_unit_stride,
)
from flashpte.kernels.primitives import (
    INTERPRETED,
    attend_tile,
    index_bounds,
    load_tile,
    normalise,
    score_scale,
    tile_runs,
    visited_key,
)
from flashpte.kernels.tile_map import launch_tile_map, map_strides


@triton.jit
def _tiled_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,  # of intervals, their bounds
    interval_values_ptr,
    tiles_ptr,
    counts_ptr,
    out_ptr,
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
    q_len,
    kv_len,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAP_BLOCK_M: tl.constexpr,
    MAP_BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    TERMS: tl.constexpr,
    INDEX_TERM: tl.constexpr,
    EXP2_SCALE: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
    EDGE_BLOCK_N: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
):
    # The last rows see the most keys under a causal mask: start them first. Query tiles are the innermost grid
    # dimension, so that neighbouring programs share keys and values in L2.
    row_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    first_row = row_tile * BLOCK_M
    m = first_row + tl.arange(0, BLOCK_M)
    q_ptr += b * stride_qb + head * stride_qh + first_row.to(tl.int64) * stride_qm
    r = tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr, r, stride_qm, q_len - first_row, tl.arange(0, BLOCK_D), HEAD_DIM, True, BLOCK_D != HEAD_DIM)
    # Rows past the end repeat the last one, so that every pointer made from them is in range.
    q_rows = q_ptr + tl.minimum(r, q_len - 1 - first_row) * stride_qm
    k_ptr += b * stride_kb + (head // GROUP) * stride_kh
    v_ptr += b * stride_vb + (head // GROUP) * stride_vh
    keys = (k_ptr, stride_kn, v_ptr, stride_vn, kv_len)
    query_rows = (q, q_rows, m, score_scale(scale, EXP2_SCALE))
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    state = (tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), row_max, row_sum)

    # Rows past the end repeat the last one, so that the pointers stay in range.
    safe_m = tl.minimum(m, q_len - 1)
    mask = (q_rows, 0, interval_values_ptr, 0, m, m)
    if MASK == 3:
        interval_values_ptr += b * stride_ib
        bound_rows = mask_ptr + b * stride_mb + safe_m
        lower, upper = index_bounds(bound_rows, stride_bs) if INDEX_TERM else (m, m)
        mask = (bound_rows, stride_bs, interval_values_ptr, stride_it, lower, upper)
    elif MASK != 0:
        mask_rows = mask_ptr + b * stride_mb + head * stride_mh + safe_m.to(tl.int64) * stride_mm
        mask = (mask_rows, stride_mn, interval_values_ptr, 0, m, m)
    tiles = tiles_ptr
    n_full = 0
    edge_start = 0
    first_key = 0
    runs = (0, 0)
    if MASK != 0:
        tile_row = b * stride_tb + head * stride_th + first_row // MAP_BLOCK_M
        tiles = tiles_ptr + tile_row * n_key_tiles
        counts = counts_ptr + tile_row * 4
        n_full = tl.load(counts)
        runs = tile_runs(counts, MAP_BLOCK_N)
        first_key = runs[0]
        # Full tiles that are scattered are walked with the partial ones: a loop whose addresses come from memory runs
        # up to 20% slower.
        full_steps = tl.where(first_key < 0, 0, n_full * (MAP_BLOCK_N // BLOCK_N))
        scattered = tl.where(first_key < 0, n_full, 0)
        edge_steps = (tl.load(counts + 1) + scattered) * (MAP_BLOCK_N // EDGE_BLOCK_N)
    else:
        end = kv_len
        unchecked = kv_len
        if CAUSAL:
            end = tl.minimum(kv_len, first_row + BLOCK_M)
            unchecked = tl.minimum(kv_len, first_row)
        full_steps = unchecked // BLOCK_N
        edge_start = full_steps * BLOCK_N
        edge_steps = tl.cdiv(end - edge_start, EDGE_BLOCK_N)

    for step in tl.range(0, full_steps, num_stages=STAGES):
        start_n = first_key + step * BLOCK_N
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
    # What needs checks: tiles past the end of the keys or on the diagonal, or that the mask shows in part, and full
    # tiles that are scattered.
    for step in tl.range(0, edge_steps, num_stages=EDGE_STAGES):
        if MASK != 0:
            full_edge_steps = n_full * (MAP_BLOCK_N // EDGE_BLOCK_N)
            at = step + tl.where(first_key < 0, 0, full_edge_steps)
            start_n = visited_key(tiles, runs, at, full_edge_steps, MAP_BLOCK_N, EDGE_BLOCK_N)
        else:
            start_n = edge_start + step * EDGE_BLOCK_N
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
            EDGE_BLOCK_N,
            True,
            CAUSAL,
            MASK,
            TERMS,
            INDEX_TERM,
            EXP2_SCALE,
            EXACT,
        )

    acc, row_max, row_sum = state
    dv = tl.arange(0, BLOCK_DV)
    out_ptr += b * stride_ob + head * stride_oh + first_row.to(tl.int64) * stride_om
    out_ptrs = out_ptr + (r * stride_om)[:, None] + (dv * stride_od)[None, :]
    store_ok = (m < q_len)[:, None] & (dv < V_HEAD_DIM)[None, :]
    tl.store(out_ptrs, normalise(acc, row_sum).to(out_ptr.dtype.element_ty), mask=store_ok)


register(_tiled_kernel, "attention")


def launch_tiled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    tiles: torch.Tensor | None,
    counts: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dim_order: Sequence[int],
    config: tuning.TiledConfig | tuning.HopperConfig | None = None,
    intervals: Intervals | None = None,
    out: torch.Tensor | None = None,
    enabled: int | torch.SymInt = 1,
) -> torch.Tensor:
    """Launches the tiled kernel.

    Args:
        query: ``[B, H_q, L_q, D]``, any L_q.
        key, value: ``[B, H_kv, L_kv, D]`` and ``[B, H_kv, L_kv, D_v]``; unit stride in the last dimension or they are
            copied.
        mask: ``[Bm, Hm, Lm, Nm]``, size 1 where broadcast; bool or float.
        tiles, counts: the mask's or the intervals' tile map with the tile of :func:`tuning.tiled_map_block` and
            ``head_group = 1``; made here when ``None``.
        is_causal: top-left aligned.
        scale: factor of the scores.
        dim_order: memory order of the result's dimensions, outermost first.
        config: tile choice, which also says which kernel; by default the current arch's.
        intervals: a mask in another form, instead of ``mask``.
        out: where to write the result; allocated here when ``None``.
        enabled: 0 or 1, may be symbolic: with 0, at run time no program of the attention kernel is launched.

    Returns:
        ``[B, H_q, L_q, D_v]`` in the query's dtype.
    """
    check_attention(query, key, value, mask, is_causal, dim_order, intervals, (GivenMap(tiles, counts, None),))
    batch, heads_q, q_len, head_dim = query.shape
    heads_kv, kv_len, v_head_dim = key.shape[1], key.shape[2], value.shape[3]
    query, key, value = with_unit_stride(query), with_unit_stride(key), with_unit_stride(value)
    if config is None:
        config = _choose(query, key, value, mask, scale)
    if out is None:
        out = empty_output(query, v_head_dim, dim_order)
    map_m, map_n = tuning.tiled_map_block(head_dim, v_head_dim)
    if tiles is None and intervals is not None:
        tiles, counts = launch_interval_map(intervals, kv_len, map_m, map_n)
    elif tiles is None and mask is not None:
        tiles, counts = launch_tile_map(mask, q_len, kv_len, map_m, map_n, 1)
    mask_tensors, mask_strides, interval_strides, mask_flags = mask_arguments(mask, intervals, query)
    tiles_or_any, counts_or_any = (query, query) if tiles is None or counts is None else (tiles, counts)
    tile_strides = (0, 0, 0) if tiles is None else map_strides(tiles)
    constants: dict[str, Any] = {
        "MAP_BLOCK_M": map_m,
        "MAP_BLOCK_N": map_n,
        "CAUSAL": is_causal,
        **mask_flags,
        "EXP2_SCALE": exponent_scale(query.dtype, mask),
    }
    if isinstance(config, tuning.HopperConfig):
        num_splits = 1 if is_causal else _splits(config, query, v_head_dim)
        partials = Partials.make(out, config, _stored_rows(config, num_splits, out))
        launch_hopper(
            config,
            *(query, key, value),
            *(mask_tensors, mask_strides, interval_strides),
            *(tiles_or_any, counts_or_any, tile_strides),
            out,
            partials,
            scale,
            1,
            num_splits,
            enabled,
            constants,
        )
        if static_int(num_splits) != 1:
            several = enabled * torch.sym_min(1, num_splits - 1)
            splits = (config, num_splits)
            launch_combine(partials, counts_or_any, tile_strides[:2], out, heads_q, kv_len, *splits, several, constants)
        return out
    kernel = _tiled_kernel if INTERPRETED else wrap_triton(_tiled_kernel)
    kernel[(cdiv(q_len, config.block_m) * enabled, heads_q, batch)](
        query,
        key,
        value,
        *mask_tensors,
        tiles_or_any,
        counts_or_any,
        out,
        *(broadcast_stride(tensor, d) for tensor in (query, key, value) for d in range(3)),
        *mask_strides,
        *out.stride(),
        *tile_strides,
        *interval_strides,
        q_len,
        kv_len,
        scale,
        GROUP=heads_q // heads_kv,
        HEAD_DIM=head_dim,
        V_HEAD_DIM=v_head_dim,
        BLOCK_D=tuning.padded_head_dim(head_dim),
        BLOCK_DV=tuning.padded_head_dim(v_head_dim),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        EXACT=query.dtype == torch.float32,
        STAGES=config.num_stages,
        EDGE_BLOCK_N=config.edge_block_n,
        EDGE_STAGES=config.edge_stages,
        **constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _splits(config: tuning.HopperConfig, query: torch.Tensor, v_head_dim: int) -> int | torch.SymInt:
    """Into how many splits the keys are cut at most, so that programs fill the GPU."""
    batch, heads_q, q_len, _ = query.shape
    programs = cdiv(q_len, config.block_m) * cdiv(v_head_dim, config.columns) * heads_q * batch
    # A batch or a query may be empty.
    return torch.sym_max(1, torch.sym_min(config.num_splits, config.fill // torch.sym_max(1, programs)))


def _stored_rows(config: tuning.HopperConfig, num_splits: int | torch.SymInt, out: torch.Tensor) -> int | None:
    """Rows of all splits; ``None`` for one split.

    Of a symbolic number of splits as many as there can be: those of ``fill`` programs, of which several may share rows.
    """
    if static_int(num_splits) == 1:
        return None
    static = [static_int(size) for size in (num_splits, *out.shape[:3])]
    if None in static:
        return config.fill // cdiv(out.shape[3], config.columns) * config.block_m
    return math.prod(size for size in static if size is not None)


def _choose(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuning.TiledConfig | tuning.HopperConfig:
    """The current arch's kernel and tile."""
    shape, arch = attention_shape(query, key, value, mask), tuning.current_arch(query.device)
    hopper = tuning.choose_hopper(shape, arch) if serves(query, key, value, scale) else None
    return tuning.choose_tiled(shape, arch) if hopper is None else hopper
