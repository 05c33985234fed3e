"""The consumer warps. Each of two warp groups has 64 query rows, and all columns of V or half of them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashpte.kernels.hopper.schedule import EACH_UP_TO, FIRST_TILES, start_of


@gluon.jit
def _masked(s, start, mask, kv_len, VISIBLE: gl.constexpr):
    """Scores ``[64, N]`` with -inf where a row does not see a key, or with a float mask added."""
    # The positions of the rows and the arguments of the kind of mask; see consumer.
    m, mask_rows, stride_mn, side_stride, values_ptr, values_stride, index_lower, index_upper = mask
    MASK: gl.constexpr = VISIBLE[1]
    INDEX_TERM: gl.constexpr = VISIBLE[3]
    n = start + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    in_range = (n < kv_len)[None, :]
    visible = in_range
    if VISIBLE[0]:
        visible = visible & (n[None, :] <= m[:, None])
    if MASK == 3:
        for term in gl.static_range(VISIBLE[2]):
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
def _give_back(empty, BLOCK_D: gl.constexpr):
    """Tells the producer that this warp group has read a slot. Either every thread arrives, or one thread for all.

    A single arrival first needs a barrier among the threads. Two such barriers per step cost 4% of a prefill of 2,048
    rows with D = 128. An arrival of the kind that ``cp.async`` copies use needs no barrier: it happens once the
    thread's copies have landed, and these threads have no copies. With D = 512, steps are short, and 128 arrivals per
    step took 1 to 2% more time than the barriers.
    """
    if BLOCK_D <= EACH_UP_TO:
        async_copy.mbarrier_arrive(empty, increment_count=False)
    else:
        mbarrier.arrive(empty, count=1)


@gluon.jit
def _scores(q_smem, k_smem, slot, S_LAYOUT: gl.constexpr):
    """Issues ``Q K``, one product for each block of columns. Each adds to the scores of the one before."""
    BLOCK_N: gl.constexpr = k_smem[0].shape[1]
    s = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    for i in gl.static_range(len(q_smem)):
        s = warpgroup_mma(q_smem[i], k_smem[i].index(slot).permute((1, 0)), s, use_acc=i > 0, is_async=True)
    return s


@gluon.jit
def _add_values(p, v_smem, slot, acc):
    """Issues ``P V``, one product for each block of columns. Each has its own accumulator."""
    added = (warpgroup_mma(p, v_smem[0].index(slot), acc[0], is_async=True),)
    if len(acc) == 2:
        # The same registers: the layout of P does not depend on the columns of V, but its name does.
        same = gl.convert_layout(p, gl.DotOperandLayout(operand_index=0, parent=acc[1].type.layout, k_width=2))
        added = (added[0], warpgroup_mma(same, v_smem[1].index(slot), acc[1], is_async=True))
    return added


@gluon.jit
def _rescaled(acc, rescale):
    """All blocks of the accumulator times ``rescale``, which has the rows of the first block."""
    scaled = (acc[0] * rescale[:, None],)
    if len(acc) == 2:
        rows: gl.constexpr = gl.SliceLayout(1, acc[1].type.layout)
        scaled = (scaled[0], acc[1] * gl.convert_layout(rescale, rows)[:, None])
    return scaled


@gluon.jit
def _lane_sums(x):
    """``x [64, N]`` summed over the columns that each thread holds, ``[64, 4]``. Threads exchange nothing."""
    N: gl.constexpr = x.shape[1]
    return gl.sum(gl.sum(gl.reshape(x, [64, N // 8, 4, 2]), 1), 2)


@gluon.jit
def _softmax(s, row_max, row_sum, qk_scale, ACC_LAYOUT: gl.constexpr, EXP2_SCALE: gl.constexpr, dtype: gl.constexpr):
    """One step of the online softmax, like ``primitives.online_softmax``. Exponentials are base 2.

    If ``EXP2_SCALE`` is 1, ``s`` is not scaled yet, and ``qk_scale`` (with log2(e) in it) is applied here. A positive
    scale commutes with the maximum, so scaling and subtracting are a single instruction. Otherwise, ``s`` is already
    scaled.
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
    sums = _lane_sums(probs)
    row_sum = row_sum * gl.convert_layout(rescale, gl.SliceLayout(1, sums.type.layout))[:, None] + sums
    p = gl.convert_layout(probs.to(dtype), P_LAYOUT)
    return p, gl.convert_layout(rescale, gl.SliceLayout(1, ACC_LAYOUT)), new_max, row_sum


@gluon.jit
def _step(
    step,
    n_steps,
    state,  # acc, p, row_max, row_sum
    smem,  # q, k, v (one or two blocks of columns each), barriers
    mask,
    visited,  # for partial tiles; see start_of
    kv_len,
    qk_scale,
    MAP: gl.constexpr,  # MAPPED, MAP_BLOCK_N, TMA
    EDGE: gl.constexpr,
    VISIBLE: gl.constexpr,
    EXP2_SCALE: gl.constexpr,
):
    """Scores and softmax of tile ``step``, overlapped with ``P V`` of the previous tile."""
    acc, p, row_max, row_sum = state
    q_smem, k_smem, v_smem, barriers = smem
    _, k_full, v_full, k_empty, v_empty = barriers
    S_LAYOUT: gl.constexpr = row_max.type.layout.parent
    ACC_LAYOUT: gl.constexpr = acc[0].type.layout
    STAGES: gl.constexpr = k_smem[0].shape[0]
    BLOCK_N: gl.constexpr = k_smem[0].shape[1]
    V_STAGES: gl.constexpr = v_smem[0].shape[0]
    BLOCK_D: gl.constexpr = q_smem[0].shape[1]
    dtype: gl.constexpr = k_smem[0].dtype
    slot = step % STAGES
    previous = (step - 1) % V_STAGES
    if EDGE:
        start = start_of(visited, step, n_steps, MAP[0], MAP[1], BLOCK_N)
    # cp.async writes shared memory through the generic proxy, like ordinary stores, but matrix instructions read it
    # through the async proxy. TMA copies need no fence, and copy all but the first tiles.
    if MAP[2]:
        if step <= FIRST_TILES:
            fence_async_shared()
    else:
        fence_async_shared()
    s = _scores(q_smem, k_smem, slot, S_LAYOUT)
    acc = _add_values(p, v_smem, previous, acc)
    s = warpgroup_mma_wait(len(acc), deps=[s])
    _give_back(k_empty.index(slot), BLOCK_D)
    if EXP2_SCALE != 1.0:
        s = s * qk_scale
    if EDGE:
        s = _masked(s, start, mask, kv_len, VISIBLE)
    p_next, rescale, row_max, row_sum = _softmax(s, row_max, row_sum, qk_scale, ACC_LAYOUT, EXP2_SCALE, dtype)
    # Wait here for the tiles of the next step. These branches keep ptxas from moving the wait for P V above the
    # exponentials, which would undo the overlap.
    mbarrier.wait(k_full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1, pred=step + 1 < n_steps)
    mbarrier.wait(v_full.index(step % V_STAGES), (step // V_STAGES) & 1)
    if len(acc) == 2:
        first, second, p, p_next, row_sum = warpgroup_mma_wait(0, deps=[acc[0], acc[1], p, p_next, row_sum])
        acc = (first, second)
    else:
        first, p, p_next, row_sum = warpgroup_mma_wait(0, deps=[acc[0], p, p_next, row_sum])
        acc = (first,)
    _give_back(v_empty.index(previous), BLOCK_D)
    return _rescaled(acc, rescale), p_next, row_max, row_sum


@gluon.jit
def _eight_in_a_row(x):
    """``x [64, N]`` of 16 bits in a layout in which a thread holds 16 bytes of a row, and four threads 64 bytes."""
    N: gl.constexpr = x.shape[1]
    # With 16 columns, four threads have 64 bytes of two rows.
    LANES: gl.constexpr = [[0, 8], [8, 0] if N == 16 else [0, 16], [1, 0], [2, 0], [4, 0]]
    WARPS: gl.constexpr = [[16, 0], [32, 0]]
    REGISTERS: gl.constexpr = (
        [[0, 1], [0, 2], [0, 4]]
        if N == 16
        else [[0, 1], [0, 2], [0, 4], [8, 0]]
        if N == 32
        else [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32]]
        if N == 64
        else [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]]
        if N == 128
        else [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 128]]
    )
    return gl.convert_layout(x, gl.DistributedLinearLayout(REGISTERS, LANES, WARPS, [], [64, N]))


@gluon.jit
def _store_result(acc, row_sum, rows, v_width, out, PACK: gl.constexpr, STORES: gl.constexpr):
    """Stores ``acc / row_sum`` as 64 rows of the result. A row that sees nothing is 0, even if hidden values are NaN.

    With ``WIDE_STORES``, lanes that share a row exchange their columns first, so that each lane stores 16 bytes, and
    four lanes 64 bytes, at once. That takes 4 KB of shared memory.
    """
    first_row, n_rows = rows
    out_ptr, stride_om, stride_oh, stride_od = out
    WIDE_STORES: gl.constexpr = STORES[3]
    ROWS_ALIGNED: gl.constexpr = STORES[4]
    total = gl.convert_layout(row_sum, gl.SliceLayout(1, acc.type.layout))
    weight = 1.0 / gl.where(total == 0.0, 1.0, total)
    acc = gl.where((total == 0.0)[:, None], 0.0, acc * weight[:, None])
    result = acc.to(out_ptr.dtype.element_ty)
    if WIDE_STORES:
        result = _eight_in_a_row(result)
    OUT: gl.constexpr = result.type.layout
    r = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    dv = gl.arange(0, result.shape[1], layout=gl.SliceLayout(0, OUT))
    out_rows = out_ptr + (r // PACK).to(gl.int64) * stride_om
    if PACK > 1:
        out_rows += (r % PACK).to(gl.int64) * stride_oh
    if ROWS_ALIGNED:
        out_rows = gl.multiple_of(out_rows, 16)
    ok = (r < n_rows)[:, None] & (dv < v_width)[None, :]
    gl.store(out_rows[:, None] + (dv * stride_od)[None, :], result, mask=ok)


@gluon.jit
def _store_results(acc, row_sum, rows, v_width, out, PACK: gl.constexpr, STORES: gl.constexpr):
    """Stores every block of the accumulator; see :func:`_store_result`."""
    _store_result(acc[0], row_sum, rows, v_width, out, PACK, STORES)
    if len(acc) == 2:
        N: gl.constexpr = acc[0].shape[1]
        more = (out[0] + N * out[3], out[1], out[2], out[3])
        _store_result(acc[1], row_sum, rows, v_width - N, more, PACK, STORES)


@gluon.jit
def _largest_exponent(acc):
    """The largest exponent in each row, as an integer. Infinities and NaN do not count.

    Without the sign bit, floats are ordered like their bits. Adding 1 to the exponent of inf or NaN overflows it, so
    these become small.
    """
    size = acc.to(gl.uint32, bitcast=True) * 2 + 0x01000000
    return (gl.max(size, 1) >> 24).to(gl.int32)


@gluon.jit
def _store_columns(acc, inverse, acc_ptr, rows, WIDTH: gl.constexpr):
    """Stores ``acc * inverse`` as float16, in the order in which the threads of a row hold its columns."""
    first_row, n_rows = rows
    N: gl.constexpr = acc.shape[1]
    IN_A_ROW: gl.constexpr = 4 if N >= 32 else N // 8  # pairs of each 32 columns that a thread holds
    stored = (acc * inverse[:, None]).to(gl.float16)
    stored = gl.reshape(stored, [64, N // (8 * IN_A_ROW), IN_A_ROW, 4, 2])
    stored = _eight_in_a_row(gl.reshape(gl.permute(stored, [0, 1, 3, 2, 4]), [64, N]))
    HELD: gl.constexpr = stored.type.layout
    r = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, HELD))
    dv = gl.arange(0, N, layout=gl.SliceLayout(0, HELD))
    if N < 32:
        dv = dv // (2 * IN_A_ROW) * 8 + dv % (2 * IN_A_ROW)  # where they would be among 32 columns
    acc_rows = gl.multiple_of(acc_ptr + r.to(gl.int64) * WIDTH, 16)
    gl.store(acc_rows[:, None] + dv[None, :], stored, mask=(r < n_rows)[:, None])


@gluon.jit
def _store_partial(acc, row_max, row_sum, row, rows, partial, STORES: gl.constexpr):
    """Stores a split's result for 64 rows: the accumulator as float16, and the maximum, sum and unit of each row.

    Columns are stored in the order in which the threads of a row hold them, so each thread stores 16 bytes and
    exchanges nothing. For example, the first thread holds columns 0, 1, 8, 9, 16, 17, 24 and 25 of each 32. A unit
    depends on the largest value of the row. It is a power of two, so it changes no bit of the other values. The largest
    value is 2^14 to 2^15 units, infinities aside. Units are at least 2^-120, so that neither they nor their inverses
    overflow.
    """
    first_row, n_rows = rows
    acc_ptr, stats_ptr, unit_at = partial
    WIDTH: gl.constexpr = STORES[1]
    STATS: gl.constexpr = STORES[2]
    ACC_LAYOUT: gl.constexpr = acc[0].type.layout
    largest = _largest_exponent(acc[0])
    if len(acc) == 2:
        largest = gl.maximum(largest, gl.convert_layout(_largest_exponent(acc[1]), gl.SliceLayout(1, ACC_LAYOUT)))
    exponent = gl.maximum(largest - 15, 7)
    unit = (exponent << 23).to(gl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(gl.float32, bitcast=True)
    _store_columns(acc[0], inverse, acc_ptr, rows, WIDTH)
    if len(acc) == 2:
        inverse = gl.convert_layout(inverse, gl.SliceLayout(1, acc[1].type.layout))
        _store_columns(acc[1], inverse, acc_ptr + acc[0].shape[1], rows, WIDTH)
    of_unit = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC_LAYOUT))
    gl.store(stats_ptr + of_unit.to(gl.int64) * STATS + unit_at, unit, mask=of_unit < n_rows)
    # If consumers share rows, both store the same maximum and sum.
    stats = stats_ptr + row.to(gl.int64) * STATS
    gl.store(stats, row_max, mask=row < n_rows)
    gl.store(stats + 1, row_sum, mask=row < n_rows)


@gluon.jit
def consumer(
    rows,  # first_row, n_rows
    visit,  # the keys to visit; see keys_of_tile
    tiles,  # the tile list of the map's row
    results,  # out: out_ptr, stride_om, stride_oh, stride_od; partial: acc_ptr, stats_ptr, index of the unit
    mask,  # mask_ptr, stride_mm, stride_mh, stride_mn, side_stride, values_ptr, values_stride
    smem,  # q, k, v (one or two blocks of columns each), barriers
    limits,  # kv_len, qk_scale, v_width
    PACK: gl.constexpr,
    MAP: gl.constexpr,  # MAPPED, MAP_BLOCK_N, TMA
    VISIBLE: gl.constexpr,  # CAUSAL, MASK, TERMS, INDEX_TERM
    EXP2_SCALE: gl.constexpr,
    STORES: gl.constexpr,  # SINGLE_SPLIT, WIDTH, STATS, WIDE_STORES, ROWS_ALIGNED
):
    """Attention of 64 query rows by one warp group. The pointers to partial results are those of the tile's head."""
    q_smem, k_smem, v_smem, barriers = smem
    kv_len, qk_scale, v_width = limits
    out, partial = results
    BLOCK_N: gl.constexpr = k_smem[0].shape[1]
    BLOCK_D: gl.constexpr = q_smem[0].shape[1]
    BLOCK_DV: gl.constexpr = v_smem[0].shape[2]
    STAGES: gl.constexpr = k_smem[0].shape[0]
    V_STAGES: gl.constexpr = v_smem[0].shape[0]
    MASK: gl.constexpr = VISIBLE[1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    first_row, n_rows = rows
    mask_ptr, stride_mm, stride_mh, stride_mn, side_stride, values_ptr, values_stride = mask
    q_full, k_full, v_full, k_empty, _ = barriers
    first_step, n_full, n_listed, _, partial_base, active = visit
    visited = (tiles, first_step, partial_base)
    dtype: gl.constexpr = k_smem[0].dtype
    row = first_row + gl.arange(0, 64, layout=ROWS)
    # Rows past the end repeat the last one, so that the pointers stay in range.
    safe_row = gl.minimum(row, n_rows - 1)
    m = row // PACK
    index_lower = m
    index_upper = m
    mask_rows = mask_ptr + (safe_row // PACK).to(gl.int64) * stride_mm
    if PACK > 1:
        mask_rows += (safe_row % PACK).to(gl.int64) * stride_mh
    if MASK == 3 and VISIBLE[3]:
        # Clamp to 32 bits. These hold every key index, so clamping changes nothing.
        lower = gl.load(mask_rows)
        upper = gl.load(mask_rows + side_stride)
        index_lower = gl.minimum(gl.maximum(lower, -1), 2147483647).to(gl.int32)
        index_upper = gl.minimum(gl.maximum(upper, -1), 2147483647).to(gl.int32)
    seen = (m, mask_rows, stride_mn, side_stride, values_ptr, values_stride, index_lower, index_upper)

    row_max = gl.full([64], float("-inf"), gl.float32, ROWS)
    row_sum = _lane_sums(gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT))
    acc = (gl.zeros([64, BLOCK_DV], gl.float32, ACC_LAYOUT),)
    if len(v_smem) == 2:
        REST: gl.constexpr = v_smem[1].shape[2]
        REST_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 16])
        acc = (acc[0], gl.zeros([64, REST], gl.float32, REST_LAYOUT))
    n_steps = n_listed
    if MASK != 0:
        # If there is no tile to visit, visit one that is fully masked.
        n_steps = gl.maximum(n_listed, 1)
    start = start_of(visited, 0, n_listed, MAP[0], MAP[1], BLOCK_N)
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    fence_async_shared()
    s = warpgroup_mma_wait(0, deps=[_scores(q_smem, k_smem, 0, S_LAYOUT)])
    _give_back(k_empty.index(0), BLOCK_D)
    if EXP2_SCALE != 1.0:
        s = s * qk_scale
    if n_full == 0:
        s = _masked(s, start, seen, kv_len, VISIBLE)
    p, _, row_max, row_sum = _softmax(s, row_max, row_sum, qk_scale, ACC_LAYOUT, EXP2_SCALE, dtype)
    mbarrier.wait(k_full.index(1 % STAGES), (1 // STAGES) & 1, pred=n_steps > 1)
    mbarrier.wait(v_full.index(0), 0)
    state = (acc, p, row_max, row_sum)
    full_end = gl.maximum(n_full, 1)
    for step in range(1, full_end):
        state = _step(step, n_steps, state, smem, seen, visited, kv_len, qk_scale, MAP, False, VISIBLE, EXP2_SCALE)
    for step in range(full_end, n_steps):
        state = _step(step, n_steps, state, smem, seen, visited, kv_len, qk_scale, MAP, True, VISIBLE, EXP2_SCALE)
    acc, p, row_max, row_sum = state
    fence_async_shared()
    acc = _add_values(p, v_smem, (n_steps - 1) % V_STAGES, acc)
    row_sum = gl.convert_layout(gl.sum(row_sum, 1), ROWS)
    # row is needed only for storing. Depending on the wait keeps it from being computed, and spilled, before the loops.
    if len(acc) == 2:
        first, second, p, row = warpgroup_mma_wait(0, deps=[acc[0], acc[1], p, row])
        acc = (first, second)
    else:
        first, p, row = warpgroup_mma_wait(0, deps=[acc[0], p, row])
        acc = (first,)

    if STORES[0]:  # noqa: SIM114 (this condition is a compile-time constant, the next is not)
        _store_results(acc, row_sum, rows, v_width, out, PACK, STORES)
    elif active == 1:
        _store_results(acc, row_sum, rows, v_width, out, PACK, STORES)
    else:
        _store_partial(acc, row_max, row_sum, row, rows, partial, STORES)
