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

from flashpte.kernels.hopper.schedule import EACH_UP_TO, start_of
from flashpte.kernels.hopper.store import store_partial, store_results


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
    first = warpgroup_mma(p, v_smem[0].index(slot), acc[0], is_async=True)
    if len(acc) == 2:
        # The same registers: the layout of P does not depend on the columns of V, but its name does.
        same = gl.convert_layout(p, gl.DotOperandLayout(operand_index=0, parent=acc[1].type.layout, k_width=2))
        return first, warpgroup_mma(same, v_smem[1].index(slot), acc[1], is_async=True)
    else:  # a compile-time condition: without else, the compiler would go on to the next line
        return (first,)


@gluon.jit
def _rescaled(acc, rescale):
    """All blocks of the accumulator times ``rescale``, which has the rows of the first block."""
    first = acc[0] * rescale[:, None]
    if len(acc) == 2:
        rows: gl.constexpr = gl.SliceLayout(1, acc[1].type.layout)
        return first, acc[1] * gl.convert_layout(rescale, rows)[:, None]
    else:
        return (first,)


@gluon.jit
def _accumulators(v_smem):
    """Zeros for every block of columns of the values."""
    N: gl.constexpr = v_smem[0].shape[2]
    first = gl.zeros([64, N], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16]))
    if len(v_smem) == 2:
        REST: gl.constexpr = v_smem[1].shape[2]
        return first, gl.zeros([64, REST], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 16]))
    else:
        return (first,)


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
    MAP: gl.constexpr,  # MAPPED, MAP_BLOCK_N
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
    # through the async proxy. (TMA copies need no fence.)
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
def consumer(
    rows,  # first_row, n_rows
    visit,  # the keys to visit; see keys_of_tile
    tiles,  # the tile list of the map's row
    results,  # out: out_ptr, stride_om, stride_oh, stride_od; partial: acc_ptr, stats_ptr, index of the unit
    mask,  # mask_ptr, stride_mm, stride_mh, stride_mn, side_stride, values_ptr, values_stride
    smem,  # q, k, v (one or two blocks of columns each), barriers
    limits,  # kv_len, qk_scale, v_width
    PACK: gl.constexpr,
    MAP: gl.constexpr,  # MAPPED, MAP_BLOCK_N
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
    STAGES: gl.constexpr = k_smem[0].shape[0]
    V_STAGES: gl.constexpr = v_smem[0].shape[0]
    MASK: gl.constexpr = VISIBLE[1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
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
    acc = _accumulators(v_smem)
    ACC_LAYOUT: gl.constexpr = acc[0].type.layout
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
        store_results(acc, row_sum, rows, v_width, out, PACK, STORES)
    elif active == 1:
        store_results(acc, row_sum, rows, v_width, out, PACK, STORES)
    else:
        store_partial(acc, row_max, row_sum, row, rows, partial, STORES)
