"""The kernel: places programs, lays out shared memory and starts the warps."""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashpte.kernels.combine import active_splits
from flashpte.kernels.hopper.consume import consumer
from flashpte.kernels.hopper.produce import producer


@gluon.jit
def _place(kv_len, heads, WIDTH: gl.constexpr, KV_GROUP: gl.constexpr, V_SLICES: gl.constexpr):
    """Row tile, head, batch entry and slice of V of a program.

    The grid is ``(row tiles x V_SLICES x heads, B, splits)``. (Only its first dimension may be above 65,535.) Programs
    start in the order of their index. The last rows see the most keys under a causal mask: they start first, in all
    heads, so that no long program is left over at the end; but of so many heads at a time as have their keys and values
    in L2 together.
    """
    KEYS: gl.constexpr = (16 << 20) // (WIDTH * 2)
    columns = gl.num_programs(0) // heads
    b = gl.program_id(1)
    index = gl.program_id(0)
    together = gl.minimum(gl.maximum(KEYS // gl.maximum(kv_len, 1), 1) * KV_GROUP, heads)
    first_head = index // (columns * together) * together
    index -= first_head * columns
    together = gl.minimum(together, heads - first_head)
    row_tile = columns // V_SLICES - 1 - index // (together * V_SLICES)
    head = first_head + index // V_SLICES % together
    return row_tile, head.to(gl.int64), b.to(gl.int64), index % V_SLICES


@gluon.jit
def _hopper_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,  # of intervals, their bounds
    interval_values_ptr,
    tiles_ptr,
    counts_ptr,
    out_ptr,
    acc_ptr,  # float32 [B, heads, num_splits, L_q * PACK, D_v]
    stats_ptr,  # float32 [B, heads, num_splits, L_q * PACK, 2]: running maximum and sum
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
    heads,  # H_q / PACK
    q_len,
    kv_len,
    scale,  # positive
    short_splits,
    # Inductor writes the parameters out where only Triton's language is known.
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAP_BLOCK_M: tl.constexpr,
    MAP_BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    TERMS: tl.constexpr,
    INDEX_TERM: tl.constexpr,
    SHARE_ROWS: tl.constexpr,
    SINGLE_SPLIT: tl.constexpr,
    LONG_KEYS: tl.constexpr,
    EXP2_SCALE: tl.constexpr,
    STAGES: tl.constexpr,
    V_STAGES: tl.constexpr,
    CONSUMER_REGISTERS: tl.constexpr,
    PRODUCER_REGISTERS: tl.constexpr,
):
    BLOCK_M: gl.constexpr = 64 if SHARE_ROWS else 128
    # Columns of V of a program.
    WIDTH: gl.constexpr = 2 * BLOCK_DV if SHARE_ROWS else BLOCK_DV
    V_SLICES: gl.constexpr = (V_HEAD_DIM + WIDTH - 1) // WIDTH
    KV_GROUP: gl.constexpr = GROUP // PACK
    row_tile, head, b, dv_slice = _place(kv_len, heads, HEAD_DIM + V_HEAD_DIM, KV_GROUP, V_SLICES)
    dv_first = dv_slice * WIDTH
    first_row = row_tile * BLOCK_M
    n_rows = q_len * PACK
    q_ptr += b * stride_qb + head * PACK * stride_qh
    k_ptr += b * stride_kb + (head // KV_GROUP) * stride_kh
    v_ptr += b * stride_vb + (head // KV_GROUP) * stride_vh + dv_first
    out_ptr += b * stride_ob + head * PACK * stride_oh + dv_first * stride_od
    mask_ptr += b * stride_mb + head * PACK * stride_mh
    interval_values_ptr += b * stride_ib
    tiles = tiles_ptr
    if MASK != 0:
        tile_row = b * stride_tb + head * stride_th + first_row // PACK // MAP_BLOCK_M
        tiles = tiles_ptr + tile_row * n_key_tiles
        n_full = gl.load(counts_ptr + tile_row * 2) * (MAP_BLOCK_N // BLOCK_N)
        n_listed = n_full + gl.load(counts_ptr + tile_row * 2 + 1) * (MAP_BLOCK_N // BLOCK_N)
    else:
        end = kv_len
        n_full = kv_len // BLOCK_N
        if CAUSAL:
            end = gl.minimum(kv_len, (first_row + BLOCK_M - 1) // PACK + 1)
            n_full = gl.minimum(kv_len, first_row // PACK) // BLOCK_N
        n_listed = gl.maximum(gl.cdiv(end, BLOCK_N), 1)
    first_step = 0
    active = 1
    if not SINGLE_SPLIT:
        split = gl.program_id(2)
        num_splits = gl.num_programs(2)
        active = active_splits(n_listed, num_splits, short_splits, BLOCK_N, LONG_KEYS)
        if split >= active:
            return
        first_step = (split.to(gl.int64) * n_listed // active).to(gl.int32)
        n_listed = ((split + 1).to(gl.int64) * n_listed // active).to(gl.int32) - first_step
        n_full = gl.minimum(gl.maximum(n_full - first_step, 0), n_listed)
        first_partial = ((b * heads + head) * num_splits + split) * n_rows
        acc_ptr += first_partial * V_HEAD_DIM + dv_first
        stats_ptr += first_partial * 2

    dtype: gl.constexpr = k_ptr.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q0 = gl.allocate_shared_memory(dtype, [64, BLOCK_D], SHARED)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], SHARED)
    v0 = gl.allocate_shared_memory(dtype, [V_STAGES, BLOCK_N, BLOCK_DV], SHARED)
    # What the second consumer has of its own: rows, or columns of V.
    if SHARE_ROWS:
        q1 = q0
        v1 = gl.allocate_shared_memory(dtype, [V_STAGES, BLOCK_N, BLOCK_DV], SHARED)
        second_row = first_row
        second_dv = BLOCK_DV
    else:
        q1 = gl.allocate_shared_memory(dtype, [64, BLOCK_D], SHARED)
        v1 = v0
        second_row = first_row + 64
        second_dv = 0
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIER)
    # Every thread of the producer arrives when its copies have landed; each consumer arrives once.
    mbarrier.init(q_full, count=128)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=128)
        mbarrier.init(k_empty.index(i), count=2)
    for i in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(i), count=128)
        mbarrier.init(v_empty.index(i), count=2)

    qk_scale = scale.to(gl.float32)
    if EXP2_SCALE == 1.0:
        qk_scale = qk_scale * 1.4426950408889634
    barriers = (q_full, k_full, v_full, k_empty, v_empty)
    # Bounds of intervals are contiguous.
    mask = (mask_ptr, stride_mm, stride_mh, stride_mn, stride_bs, interval_values_ptr, stride_it)
    v_width = V_HEAD_DIM - dv_first
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    (first_row, n_rows),
                    (out_ptr, stride_om, stride_oh, stride_od),
                    (acc_ptr, stats_ptr),
                    active,
                    mask,
                    q0,
                    k_smem,
                    v0,
                    barriers,
                    tiles,
                    first_step,
                    n_full,
                    n_listed,
                    kv_len,
                    qk_scale,
                    v_width,
                    True,
                    PACK,
                    SINGLE_SPLIT,
                    V_HEAD_DIM,
                    BLOCK_DV,
                    BLOCK_N,
                    MAP_BLOCK_N,
                    STAGES,
                    V_STAGES,
                    CAUSAL,
                    MASK,
                    TERMS,
                    INDEX_TERM,
                    EXP2_SCALE,
                ),
            ),
            (
                consumer,
                (
                    (second_row, n_rows),
                    (out_ptr + second_dv * stride_od, stride_om, stride_oh, stride_od),
                    (acc_ptr + second_dv, stats_ptr),
                    active,
                    mask,
                    q1,
                    k_smem,
                    v1,
                    barriers,
                    tiles,
                    first_step,
                    n_full,
                    n_listed,
                    kv_len,
                    qk_scale,
                    v_width - second_dv,
                    not SHARE_ROWS,
                    PACK,
                    SINGLE_SPLIT,
                    V_HEAD_DIM,
                    BLOCK_DV,
                    BLOCK_N,
                    MAP_BLOCK_N,
                    STAGES,
                    V_STAGES,
                    CAUSAL,
                    MASK,
                    TERMS,
                    INDEX_TERM,
                    EXP2_SCALE,
                ),
            ),
            (
                producer,
                (
                    (q_ptr, stride_qm, stride_qh, first_row, n_rows),
                    (k_ptr, stride_kn, v_ptr, stride_vn, kv_len),
                    (q0, q1, k_smem, v0, v1),
                    barriers,
                    tiles,
                    first_step,
                    n_listed,
                    v_width,
                    PACK,
                    HEAD_DIM,
                    BLOCK_D,
                    BLOCK_DV,
                    V_HEAD_DIM % BLOCK_DV != 0,
                    BLOCK_N,
                    MAP_BLOCK_N,
                    MASK != 0,
                    SHARE_ROWS,
                    STAGES,
                    V_STAGES,
                ),
            ),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
