"""The warps that copy query rows, keys and values to shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashpte.kernels.hopper.work import start_of

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
    source = ptr + first.to(gl.int64) * stride + offsets
    left = limit - first
    for chunk in gl.static_range(ROWS // CHUNK):
        ok = (row < left - chunk * CHUNK)[:, None]
        if CHECK_COLS:
            ok = ok & (cols < width)[None, :]
        async_load(smem.slice(chunk * CHUNK, CHUNK, 0), source + chunk * CHUNK * stride, mask=ok)


@gluon.jit
def _copy_query(smem, ptr, stride_m, stride_h, first, limit, cols, width, PACK: gl.constexpr, CHECK_COLS: gl.constexpr):
    """Copies 64 packed rows to ``smem [64, cols]``: row ``r`` is position ``r // PACK`` of head ``r % PACK``."""
    CHUNK: gl.constexpr = 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for chunk in gl.static_range(64 // CHUNK):
        row = first + chunk * CHUNK + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, LAYOUT))
        ok = (row < limit)[:, None]
        if CHECK_COLS:
            ok = ok & (cols < width)[None, :]
        start = (row // PACK).to(gl.int64) * stride_m + (row % PACK).to(gl.int64) * stride_h
        async_load(smem.slice(chunk * CHUNK, CHUNK, 0), ptr + start[:, None] + cols[None, :], mask=ok)


@gluon.jit
def producer(
    first_row,
    visit,  # which keys: see keys_of_tile
    tiles,  # the list of the map's row
    query,  # pointer, strides (head, row), n_rows
    keys,  # k_ptr, stride_kn, v_ptr, stride_vn, kv_len
    smem,  # q0, q1, k, v0, v1
    barriers,  # q_full, k_full, v_full, k_empty, v_empty
    v_width,
    PACK: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    CHECK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    MAP_BLOCK_N: gl.constexpr,
    MAPPED: gl.constexpr,
    SHARE_ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
):
    """Copies the query rows once, then every visited tile of keys and values as soon as its slot is free."""
    CHECK_D: gl.constexpr = BLOCK_D != HEAD_DIM
    COLS: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
    q_ptr, stride_qh, stride_qm, n_rows = query
    k_ptr, stride_kn, v_ptr, stride_vn, kv_len = keys
    q0, q1, k_smem, v0_smem, v1_smem = smem
    q_full, k_full, v_full, k_empty, v_empty = barriers
    first_step, n_full, n_listed, full_base, partial_base, _ = visit
    d = gl.arange(0, BLOCK_D, layout=COLS)
    dv = gl.arange(0, BLOCK_DV, layout=COLS)
    n_steps = n_listed
    if MAPPED:
        # Where there is nothing to see, one tile of it is looked at.
        n_steps = gl.maximum(n_listed, 1)
    base = gl.where(n_full > 0, full_base, partial_base)
    start = start_of((tiles, first_step, base), 0, n_listed, MAPPED, MAP_BLOCK_N, BLOCK_N)
    _copy_query(q0, q_ptr, stride_qm, stride_qh, first_row, n_rows, d, HEAD_DIM, PACK, CHECK_D)
    if not SHARE_ROWS:
        _copy_query(q1, q_ptr, stride_qm, stride_qh, first_row + 64, n_rows, d, HEAD_DIM, PACK, CHECK_D)
    async_copy.mbarrier_arrive(q_full, increment_count=False)
    for step in range(n_steps):
        # Read ahead: the copies would wait for it.
        base = gl.where(step + 1 < n_full, full_base, partial_base)
        after = start_of((tiles, first_step, base), step + 1, n_listed, MAPPED, MAP_BLOCK_N, BLOCK_N)
        slot = step % STAGES
        mbarrier.wait(k_empty.index(slot), ((step // STAGES) & 1) ^ 1)
        _copy_rows(k_smem.index(slot), k_ptr, stride_kn, start, kv_len, d, HEAD_DIM, BLOCK_N, CHECK_D)
        async_copy.mbarrier_arrive(k_full.index(slot), increment_count=False)
        v_slot = step % V_STAGES
        mbarrier.wait(v_empty.index(v_slot), ((step // V_STAGES) & 1) ^ 1)
        _copy_rows(v0_smem.index(v_slot), v_ptr, stride_vn, start, kv_len, dv, v_width, BLOCK_N, CHECK_DV)
        if SHARE_ROWS:
            more, width = v_ptr + BLOCK_DV, v_width - BLOCK_DV
            _copy_rows(v1_smem.index(v_slot), more, stride_vn, start, kv_len, dv, width, BLOCK_N, CHECK_DV)
        async_copy.mbarrier_arrive(v_full.index(v_slot), increment_count=False)
        start = after
