"""Tiled attention for many query rows: prefill.

There is one program per (tile of query rows, query head, batch). The kernel is compute-bound, so it skips key tiles
that no row attends to, and pays for masking only in partly masked tiles:

* Without a mask, full tiles run without checks, and the last tile checks the end of the keys.
* With a causal mask (top-left aligned), tiles below the diagonal run without checks, and tiles on it compare positions.
* With a mask, its tile map lists full tiles, which run without checks, and partial tiles, which load the mask.

On sm_90, :func:`launch_tiled` launches the Hopper kernel instead for most 16-bit calls with more than 64 query rows or
a dynamic L_q (:func:`flashpte.kernels.tuning.choose_hopper`).

Shapes: ``query [B, H_q, L_q, D]``, ``key [B, H_kv, L_kv, D]``, ``value [B, H_kv, L_kv, D_v]``.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from flashpte.kernels import tuning
from flashpte.kernels.call import NO_MAP, AttentionCall, Destination, GivenMap, Launch, MapTiling, Partials
from flashpte.kernels.combine import launch_combine
from flashpte.kernels.contract import check_attention
from flashpte.kernels.facts import register
from flashpte.kernels.hopper import launch_hopper, serves
from flashpte.kernels.launch import cdiv, static_int
from flashpte.kernels.mask import kernel_mask, pointers, strides
from flashpte.kernels.primitives import (
    ALL_VISIBLE,
    INTERPRETED,
    attend_tile,
    load_tile,
    mask_of_rows,
    normalise,
    score_scale,
    tile_runs,
    visited_key,
    with_sink,
)


@triton.jit
def _tiled_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, interval_values_ptr, tiles_ptr, counts_ptr, out_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_ob, stride_oh, stride_om, stride_od,
    stride_tb, stride_th, n_key_tiles, stride_bs, stride_ib, stride_it,
    q_len, kv_len, scale,
    sinks_ptr,  # [H_q], or None
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MAP_BLOCK_M: tl.constexpr, MAP_BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, TERMS: tl.constexpr, INDEX_TERM: tl.constexpr, EXP2_SCALE: tl.constexpr,
    EXACT: tl.constexpr, SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr, EDGE_BLOCK_N: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of query rows; see :func:`flashpte.kernels.mask.strides` for the strides."""
    # Under a causal mask, the last rows see the most keys, so they start first. Query tiles are the innermost grid
    # dimension, so that neighboring programs share keys and values in L2.
    row_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    first_row = row_tile * BLOCK_M
    m = first_row + tl.arange(0, BLOCK_M)
    q_ptr += b * stride_qb + head * stride_qh + first_row.to(tl.int64) * stride_qm
    r = tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr, r, stride_qm, q_len - first_row, tl.arange(0, BLOCK_D), HEAD_DIM, True, BLOCK_D > HEAD_DIM)
    q_rest = q
    if BLOCK_REST > 0:
        d = BLOCK_D + tl.arange(0, BLOCK_REST)
        q_rest = load_tile(q_ptr, r, stride_qm, q_len - first_row, d, HEAD_DIM, True, BLOCK_D + BLOCK_REST > HEAD_DIM)
    # Rows past the end repeat the last one, so that every pointer made from them is in range.
    q_rows = q_ptr + tl.minimum(r, q_len - 1 - first_row) * stride_qm
    k_ptr += b * stride_kb + (head // GROUP) * stride_kh
    v_ptr += b * stride_vb + (head // GROUP) * stride_vh
    keys = (k_ptr, stride_kn, v_ptr, stride_vn, kv_len)
    query_rows = (q, q_rest, q_rows, m, score_scale(scale, EXP2_SCALE))
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    state = (tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), row_max, row_sum)

    # Rows past the end repeat the last one, so that the pointers stay in range.
    safe_m = tl.minimum(m, q_len - 1)
    VISIBLE: tl.constexpr = (CAUSAL, MASK, TERMS, INDEX_TERM)
    mask_strides = (stride_mb, stride_mh, stride_mm, stride_mn)
    interval_strides = (stride_bs, stride_ib, stride_it)
    mask = mask_of_rows((mask_ptr, interval_values_ptr), mask_strides, interval_strides, b, head, safe_m, VISIBLE)
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
        # Walk scattered full tiles together with the partial ones. Addresses that come from memory would make the loop
        # over full tiles up to 20% slower.
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

    DIMS: tl.constexpr = (HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_REST, BLOCK_DV)
    PRECISION: tl.constexpr = (EXP2_SCALE, EXACT, SOFTCAP)
    for step in tl.range(0, full_steps, num_stages=STAGES):
        start_n = first_key + step * BLOCK_N
        state = attend_tile(state, query_rows, keys, mask, start_n, DIMS, BLOCK_N, False, ALL_VISIBLE, PRECISION)
    # Edge tiles (past the end of the keys, on the diagonal, or partly masked), and full tiles that are scattered.
    for step in tl.range(0, edge_steps, num_stages=EDGE_STAGES):
        if MASK != 0:
            full_edge_steps = n_full * (MAP_BLOCK_N // EDGE_BLOCK_N)
            at = step + tl.where(first_key < 0, 0, full_edge_steps)
            start_n = visited_key(tiles, runs, at, full_edge_steps, MAP_BLOCK_N, EDGE_BLOCK_N)
        else:
            start_n = edge_start + step * EDGE_BLOCK_N
        state = attend_tile(state, query_rows, keys, mask, start_n, DIMS, EDGE_BLOCK_N, True, VISIBLE, PRECISION)

    acc, row_max, row_sum = state
    if sinks_ptr is not None:
        row_sum = with_sink(row_sum, row_max, sinks_ptr, head, EXP2_SCALE)
    dv = tl.arange(0, BLOCK_DV)
    out_ptr += b * stride_ob + head * stride_oh + first_row.to(tl.int64) * stride_om
    out_ptrs = out_ptr + (r * stride_om)[:, None] + (dv * stride_od)[None, :]
    store_ok = (m < q_len)[:, None] & (dv < V_HEAD_DIM)[None, :]
    tl.store(out_ptrs, normalise(acc, row_sum).to(out_ptr.dtype.element_ty), mask=store_ok)


register(_tiled_kernel, "attention")


def launch_tiled(
    call: AttentionCall, given: GivenMap = NO_MAP, config: tuning.Config | None = None, into: Destination | None = None
) -> torch.Tensor:
    """Launches the tiled kernel, or the Hopper kernel.

    Args:
        call: any L_q.
        given: the mask's or the intervals' tile map with the tile of :func:`tuning.tiled_map_block` and
            ``head_group = 1``; made here if it has no tiles.
        config, into: as for :func:`flashpte.kernels.split_k.launch_split_k`.

    Returns:
        ``[B, H_q, L_q, D_v]`` in the query's dtype.
    """
    check_attention(call, (given,))
    call = call.with_unit_strides()
    config = _choose(call) if config is None else config
    out, enabled = (call.empty_output(), 1) if into is None else into
    mask = kernel_mask(call, given, MapTiling(*tuning.tiled_map_block(call.head_dim, call.v_head_dim)))
    if isinstance(config, tuning.HopperConfig):
        num_splits = 1 if call.is_causal else _splits(config, call)
        partials = Partials.make(out, config, _stored_rows(config, num_splits, out))
        launch = Launch(config, out, partials, num_splits, enabled)
        launch_hopper(call, mask, launch, 1)
        if static_int(num_splits) != 1:
            several = enabled * torch.sym_min(1, num_splits - 1)
            launch_combine(mask, dataclasses.replace(launch, enabled=several), call.heads_q, call.kv_len, call.sinks)
        return out
    assert isinstance(config, tuning.TiledConfig)
    tiles = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "STAGES": config.num_stages}
    edge_tiles = {"EDGE_BLOCK_N": config.edge_block_n, "EDGE_STAGES": config.edge_stages}
    kernel = _tiled_kernel if INTERPRETED else wrap_triton(_tiled_kernel)
    kernel[(cdiv(call.q_len, config.block_m) * enabled, call.heads_q, call.batch)](
        *pointers(call, mask, out),
        *strides(call, mask, out),
        call.q_len,
        call.kv_len,
        call.scale,
        call.sinks,
        **call.constants,
        **call.tile_constants,
        **mask.constants,
        **tiles,
        **edge_tiles,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _splits(config: tuning.HopperConfig, call: AttentionCall) -> int | torch.SymInt:
    """The largest number of splits of the keys, chosen so that programs fill the GPU."""
    slices = cdiv(call.v_head_dim, config.columns)
    programs = cdiv(call.q_len, config.block_m) * slices * call.heads_q * call.batch
    # A batch or a query may be empty.
    return torch.sym_max(1, torch.sym_min(config.num_splits, config.fill // torch.sym_max(1, programs)))


def _stored_rows(config: tuning.HopperConfig, num_splits: int | torch.SymInt, out: torch.Tensor) -> int | None:
    """Rows of partial results of all splits; ``None`` for one split.

    If the number of splits or a size is symbolic, it is the most rows there can be: those of ``fill`` programs, several
    of which may share rows.
    """
    if static_int(num_splits) == 1:
        return None
    static = [static_int(size) for size in (num_splits, *out.shape[:3])]
    if None in static:
        return config.fill // cdiv(out.shape[3], config.columns) * config.block_m
    return math.prod(size for size in static if size is not None)


def _choose(call: AttentionCall) -> tuning.TiledConfig | tuning.HopperConfig:
    """The current arch's kernel and tiles."""
    shape, arch = call.shape(), tuning.current_arch(call.query.device)
    hopper = tuning.choose_hopper(shape, arch) if serves(call) else None
    return tuning.choose_tiled(shape, arch) if hopper is None else hopper
