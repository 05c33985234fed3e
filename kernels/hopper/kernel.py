"""The Hopper kernel, which lays out shared memory and starts the producer and consumer warps."""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashpte.kernels.facts import register
from flashpte.kernels.hopper.consume import consumer
from flashpte.kernels.hopper.produce import producer
from flashpte.kernels.hopper.schedule import EACH_UP_TO, keys_of_tile, place
from flashpte.kernels.primitives import wait_for_earlier_kernels


@gluon.jit
def _block(dtype: gl.constexpr, SLOTS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Shared memory of ``SLOTS`` tiles, or of one without slots, which matrix instructions read."""
    SWIZZLE: gl.constexpr = 128 if COLUMNS >= 64 else 2 * COLUMNS
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=SWIZZLE, element_bitwidth=16, rank=2)
    SHAPE: gl.constexpr = [SLOTS, ROWS, COLUMNS] if SLOTS > 0 else [ROWS, COLUMNS]
    return gl.allocate_shared_memory(dtype, SHAPE, SHARED)


@gluon.jit
def _blocks(dtype: gl.constexpr, SLOTS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, REST: gl.constexpr):
    """One or two blocks of columns of the same tiles. ``REST`` is 0 if the first block holds the whole rows."""
    first = _block(dtype, SLOTS, ROWS, COLUMNS)
    if REST > 0:
        return first, _block(dtype, SLOTS, ROWS, REST)
    else:  # a compile-time condition: without else, the compiler would go on to the next line
        return (first,)


@gluon.jit
def _hopper_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, interval_values_ptr, tiles_ptr, counts_ptr, out_ptr,
    acc_ptr,  # float16 [B, heads, num_splits, L_q * PACK, WIDTH]
    stats_ptr,  # float32 [B, heads, num_splits, L_q * PACK, STATS]: running maximum and sum, accumulator units
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_ob, stride_oh, stride_om, stride_od,
    stride_tb, stride_th, n_key_tiles, stride_bs, stride_ib, stride_it,
    heads,  # H_q / PACK
    q_len, kv_len,
    scale,  # positive
    short_splits,
    # Use tl.constexpr: Inductor copies the parameters into code that knows only Triton's language, not Gluon's.
    GROUP: tl.constexpr, PACK: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    REST_D: tl.constexpr, REST_DV: tl.constexpr,  # columns of a second block of keys and of values, or 0
    WIDTH: tl.constexpr, STATS: tl.constexpr,
    BLOCK_N: tl.constexpr, MAP_BLOCK_M: tl.constexpr, MAP_BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, TERMS: tl.constexpr, INDEX_TERM: tl.constexpr,
    SHARE_ROWS: tl.constexpr, TMA: tl.constexpr, SINGLE_SPLIT: tl.constexpr, LONG_KEYS: tl.constexpr,
    EXP2_SCALE: tl.constexpr, STAGES: tl.constexpr, V_STAGES: tl.constexpr,
    CONSUMER_REGISTERS: tl.constexpr, PRODUCER_REGISTERS: tl.constexpr, WIDE_STORES: tl.constexpr,
    ROWS_ALIGNED: tl.constexpr,  # whether rows of the result are aligned to 16 bytes
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of rows; see :func:`flashpte.kernels.mask.strides` for the strides."""
    BLOCK_M: gl.constexpr = 64 if SHARE_ROWS else 128
    COLUMNS: gl.constexpr = 2 * BLOCK_DV if SHARE_ROWS else BLOCK_DV + REST_DV  # columns of V per program
    V_SLICES: gl.constexpr = (V_HEAD_DIM + COLUMNS - 1) // COLUMNS
    KV_GROUP: gl.constexpr = GROUP // PACK
    n_rows = q_len * PACK
    row_tiles = gl.cdiv(n_rows, BLOCK_M)
    row_tile, head, b, dv_slice = place(kv_len, heads, row_tiles, HEAD_DIM + V_HEAD_DIM, KV_GROUP, V_SLICES)
    first_row = row_tile * BLOCK_M
    dv_first = dv_slice * COLUMNS
    q_ptr += b * stride_qb + head * PACK * stride_qh
    k_ptr += b * stride_kb + (head // KV_GROUP) * stride_kh
    v_ptr += b * stride_vb + (head // KV_GROUP) * stride_vh + dv_first
    out_ptr += b * stride_ob + head * PACK * stride_oh + dv_first * stride_od
    mask_ptr += b * stride_mb + head * PACK * stride_mh
    interval_values_ptr += b * stride_ib
    map_row = b * stride_tb + head * stride_th + first_row // PACK // MAP_BLOCK_M
    wait_for_earlier_kernels(DEPENDENT)
    visit = keys_of_tile(
        counts_ptr + map_row * 4,
        first_row,
        kv_len,
        short_splits,
        BLOCK_M,
        PACK,
        BLOCK_N,
        MAP_BLOCK_N,
        CAUSAL,
        MASK,
        SINGLE_SPLIT,
        LONG_KEYS,
    )
    if not SINGLE_SPLIT:
        split = gl.program_id(2)
        num_splits = gl.num_programs(2)
        if split >= visit[5]:
            return
        first_partial = ((b * heads + head) * num_splits + split) * n_rows
        acc_ptr += first_partial * WIDTH + dv_first
        stats_ptr += first_partial * STATS

    dtype: gl.constexpr = k_ptr.dtype.element_ty
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q0 = _blocks(dtype, 0, 64, BLOCK_D, REST_D)
    k_smem = _blocks(dtype, STAGES, BLOCK_N, BLOCK_D, REST_D)
    v0 = _blocks(dtype, V_STAGES, BLOCK_N, BLOCK_DV, REST_DV)
    if SHARE_ROWS:
        q1 = q0
        v1 = _blocks(dtype, V_STAGES, BLOCK_N, BLOCK_DV, REST_DV)
    else:
        q1 = _blocks(dtype, 0, 64, BLOCK_D, REST_D)
        v1 = v0
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIER)
    # On a full barrier, every thread of the producer arrives when its copies have landed, or one thread for all
    # (_copy_by_map). For the consumers' arrivals, see _give_back.
    READERS: gl.constexpr = 2 * 128 if BLOCK_D <= EACH_UP_TO else 2
    mbarrier.init(q_full, count=128)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=128)
        mbarrier.init(k_empty.index(i), count=READERS)
    for i in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(i), count=128)
        mbarrier.init(v_empty.index(i), count=READERS)

    qk_scale = scale.to(gl.float32)
    if EXP2_SCALE == 1.0:
        qk_scale = qk_scale * 1.4426950408889634
    barriers = (q_full, k_full, v_full, k_empty, v_empty)
    tiles = tiles_ptr + map_row * n_key_tiles if MASK != 0 else tiles_ptr
    # Bounds of intervals are contiguous.
    mask = (mask_ptr, stride_mm, stride_mh, stride_mn, stride_bs, interval_values_ptr, stride_it)
    v_width = V_HEAD_DIM - dv_first
    # The second consumer has other rows than the first, or other columns of V.
    MORE_ROWS: gl.constexpr = 0 if SHARE_ROWS else 64
    MORE_COLUMNS: gl.constexpr = BLOCK_DV if SHARE_ROWS else 0
    VISIBLE: gl.constexpr = (CAUSAL, MASK, TERMS, INDEX_TERM)
    STORES: gl.constexpr = (SINGLE_SPLIT, WIDTH, STATS, WIDE_STORES, ROWS_ALIGNED)
    COPIED: gl.constexpr = (HEAD_DIM, BLOCK_D + REST_D != HEAD_DIM, V_HEAD_DIM % (BLOCK_DV + REST_DV) != 0, SHARE_ROWS)
    MAP: gl.constexpr = (MASK != 0, MAP_BLOCK_N)
    # Arguments of the first consumer, then of the second.
    rows_0 = (first_row, n_rows)
    partial_0 = (acc_ptr, stats_ptr, 2 + dv_first // BLOCK_DV)
    limits_0 = (kv_len, qk_scale, v_width)
    rows_1 = (first_row + MORE_ROWS, n_rows)
    out_1 = out_ptr + MORE_COLUMNS * stride_od
    partial_1 = (acc_ptr + MORE_COLUMNS, stats_ptr, 2 + (dv_first + MORE_COLUMNS) // BLOCK_DV)
    limits_1 = (kv_len, qk_scale, v_width - MORE_COLUMNS)
    smem_0, smem_1 = (q0, k_smem, v0, barriers), (q1, k_smem, v1, barriers)
    query = (q_ptr, stride_qh, stride_qm, n_rows)
    keys = (k_ptr, stride_kn, v_ptr, stride_vn, kv_len)
    copies = (q0, q1, k_smem, v0, v1)
    # The result's strides stay inside the call. Triton 3.6 turns a constant into a register when a tuple that holds it
    # gets a name, and a stride of 1 in a register makes stores of 2 bytes out of those of 16.
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    rows_0,
                    visit,
                    tiles,
                    ((out_ptr, stride_om, stride_oh, stride_od), partial_0),
                    mask,
                    smem_0,
                    limits_0,
                    PACK,
                    MAP,
                    VISIBLE,
                    EXP2_SCALE,
                    STORES,
                ),
            ),
            (
                consumer,
                (
                    rows_1,
                    visit,
                    tiles,
                    ((out_1, stride_om, stride_oh, stride_od), partial_1),
                    mask,
                    smem_1,
                    limits_1,
                    PACK,
                    MAP,
                    VISIBLE,
                    EXP2_SCALE,
                    STORES,
                ),
            ),
            (producer, (first_row, visit, tiles, query, keys, copies, barriers, v_width, PACK, COPIED, MAP, TMA)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@triton.jit
def _reads_and_writes(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    interval_values_ptr,
    tiles_ptr,
    counts_ptr,
    out_ptr,
    acc_ptr,
    stats_ptr,
    SINGLE_SPLIT: tl.constexpr,
):
    """The kernel's twin in Triton, which reads and writes the same arguments and computes nothing."""
    read = tl.load(q_ptr).to(tl.float32) + tl.load(k_ptr).to(tl.float32) + tl.load(v_ptr).to(tl.float32)
    read += tl.load(mask_ptr).to(tl.float32) + tl.load(interval_values_ptr).to(tl.float32)
    read += tl.load(tiles_ptr).to(tl.float32) + tl.load(counts_ptr).to(tl.float32)
    tl.store(out_ptr, read.to(out_ptr.dtype.element_ty))
    # With one split, out_ptr is passed for both partial tensors. With several, a split that is alone still writes out.
    if not SINGLE_SPLIT:
        tl.store(acc_ptr, read)
        tl.store(stats_ptr, read)


register(_hopper_kernel, "attention", early_start="DEPENDENT", twin=_reads_and_writes)
