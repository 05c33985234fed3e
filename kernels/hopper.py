"""The tiled kernel for Hopper: warps that copy, warps that compute, and the softmax of one tile under the matrix
products of the next.

Same result, arguments and tile maps as :mod:`flashpte.kernels.tiled`; written in Gluon, Triton's language for layouts
and synchronisation, because Triton proper leaves the tensor cores idle during every softmax. One program has three warp
groups: a producer that copies tiles of keys and values into a ring in shared memory (``cp.async``), and two consumers
that own 64 query rows each. A consumer issues ``Q K`` of tile ``i`` and ``P V`` of tile ``i - 1`` together and computes
the softmax of tile ``i`` while ``P V`` still runs (the pipelining within a warp group of FlashAttention-3,
arXiv:2407.08608, section 3.2). Where D_v is above 256 the accumulator does not fit in registers: programs then share
the columns of V and each computes the scores for itself, half as much again as the least arithmetic.

Copies do not use TMA: its descriptors do not go through AOTInductor. They need strides and addresses that are multiples
of 16 bytes; :func:`flashpte.kernels.tiled.launch_tiled` decides.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.9 has another name for it.
async_load = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.jit
def _copy_rows(smem, ptr, stride, first, limit, cols, width, ROWS: gl.constexpr, CHECK_COLS: gl.constexpr):
    """Copies rows ``first .. first + ROWS`` of a matrix to ``smem [ROWS, cols]``; zeros beyond ``limit`` and ``width``.

    A chunk at a time: the addresses of more would need more registers than a producer has.
    """
    CHUNK: gl.constexpr = 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, LAYOUT))
    offsets = row[:, None] * stride + cols[None, :]
    for chunk in gl.static_range(ROWS // CHUNK):
        start = first + chunk * CHUNK
        ok = (row + start < limit)[:, None]
        if CHECK_COLS:
            ok = ok & (cols < width)[None, :]
        source = ptr + start.to(gl.int64) * stride + offsets
        async_load(smem.slice(chunk * CHUNK, CHUNK, 0), source, mask=ok)


@gluon.jit
def _start_of(tiles, step, n_steps, MAPPED: gl.constexpr, MAP_BLOCK_N: gl.constexpr, BLOCK_N: gl.constexpr):
    """First key of the ``step``-th tile that is visited; any number from ``n_steps`` on."""
    if MAPPED:
        SUB: gl.constexpr = MAP_BLOCK_N // BLOCK_N
        start = gl.load(tiles + step // SUB, mask=step < n_steps, other=0) * MAP_BLOCK_N + step % SUB * BLOCK_N
    else:
        # The minimum changes nothing but LLVM's mind, which would keep a pointer per copy in registers and step them all.
        start = gl.minimum(step * BLOCK_N, n_steps * BLOCK_N)
    return start


@gluon.jit
def _producer(
    rows,  # q_ptr, stride_qm, first_row, q_len
    keys,  # k_ptr, stride_kn, v_ptr, stride_vn, kv_len
    smem,  # q0, q1, k, v
    barriers,  # q_full, k_full, v_full, k_empty, v_empty
    tiles,
    n_steps,
    v_width,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    CHECK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    MAP_BLOCK_N: gl.constexpr,
    MAPPED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copies the query rows once, then every visited tile of keys and values as soon as its slot is free."""
    q_ptr, stride_qm, first_row, q_len = rows
    k_ptr, stride_kn, v_ptr, stride_vn, kv_len = keys
    q0, q1, k_smem, v_smem = smem
    q_full, k_full, v_full, k_empty, v_empty = barriers
    COLS: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
    d = gl.arange(0, BLOCK_D, layout=COLS)
    dv = gl.arange(0, BLOCK_DV, layout=COLS)
    start = _start_of(tiles, 0, n_steps, MAPPED, MAP_BLOCK_N, BLOCK_N)
    _copy_rows(q0, q_ptr, stride_qm, first_row, q_len, d, HEAD_DIM, 64, BLOCK_D != HEAD_DIM)
    _copy_rows(q1, q_ptr, stride_qm, first_row + 64, q_len, d, HEAD_DIM, 64, BLOCK_D != HEAD_DIM)
    async_copy.mbarrier_arrive(q_full, increment_count=False)
    for step in range(n_steps):
        # Read ahead: the copies would wait for it.
        after = _start_of(tiles, step + 1, n_steps, MAPPED, MAP_BLOCK_N, BLOCK_N)
        slot = step % STAGES
        free = ((step // STAGES) & 1) ^ 1
        mbarrier.wait(k_empty.index(slot), free)
        _copy_rows(k_smem.index(slot), k_ptr, stride_kn, start, kv_len, d, HEAD_DIM, BLOCK_N, BLOCK_D != HEAD_DIM)
        async_copy.mbarrier_arrive(k_full.index(slot), increment_count=False)
        mbarrier.wait(v_empty.index(slot), free)
        _copy_rows(v_smem.index(slot), v_ptr, stride_vn, start, kv_len, dv, v_width, BLOCK_N, CHECK_DV)
        async_copy.mbarrier_arrive(v_full.index(slot), increment_count=False)
        start = after


@gluon.jit
def _masked(
    s,
    start,
    mask,
    kv_len,
    S_LAYOUT: gl.constexpr,
    BLOCK_N: gl.constexpr,
    CAUSAL: gl.constexpr,
    MASK: gl.constexpr,
    TERMS: gl.constexpr,
    INDEX_TERM: gl.constexpr,
):
    """Scores ``[64, N]`` with -inf where a row does not see a key, or with a float mask added."""
    # Positions of the rows and what belongs to the kind of mask: see _consumer.
    m, mask_rows, stride_mn, side_stride, values_ptr, values_stride, index_lower, index_upper = mask
    n = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
    in_range = (n < kv_len)[None, :]
    visible = in_range
    if CAUSAL:
        visible = visible & (n[None, :] <= m[:, None])
    if MASK == 3:
        for term in gl.static_range(TERMS):
            if INDEX_TERM and term == 0:
                visible = visible & (n[None, :] >= index_lower[:, None]) & (n[None, :] <= index_upper[:, None])
            else:
                lower = gl.load(mask_rows + 2 * term * side_stride)
                upper = gl.load(mask_rows + (2 * term + 1) * side_stride)
                value = gl.load(values_ptr + (term - INDEX_TERM) * values_stride + n, mask=n < kv_len, other=0)
                visible = visible & (value[None, :] >= lower[:, None]) & (value[None, :] <= upper[:, None])
    elif MASK != 0:
        pointers = mask_rows[:, None] + (n.to(gl.int64) * stride_mn)[None, :]
        if MASK == 1:
            visible = visible & (gl.load(pointers, mask=in_range, other=0) != 0)
        else:
            s += gl.load(pointers, mask=in_range, other=0.0).to(gl.float32)
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def _softmax(s, row_max, row_sum, qk_scale, ACC_LAYOUT: gl.constexpr, EXP2_SCALE: gl.constexpr, dtype: gl.constexpr):
    """One step of the online softmax, as ``primitives.online_softmax``; scores get their scale here unless EXP2_SCALE.

    A positive scale commutes with the maximum, so that scaling, subtracting and nothing else is one instruction.
    """
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC_LAYOUT, k_width=2)
    if EXP2_SCALE == 1.0:
        new_max = gl.maximum(row_max, gl.max(s, 1) * qk_scale)
        base = gl.where(new_max == float("-inf"), 0.0, new_max)
        probs = gl.exp2(s * qk_scale - base[:, None])
        rescale = gl.exp2(row_max - base)
    else:
        new_max = gl.maximum(row_max, gl.max(s, 1))
        base = gl.where(new_max == float("-inf"), 0.0, new_max)
        probs = gl.exp2((s - base[:, None]) * EXP2_SCALE)
        rescale = gl.exp2((row_max - base) * EXP2_SCALE)
    row_sum = row_sum * rescale + gl.sum(probs, 1)
    p = gl.convert_layout(probs.to(dtype), P_LAYOUT)
    return p, gl.convert_layout(rescale, gl.SliceLayout(1, ACC_LAYOUT)), new_max, row_sum


@gluon.jit
def _step(
    step,
    n_steps,
    state,  # acc, p, row_max, row_sum
    q_smem,
    smem,
    barriers,
    mask,
    tiles,
    kv_len,
    qk_scale,
    S_LAYOUT: gl.constexpr,
    ACC_LAYOUT: gl.constexpr,
    BLOCK_N: gl.constexpr,
    MAP_BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    EDGE: gl.constexpr,
    CAUSAL: gl.constexpr,
    MASK: gl.constexpr,
    TERMS: gl.constexpr,
    INDEX_TERM: gl.constexpr,
    EXP2_SCALE: gl.constexpr,
):
    """Scores and softmax of tile ``step`` beside ``P V`` of the tile before it."""
    acc, p, row_max, row_sum = state
    _, _, k_smem, v_smem = smem
    _, k_full, v_full, k_empty, v_empty = barriers
    dtype: gl.constexpr = k_smem.dtype
    slot = step % STAGES
    previous = (step - 1) % STAGES
    if EDGE:
        start = _start_of(tiles, step, n_steps, MASK != 0, MAP_BLOCK_N, BLOCK_N)
    # Copies write shared memory as ordinary stores do, matrix instructions read it through another proxy.
    fence_async_shared()
    s = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    s = warpgroup_mma(q_smem, k_smem.index(slot).permute((1, 0)), s, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v_smem.index(previous), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(slot), count=1)
    if EXP2_SCALE != 1.0:
        s = s * qk_scale
    if EDGE:
        s = _masked(s, start, mask, kv_len, S_LAYOUT, BLOCK_N, CAUSAL, MASK, TERMS, INDEX_TERM)
    p_next, rescale, row_max, row_sum = _softmax(s, row_max, row_sum, qk_scale, ACC_LAYOUT, EXP2_SCALE, dtype)
    # What the next step waits for, waited for here: the branches keep ptxas from moving the wait for P V above the
    # exponentials, which would undo the overlap.
    mbarrier.wait(k_full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1, pred=step + 1 < n_steps)
    mbarrier.wait(v_full.index(slot), (step // STAGES) & 1)
    acc, p, p_next, row_sum = warpgroup_mma_wait(0, deps=[acc, p, p_next, row_sum])
    mbarrier.arrive(v_empty.index(previous), count=1)
    return acc * rescale[:, None], p_next, row_max, row_sum


@gluon.jit
def _consumer(
    rows,  # first_row, q_len
    out,  # out_ptr, stride_om, stride_od
    mask,  # mask_ptr, stride_mm, stride_mn, side_stride, values_ptr, values_stride
    q_smem,
    smem,
    barriers,
    tiles,
    n_full,
    n_steps,
    kv_len,
    qk_scale,
    v_width,
    BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    MAP_BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    MASK: gl.constexpr,
    TERMS: gl.constexpr,
    INDEX_TERM: gl.constexpr,
    EXP2_SCALE: gl.constexpr,
):
    """Attention of 64 query rows, by one warp group."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    first_row, q_len = rows
    mask_ptr, stride_mm, stride_mn, side_stride, values_ptr, values_stride = mask
    _, _, k_smem, v_smem = smem
    q_full, k_full, v_full, k_empty, _ = barriers
    dtype: gl.constexpr = k_smem.dtype

    m = first_row + gl.arange(0, 64, layout=ROWS)
    # Rows past the end repeat the last one, so that the pointers stay in range.
    safe_m = gl.minimum(m, q_len - 1)
    index_lower = m
    index_upper = m
    mask_rows = mask_ptr + safe_m.to(gl.int64) * stride_mm
    if MASK == 3 and INDEX_TERM:
        # In 32 bits, which hold every index of a key: what they cut off changes nothing.
        lower = gl.load(mask_rows)
        upper = gl.load(mask_rows + side_stride)
        index_lower = gl.minimum(gl.maximum(lower, -1), 2147483647).to(gl.int32)
        index_upper = gl.minimum(gl.maximum(upper, -1), 2147483647).to(gl.int32)
    seen = (m, mask_rows, stride_mn, side_stride, values_ptr, values_stride, index_lower, index_upper)

    row_max = gl.full([64], float("-inf"), gl.float32, ROWS)
    row_sum = gl.zeros([64], gl.float32, ROWS)
    acc = gl.zeros([64, BLOCK_DV], gl.float32, ACC_LAYOUT)
    start = _start_of(tiles, 0, n_steps, MASK != 0, MAP_BLOCK_N, BLOCK_N)
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    fence_async_shared()
    s = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    s = warpgroup_mma(q_smem, k_smem.index(0).permute((1, 0)), s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(0), count=1)
    if EXP2_SCALE != 1.0:
        s = s * qk_scale
    if n_full == 0:
        s = _masked(s, start, seen, kv_len, S_LAYOUT, BLOCK_N, CAUSAL, MASK, TERMS, INDEX_TERM)
    p, _, row_max, row_sum = _softmax(s, row_max, row_sum, qk_scale, ACC_LAYOUT, EXP2_SCALE, dtype)
    mbarrier.wait(k_full.index(1 % STAGES), (1 // STAGES) & 1, pred=n_steps > 1)
    mbarrier.wait(v_full.index(0), 0)
    state = (acc, p, row_max, row_sum)
    full_end = gl.maximum(n_full, 1)
    for step in range(1, full_end):
        state = _step(
            step,
            n_steps,
            state,
            q_smem,
            smem,
            barriers,
            seen,
            tiles,
            kv_len,
            qk_scale,
            S_LAYOUT,
            ACC_LAYOUT,
            BLOCK_N,
            MAP_BLOCK_N,
            STAGES,
            False,
            CAUSAL,
            MASK,
            TERMS,
            INDEX_TERM,
            EXP2_SCALE,
        )
    for step in range(full_end, n_steps):
        state = _step(
            step,
            n_steps,
            state,
            q_smem,
            smem,
            barriers,
            seen,
            tiles,
            kv_len,
            qk_scale,
            S_LAYOUT,
            ACC_LAYOUT,
            BLOCK_N,
            MAP_BLOCK_N,
            STAGES,
            True,
            CAUSAL,
            MASK,
            TERMS,
            INDEX_TERM,
            EXP2_SCALE,
        )
    acc, p, row_max, row_sum = state
    fence_async_shared()
    acc = warpgroup_mma(p, v_smem.index((n_steps - 1) % STAGES), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])

    out_ptr, stride_om, stride_od = out
    empty = gl.convert_layout(row_sum == 0.0, gl.SliceLayout(1, ACC_LAYOUT))[:, None]
    total = gl.convert_layout(row_sum, gl.SliceLayout(1, ACC_LAYOUT))[:, None]
    # A row that saw nothing is 0, whatever the values it did not see hold.
    acc = gl.where(empty, 0.0, acc / gl.where(empty, 1.0, total))
    r = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC_LAYOUT))
    dv = gl.arange(0, BLOCK_DV, layout=gl.SliceLayout(0, ACC_LAYOUT))
    out_ptrs = out_ptr + (r.to(gl.int64) * stride_om)[:, None] + (dv * stride_od)[None, :]
    gl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(r < q_len)[:, None] & (dv < v_width)[None, :])


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
    # The last rows see the most keys under a causal mask: start them first. Slices of V are the innermost part of the
    # grid, then query tiles, so that neighbouring programs share keys and values in L2.
    row_tile = (gl.num_programs(0) - 1 - gl.program_id(0)) // V_SLICES
    dv_first = (gl.program_id(0) % V_SLICES) * BLOCK_DV
    head = gl.program_id(1).to(gl.int64)
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
        n_steps = n_full + gl.load(counts_ptr + tile_row * 2 + 1) * (MAP_BLOCK_N // BLOCK_N)
    else:
        end = kv_len
        n_full = kv_len // BLOCK_N
        if CAUSAL:
            end = gl.minimum(kv_len, first_row + 128)
            n_full = gl.minimum(kv_len, first_row) // BLOCK_N
        n_steps = gl.cdiv(end, BLOCK_N)
    # Where there is nothing to see, one tile of it is looked at.
    n_steps = gl.maximum(n_steps, 1)

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
                _consumer,
                (
                    (first_row, q_len),
                    out,
                    mask,
                    q0,
                    smem,
                    barriers,
                    tiles,
                    n_full,
                    n_steps,
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
                _consumer,
                (
                    (first_row + 64, q_len),
                    out,
                    mask,
                    q1,
                    smem,
                    barriers,
                    tiles,
                    n_full,
                    n_steps,
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
                _producer,
                (
                    query,
                    keys,
                    smem,
                    barriers,
                    tiles,
                    n_steps,
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
