"""The kernel: places programs, lays out shared memory and starts the warps."""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashpte.kernels.hopper.consume import consumer
from flashpte.kernels.hopper.produce import producer


@gluon.jit
def _place(kv_len, WIDTH: gl.constexpr, GROUP: gl.constexpr, V_SLICES: gl.constexpr):
    """Row tile, query head and slice of V of a program; the grid is ``(row tiles x V_SLICES, H_q, B)``.

    Programs start in the order of their index. The last rows see the most keys under a causal mask: they start first,
    in all heads, so that no long program is left over at the end; but of so many heads at a time as have their keys
    and values in L2 together.
    """
    KEYS: gl.constexpr = (16 << 20) // (WIDTH * 2)
    columns = gl.num_programs(0)
    heads = gl.num_programs(1)
    index = gl.program_id(1) * columns + gl.program_id(0)
    together = gl.minimum(gl.maximum(KEYS // gl.maximum(kv_len, 1), 1) * GROUP, heads)
    first_head = index // (columns * together) * together
    index -= first_head * columns
    together = gl.minimum(together, heads - first_head)
    row_tile = columns // V_SLICES - 1 - index // (together * V_SLICES)
    head = first_head + index // V_SLICES % together
    return row_tile, head.to(gl.int64), index % V_SLICES


@gluon.jit
def _tiled_hopper_kernel(
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
    scale,  # positive
    # Inductor writes the parameters out where only Triton's language is known.
    GROUP: tl.constexpr,
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
    EXP2_SCALE: tl.constexpr,
    STAGES: tl.constexpr,
    CONSUMER_REGISTERS: tl.constexpr,
    PRODUCER_REGISTERS: tl.constexpr,
):
    V_SLICES: gl.constexpr = (V_HEAD_DIM + BLOCK_DV - 1) // BLOCK_DV
    row_tile, head, dv_slice = _place(kv_len, HEAD_DIM + V_HEAD_DIM, GROUP, V_SLICES)
    dv_first = dv_slice * BLOCK_DV
    b = gl.program_id(2).to(gl.int64)
    first_row = row_tile * 128
    q_ptr += b * stride_qb + head * stride_qh
    k_ptr += b * stride_kb + (head // GROUP) * stride_kh
    v_ptr += b * stride_vb + (head // GROUP) * stride_vh + dv_first
    out_ptr += b * stride_ob + head * stride_oh + dv_first * stride_od
    mask_ptr += b * stride_mb + head * stride_mh
    interval_values_ptr += b * stride_ib
    tiles = tiles_ptr
    if MASK != 0:
        tile_row = b * stride_tb + head * stride_th + first_row // MAP_BLOCK_M
        tiles = tiles_ptr + tile_row * n_key_tiles
        n_full = gl.load(counts_ptr + tile_row * 2) * (MAP_BLOCK_N // BLOCK_N)
        n_listed = n_full + gl.load(counts_ptr + tile_row * 2 + 1) * (MAP_BLOCK_N // BLOCK_N)
    else:
        end = kv_len
        n_full = kv_len // BLOCK_N
        if CAUSAL:
            end = gl.minimum(kv_len, first_row + 128)
            n_full = gl.minimum(kv_len, first_row) // BLOCK_N
        n_listed = gl.maximum(gl.cdiv(end, BLOCK_N), 1)

    dtype: gl.constexpr = k_ptr.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q0 = gl.allocate_shared_memory(dtype, [64, BLOCK_D], SHARED)
    q1 = gl.allocate_shared_memory(dtype, [64, BLOCK_D], SHARED)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], SHARED)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_DV], SHARED)
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    # Every thread of the producer arrives when its copies have landed; each consumer arrives once.
    mbarrier.init(q_full, count=128)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=128)
        mbarrier.init(v_full.index(i), count=128)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)

    qk_scale = scale.to(gl.float32)
    if EXP2_SCALE == 1.0:
        qk_scale = qk_scale * 1.4426950408889634
    smem = (q0, q1, k_smem, v_smem)
    barriers = (q_full, k_full, v_full, k_empty, v_empty)
    query = (q_ptr, stride_qm, first_row, q_len)
    keys = (k_ptr, stride_kn, v_ptr, stride_vn, kv_len)
    out = (out_ptr, stride_om, stride_od)
    # Bounds of intervals are contiguous.
    mask = (mask_ptr, stride_mm, stride_mn, stride_bs, interval_values_ptr, stride_it)
    v_width = V_HEAD_DIM - dv_first
    CHECK_DV: gl.constexpr = V_HEAD_DIM % BLOCK_DV != 0
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    (first_row, q_len),
                    out,
                    mask,
                    q0,
                    smem,
                    barriers,
                    tiles,
                    n_full,
                    n_listed,
                    kv_len,
                    qk_scale,
                    v_width,
                    BLOCK_DV,
                    BLOCK_N,
                    MAP_BLOCK_N,
                    STAGES,
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
                    (first_row + 64, q_len),
                    out,
                    mask,
                    q1,
                    smem,
                    barriers,
                    tiles,
                    n_full,
                    n_listed,
                    kv_len,
                    qk_scale,
                    v_width,
                    BLOCK_DV,
                    BLOCK_N,
                    MAP_BLOCK_N,
                    STAGES,
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
                    query,
                    keys,
                    smem,
                    barriers,
                    tiles,
                    n_listed,
                    v_width,
                    HEAD_DIM,
                    BLOCK_D,
                    BLOCK_DV,
                    CHECK_DV,
                    BLOCK_N,
                    MAP_BLOCK_N,
                    MASK != 0,
                    STAGES,
                ),
            ),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
