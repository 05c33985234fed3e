"""The producer warps, which copy query rows, keys and values to shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from flashpte.kernels.hopper.schedule import FIRST_TILES, start_of

# Triton 3.9 renamed cp.async copies, and Triton 3.8 renamed TMA copies.
async_load = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _copy_rows(smem, ptr, stride, first, limit, width, ROWS: gl.constexpr, CHECK_COLS: gl.constexpr):
    """Copies rows ``first .. first + ROWS`` of a matrix to ``smem [ROWS, columns]`` with ``cp.async``.

    Fills with zeros beyond ``limit`` rows and ``width`` columns. Copies 16 rows of 64 columns or more at a time,
    because the addresses of more rows would need more registers than a producer has.
    """
    LANES: gl.constexpr = 8 if smem.shape[1] >= 64 else smem.shape[1] // 8  # threads that copy one row
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    CHUNK: gl.constexpr = 4 * 32 // LANES
    cols = gl.arange(0, smem.shape[1], layout=gl.SliceLayout(0, LAYOUT))
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
def _copy_tile(tile, slot, ptr, stride, first, limit, width, CHECK_COLS: gl.constexpr):
    """Copies rows of a matrix to a slot of every block of columns. Only the last block can have padded columns."""
    N: gl.constexpr = tile[0].shape[1]
    _copy_rows(tile[0].index(slot), ptr, stride, first, limit, width, N, CHECK_COLS and len(tile) == 1)
    if len(tile) == 2:
        C: gl.constexpr = tile[0].shape[2]
        _copy_rows(tile[1].index(slot), ptr + C, stride, first, limit, width - C, N, CHECK_COLS)


@gluon.jit
def _copy_by_map(tensor_maps, first, full, tile, slot):
    """Copies a tile with TMA, 64 columns per instruction. One thread arrives at ``full`` for all 128 threads."""
    if len(tile) == 2:
        mbarrier.expect(full, tensor_maps[0].block_type.nbytes + tensor_maps[1].block_type.nbytes)
    else:
        mbarrier.expect(full, tensor_maps[0].block_type.nbytes)
    mbarrier.arrive(full, count=127)
    load_tile(tensor_maps[0], [first, 0], full, tile[0].index(slot))
    if len(tile) == 2:
        load_tile(tensor_maps[1], [first, tile[0].shape[2]], full, tile[1].index(slot))


@gluon.jit
def _make_maps(ptr, rows, columns, stride, tile):
    """A tensor map for every block of columns of a matrix ``[rows, columns]``. Beyond these, maps read zeros."""
    FIRST: gl.constexpr = [tile[0].shape[1], tile[0].shape[2]]
    first = tma.make_tensor_descriptor(ptr, [rows, columns], [stride, 1], FIRST, tile[0].index(0).layout)
    if len(tile) == 2:
        REST: gl.constexpr = [tile[1].shape[1], tile[1].shape[2]]
        return first, tma.make_tensor_descriptor(ptr, [rows, columns], [stride, 1], REST, tile[1].index(0).layout)
    else:  # a compile-time condition: without else, the compiler would go on to the next line
        return (first,)


@gluon.jit
def _copy_query(smem, ptr, strides, first, limit, width, PACK: gl.constexpr, CHECK_COLS: gl.constexpr):
    """Copies 64 packed rows to ``smem [64, columns]``: row ``r`` is position ``r // PACK`` of head ``r % PACK``."""
    stride_h, stride_m = strides
    LANES: gl.constexpr = 8 if smem.shape[1] >= 64 else smem.shape[1] // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    CHUNK: gl.constexpr = 4 * 32 // LANES
    cols = gl.arange(0, smem.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    for chunk in gl.static_range(64 // CHUNK):
        row = first + chunk * CHUNK + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, LAYOUT))
        ok = (row < limit)[:, None]
        if CHECK_COLS:
            ok = ok & (cols < width)[None, :]
        start = (row // PACK).to(gl.int64) * stride_m + (row % PACK).to(gl.int64) * stride_h
        async_load(smem.slice(chunk * CHUNK, CHUNK, 0), ptr + start[:, None] + cols[None, :], mask=ok)


@gluon.jit
def _copy_queries(tile, ptr, strides, first, limit, width, PACK: gl.constexpr, CHECK_COLS: gl.constexpr):
    """Copies 64 packed rows to every block of columns."""
    _copy_query(tile[0], ptr, strides, first, limit, width, PACK, CHECK_COLS and len(tile) == 1)
    if len(tile) == 2:
        C: gl.constexpr = tile[0].shape[1]
        _copy_query(tile[1], ptr + C, strides, first, limit, width - C, PACK, CHECK_COLS)


@gluon.jit
def _copy_tiles(
    steps,  # from, to
    start,  # first key of the first step
    given,  # visited (tiles, first_step, full_base, partial_base, n_full, n_listed), keys, smem, barriers, v_width
    maps,  # tensor maps of keys and values, with TMA
    TMA: gl.constexpr,
    COLUMNS: gl.constexpr,  # HEAD_DIM, CHECK_D, CHECK_DV, SHARE_ROWS
    MAP: gl.constexpr,  # MAPPED, MAP_BLOCK_N
):
    """Copies tiles of keys and values, each once its slot is free. Returns the first key of the tile after them."""
    visited, keys, smem, barriers, v_width = given
    k_ptr, stride_kn, v_ptr, stride_vn, kv_len = keys
    _, _, k_smem, v0_smem, v1_smem = smem
    _, k_full, v_full, k_empty, v_empty = barriers
    tiles, first_step, full_base, partial_base, n_full, n_listed = visited
    k_maps, v_maps = maps
    HEAD_DIM: gl.constexpr = COLUMNS[0]
    STAGES: gl.constexpr = k_smem[0].shape[0]
    BLOCK_N: gl.constexpr = k_smem[0].shape[1]
    V_STAGES: gl.constexpr = v0_smem[0].shape[0]
    BLOCK_DV: gl.constexpr = v0_smem[0].shape[2]
    for step in range(steps[0], steps[1]):
        # Read the next tile's start ahead, because its copies would wait for it.
        base = gl.where(step + 1 < n_full, full_base, partial_base)
        after = start_of((tiles, first_step, base), step + 1, n_listed, MAP[0], MAP[1], BLOCK_N)
        slot = step % STAGES
        mbarrier.wait(k_empty.index(slot), ((step // STAGES) & 1) ^ 1)
        if TMA:
            _copy_by_map(k_maps, start, k_full.index(slot), k_smem, slot)
        else:
            _copy_tile(k_smem, slot, k_ptr, stride_kn, start, kv_len, HEAD_DIM, COLUMNS[1])
            async_copy.mbarrier_arrive(k_full.index(slot), increment_count=False)
        v_slot = step % V_STAGES
        mbarrier.wait(v_empty.index(v_slot), ((step // V_STAGES) & 1) ^ 1)
        if TMA:
            _copy_by_map(v_maps, start, v_full.index(v_slot), v0_smem, v_slot)
        else:
            _copy_tile(v0_smem, v_slot, v_ptr, stride_vn, start, kv_len, v_width, COLUMNS[2])
            if COLUMNS[3]:
                more, width = v_ptr + BLOCK_DV, v_width - BLOCK_DV
                _copy_tile(v1_smem, v_slot, more, stride_vn, start, kv_len, width, COLUMNS[2])
            async_copy.mbarrier_arrive(v_full.index(v_slot), increment_count=False)
        start = after
    return start


@gluon.jit
def producer(
    first_row,
    visit,  # the keys to visit; see keys_of_tile
    tiles,  # the tile list of the map's row
    query,  # pointer, strides (head, row), n_rows
    keys,  # k_ptr, stride_kn, v_ptr, stride_vn, kv_len
    smem,  # q0, q1, k, v0, v1 (one or two blocks of columns each)
    barriers,  # q_full, k_full, v_full, k_empty, v_empty
    v_width,
    PACK: gl.constexpr,
    COLUMNS: gl.constexpr,  # HEAD_DIM, CHECK_D, CHECK_DV, SHARE_ROWS
    MAP: gl.constexpr,  # MAPPED, MAP_BLOCK_N
    TMA: gl.constexpr,
):
    """Copies the query rows once, and then every visited tile of keys and values.

    With ``TMA``, one thread copies tiles through a tensor map. Every program makes its own maps, because a lowered
    program cannot pass any. That takes 0.7 us. To hide it, the first tiles are copied with ``cp.async`` before.
    """
    q_ptr, stride_qh, stride_qm, n_rows = query
    k_ptr, stride_kn, v_ptr, stride_vn, kv_len = keys
    q0, q1, k_smem, v_smem, _ = smem
    first_step, n_full, n_listed, full_base, partial_base, _ = visit
    BLOCK_N: gl.constexpr = k_smem[0].shape[1]
    HEAD_DIM: gl.constexpr = COLUMNS[0]
    CHECK_D: gl.constexpr = COLUMNS[1]
    n_steps = n_listed
    if MAP[0]:
        # If there is no tile to visit, visit one that is fully masked.
        n_steps = gl.maximum(n_listed, 1)
    base = gl.where(n_full > 0, full_base, partial_base)
    start = start_of((tiles, first_step, base), 0, n_listed, MAP[0], MAP[1], BLOCK_N)
    strides = (stride_qh, stride_qm)
    _copy_queries(q0, q_ptr, strides, first_row, n_rows, HEAD_DIM, PACK, CHECK_D)
    if not COLUMNS[3]:
        _copy_queries(q1, q_ptr, strides, first_row + 64, n_rows, HEAD_DIM, PACK, CHECK_D)
    async_copy.mbarrier_arrive(barriers[0], increment_count=False)
    visited = (tiles, first_step, full_base, partial_base, n_full, n_listed)
    given = (visited, keys, smem, barriers, v_width)
    n_first = gl.minimum(n_steps, FIRST_TILES) if TMA else n_steps
    steps, maps = (0, n_first), (k_ptr, v_ptr)
    start = _copy_tiles(steps, start, given, maps, False, COLUMNS, MAP)
    if TMA:
        k_maps = _make_maps(k_ptr, kv_len, HEAD_DIM, stride_kn, k_smem)
        v_maps = _make_maps(v_ptr, kv_len, v_width, stride_vn, v_smem)
        rest, maps = (n_first, n_steps), (k_maps, v_maps)
        _copy_tiles(rest, start, given, maps, True, COLUMNS, MAP)
