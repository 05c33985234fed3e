"""Split-K attention for few query rows: decode (L_q = 1) and speculative-decoding verify (L_q = 2..16).

There is one program per (split of the keys, tile of packed rows, batch x key/value head). The ``L_q x H_q / H_kv``
query rows that share a key/value head are packed into the rows of one tile. They read each key and value once, so
verify costs about as much as decode. Every program keeps an online softmax over its share of the keys, and a second
kernel combines the splits (:mod:`flashpte.kernels.combine`). With one split, the first kernel writes the result itself.

The kernel is memory-bound. It reads the keys and values once per tile of packed rows. With a tile map, the splits
divide the live tiles, so the cost follows the context and not the buffer.

On sm_90, :func:`launch_split_k` launches the Hopper kernel instead for most 16-bit calls with more than 16 packed rows
(:func:`flashpte.kernels.tuning.choose_hopper_split_k`).

Shapes: ``query [B, H_q, L_q, D]``, ``key [B, H_kv, L_kv, D]``, ``value [B, H_kv, L_kv, D_v]``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from flashpte.kernels import tuning
from flashpte.kernels.call import NO_SPLIT_K_MAP, AttentionCall, Destination, GivenMap, Launch, MapTiling, Partials
from flashpte.kernels.combine import active_splits, key_steps, launch_combine, share_of
from flashpte.kernels.contract import MAX_ROWS, check_attention
from flashpte.kernels.facts import register
from flashpte.kernels.hopper import launch_hopper, serves
from flashpte.kernels.launch import cdiv, dependent_launch, static_int
from flashpte.kernels.mask import kernel_mask, pointers, strides
from flashpte.kernels.primitives import (
    ALL_VISIBLE,
    INTERPRETED,
    attend_tile,
    consecutive_end,
    let_dependents_start,
    mask_of_rows,
    normalise,
    score_scale,
    tile_runs,
    visited_key,
    wait_for_earlier_kernels,
    with_sink,
)


@triton.jit
def _split_k_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, interval_values_ptr, tiles_ptr, counts_ptr, out_ptr,
    acc_ptr,  # float32 [B * H_kv, num_splits, L_q * GROUP, D_v]
    stats_ptr,  # float32 [B * H_kv, num_splits, L_q * GROUP, 2]: running maximum and sum
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_ob, stride_oh, stride_om, stride_od,
    stride_tb, stride_th, n_key_tiles, stride_bs, stride_ib, stride_it,
    heads_kv, q_len, kv_len, scale, short_splits,
    sinks_ptr,  # [H_q] if there are sinks and one split, else None
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    MAP_BLOCK_M: tl.constexpr,  # holds all rows
    MAP_BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, TERMS: tl.constexpr, INDEX_TERM: tl.constexpr, EXP2_SCALE: tl.constexpr,
    SINGLE_SPLIT: tl.constexpr, SEPARATE_FULL: tl.constexpr, LONG_KEYS: tl.constexpr, EXACT: tl.constexpr,
    SOFTCAP: tl.constexpr, STAGES: tl.constexpr, EDGE_WEIGHT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Attention of packed rows to one split of the keys; see :func:`flashpte.kernels.mask.strides` for the strides."""
    # Splits are the outermost grid dimension, so inactive splits come last and the others spread evenly over the GPU.
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
    q_rest = q
    if BLOCK_REST > 0:
        d = BLOCK_D + tl.arange(0, BLOCK_REST)
        q_rest = tl.load(q_rows[:, None] + d[None, :], mask=row_ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    VISIBLE: tl.constexpr = (CAUSAL, MASK, TERMS, INDEX_TERM)
    mask_strides = (stride_mb, stride_mh, stride_mm, stride_mn)
    interval_strides = (stride_bs, stride_ib, stride_it)
    mask = mask_of_rows((mask_ptr, interval_values_ptr), mask_strides, interval_strides, b, head, m, VISIBLE)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    keys = (k_ptr, stride_kn, v_ptr, stride_vn, kv_len)
    query_rows = (q, q_rest, q_rows, m, score_scale(scale, EXP2_SCALE))

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
    DIMS: tl.constexpr = (HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_REST, BLOCK_DV)
    PRECISION: tl.constexpr = (EXP2_SCALE, EXACT, SOFTCAP)
    EARLY: tl.constexpr = SEPARATE_FULL and BLOCK_R <= 16 and BLOCK_DV <= 256
    for step in tl.range(first, edge if SEPARATE_FULL else first, num_stages=STAGES):
        start_n = first_key + (step - first) * BLOCK_N
        state = attend_tile(state, query_rows, keys, mask, start_n, DIMS, BLOCK_N, False, ALL_VISIBLE, PRECISION)
    # Edge tiles (past the end of the keys, or partly masked), and full tiles that are scattered.
    for step in tl.range(edge, last, num_stages=1 if SEPARATE_FULL else STAGES):
        start_n = step * BLOCK_N
        if MASK != 0:
            start_n = visited_key(tiles, runs, step, full_steps, MAP_BLOCK_N, BLOCK_N)
        state = attend_tile(state, query_rows, keys, mask, start_n, DIMS, BLOCK_N, True, VISIBLE, PRECISION, EARLY)

    let_dependents_start(DEPENDENT)
    acc, row_max, row_sum = state
    dv = tl.arange(0, BLOCK_DV)
    store_ok = row_ok[:, None] & (dv < V_HEAD_DIM)[None, :]
    if SINGLE_SPLIT:
        out_ptrs = out_ptr + b * stride_ob + (head * stride_oh + m.to(tl.int64) * stride_om)[:, None]
        if sinks_ptr is not None:
            row_sum = with_sink(row_sum, row_max, sinks_ptr, head, EXP2_SCALE)
        out = normalise(acc, row_sum).to(out_ptr.dtype.element_ty)
        tl.store(out_ptrs + dv[None, :] * stride_od, out, mask=store_ok)
    else:
        partial = (bh.to(tl.int64) * num_splits + split) * n_rows + row
        tl.store(acc_ptr + partial[:, None] * V_HEAD_DIM + dv[None, :], acc, mask=store_ok)
        tl.store(stats_ptr + partial * 2, row_max, mask=row_ok)
        tl.store(stats_ptr + partial * 2 + 1, row_sum, mask=row_ok)


register(_split_k_kernel, "attention", early_start="DEPENDENT")


def launch_split_k(
    call: AttentionCall,
    given: GivenMap = NO_SPLIT_K_MAP,
    config: tuning.Config | None = None,
    into: Destination | None = None,
) -> torch.Tensor:
    """Launches the split-K kernels.

    Args:
        call: L_q must be at most 16. A symbolic L_q is assumed to be.
        given: the mask's or the intervals' tile map with ``block_m = 16``, ``head_group = H_q / H_kv`` and
            ``row_tiles = 1``; made here if it has no tiles.
        config: tile choice, whose type also selects the kernel; by default the current arch's choice.
        into: where to write the result; allocated here if ``None``.

    Returns:
        ``[B, H_q, L_q, D_v]`` in the query's dtype.
    """
    check_attention(call, (given,), MAX_ROWS)
    call = call.with_unit_strides()
    group, q_len, heads_kv = call.group, call.q_len, call.heads_kv
    config = _choose(call) if config is None else config
    out, enabled = (call.empty_output(), 1) if into is None else into
    block_n = tuning.SPLIT_K_MAP_BLOCK_N if given.block_n is None else given.block_n
    mask = kernel_mask(call, given, MapTiling(MAX_ROWS, block_n, group, row_tiles=1))
    assert not isinstance(config, tuning.TiledConfig)
    single = config.num_splits == 1
    # For a dynamic L_q, store as many rows as this kernel can get, not as many as the program admits.
    static_rows = static_int(q_len)
    stored_rows = call.batch * call.heads_q * config.num_splits * (MAX_ROWS if static_rows is None else static_rows)
    partials = Partials.make(out, config, None if single else stored_rows)
    launch = Launch(config, out, partials, config.num_splits, enabled)
    if isinstance(config, tuning.HopperConfig):
        launch_hopper(call, mask, launch, group)
    else:
        tiles = {"BLOCK_R": config.block_rows, "BLOCK_N": config.block_n, "STAGES": config.num_stages}
        splits = {"SINGLE_SPLIT": single, "LONG_KEYS": config.long_keys, "EDGE_WEIGHT": config.edge_weight}
        split_k = _split_k_kernel if INTERPRETED else wrap_triton(_split_k_kernel)
        split_k[(cdiv(q_len * group, config.block_rows), call.batch * heads_kv, config.num_splits * enabled)](
            *pointers(call, mask, out),
            partials.acc,
            partials.stats,
            *strides(call, mask, out),
            heads_kv,
            q_len,
            call.kv_len,
            call.scale,
            config.short_splits,
            call.sinks if single else None,
            **call.constants,
            **call.tile_constants,
            **mask.constants,
            **tiles,
            **splits,
            SEPARATE_FULL=config.separate_full,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **dependent_launch(call.query),
        )
    if not single:
        launch_combine(mask, launch, heads_kv, call.kv_len, call.sinks)
    return out


def _choose(call: AttentionCall) -> tuning.SplitKConfig | tuning.HopperConfig:
    """The current arch's kernel and tiles."""
    shape, arch = call.shape(), tuning.current_arch(call.query.device)
    # The Hopper kernel does not split the keys of a causal mask.
    hopper = None if call.is_causal or not serves(call) else tuning.choose_hopper_split_k(shape, arch)
    return tuning.choose_split_k(shape, arch) if hopper is None else hopper
