"""Device functions that the attention kernels share: tiles, the online softmax, one attention step.

Shape legend: ``R`` query rows of one program, ``N`` keys of one tile, ``D``/``DV`` padded head dims (powers of two).

Related values travel as a tuple: the running ``state`` of the softmax, the query ``rows``, the ``keys`` and values, and
the ``mask``. Compile-time constants travel in separate tuples, because a tuple with run-time values would turn them
into run-time values.

Exponentials are base 2. Scores are kept as base-2 exponents (``q . k * scale * log2(e)``), so that the exponential is a
bare ``exp2`` and ``EXP2_SCALE`` is 1. With a float mask or float32 tensors, scores stay in natural units
(``q . k * scale``), and ``EXP2_SCALE`` is ``log2(e)``, which is applied to the difference from the maximum. A float
mask's entry may be the dtype's minimum, which is finite. Multiplied by ``log2(e)`` it would become -inf, and a row that
holds nothing else would become zeros. For float32 tensors, natural units are more exact. A softcap and the sinks are
converted to the units of the scores.
"""

import os

import triton
import triton.language as tl

LOG2E = 1.4426950408889634

# Triton reads this when a kernel is decorated, so a process either interprets or compiles all kernels.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

MASK_NONE = 0
MASK_BOOL = 1
MASK_FLOAT = 2
MASK_INTERVALS = 3

# The VISIBLE tuple of a full tile: CAUSAL, MASK, TERMS, INDEX_TERM.
ALL_VISIBLE = tl.constexpr((False, 0, 0, 0))


@triton.jit
def score_scale(scale, EXP2_SCALE: tl.constexpr):
    """The factor of ``q . k``, float32. It includes log2(e), unless ``EXP2_SCALE`` applies that to the exponent.

    Inductor passes Python floats to kernels as float64, and an eager launch passes them as float32.
    """
    factor = tl.full([], scale, tl.float32)
    if EXP2_SCALE == 1.0:
        factor = factor * 1.4426950408889634
    return factor


@triton.jit
def let_dependents_start(DEPENDENT: tl.constexpr):
    """Lets the next kernel's programs start once all programs of this kernel have reached this call or ended.

    They then wait on the GPU and occupy it. If a kernel lets them start before its own work is done, they crowd onto
    the multiprocessors that it leaves idle.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_earlier_kernels(DEPENDENT: tl.constexpr):
    """Waits until the kernels before this one have ended and their writes are visible.

    A kernel that is launched dependent (programmatic dependent launch, sm_90 and newer) needs this before its first
    access to memory, because its programs may start while the previous kernel still runs. Every program must call it,
    so that the end of a kernel implies the end of the kernels before it.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()


@triton.jit
def tile_runs(counts, MAP_BLOCK_N: tl.constexpr):
    """First keys of the full tiles and of the partial tiles of a map's row; negative if they are not consecutive."""
    return tl.load(counts + 2) * MAP_BLOCK_N, tl.load(counts + 3) * MAP_BLOCK_N


@triton.jit
def visited_key(tiles, runs, step, full_steps, MAP_BLOCK_N: tl.constexpr, BLOCK_N: tl.constexpr):
    """First key of the ``step``-th tile of ``BLOCK_N`` keys in a map's row. The first ``full_steps`` tiles are full.

    Reads the list only if the tiles of a kind are not consecutive, because loading keys would wait for it.
    """
    SUB: tl.constexpr = MAP_BLOCK_N // BLOCK_N
    full_start, partial_start = runs
    start = tl.where(step < full_steps, full_start, partial_start)
    at = tl.where(step < full_steps, step, step - full_steps)
    listed = tl.load(tiles + step // SUB, mask=start < 0, other=0)
    return tl.where(start < 0, listed * MAP_BLOCK_N + step % SUB * BLOCK_N, start + at * BLOCK_N)


@triton.jit
def consecutive_end(tiles, first, end, MAP_BLOCK_N: tl.constexpr, BLOCK_N: tl.constexpr):
    """``end`` if steps ``first .. end`` of an ascending list are consecutive tiles (or none), else ``first``.

    This is for part of a list that is not consecutive as a whole. For example, a ring buffer has two runs of full
    tiles.
    """
    SUB: tl.constexpr = MAP_BLOCK_N // BLOCK_N
    result = first
    if end > first:
        from_tile = first // SUB
        to_tile = (end - 1) // SUB
        if tl.load(tiles + to_tile) - tl.load(tiles + from_tile) == to_tile - from_tile:
            result = end
    return result


@triton.jit
def load_tile(ptr, rows, row_stride, n_rows, cols, n_cols, CHECK_ROWS: tl.constexpr, CHECK_COLS: tl.constexpr):
    """Loads a ``[rows, cols]`` tile of a matrix with contiguous columns. Entries outside the matrix read as 0."""
    ptrs = ptr + rows[:, None] * row_stride + cols[None, :]
    if CHECK_ROWS and CHECK_COLS:
        tile = tl.load(ptrs, mask=(rows < n_rows)[:, None] & (cols < n_cols)[None, :], other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(ptrs, mask=(rows < n_rows)[:, None], other=0.0)
    elif CHECK_COLS:
        tile = tl.load(ptrs, mask=(cols < n_cols)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def exact_scores(q_rows, k_ptr, n, stride_kn, n_keys, HEAD_DIM: tl.constexpr):
    """``q . k`` ``[R, N]`` of float32 tensors, summed in float64. Takes pointers to the query rows.

    The exponential amplifies the error of a score, and a chain of hundreds of float32 additions loses several times
    more than the blocked sums of a BLAS. (``tl.dot`` on float64 operands does not compile in every layout.)
    """
    scores = tl.zeros([q_rows.shape[0], n.shape[0]], tl.float64)
    for start in range(0, HEAD_DIM, 16):
        d = start + tl.arange(0, 16)
        ok = (d < HEAD_DIM)[None, :]
        q = tl.load(q_rows[:, None] + d[None, :], mask=ok, other=0.0).to(tl.float64)
        k_ptrs = k_ptr + (n * stride_kn)[:, None] + d[None, :]
        k = tl.load(k_ptrs, mask=ok & (n < n_keys)[:, None], other=0.0).to(tl.float64)
        scores += tl.sum(q[:, None, :] * k[None, :, :], 2)
    return scores.to(tl.float32)


@triton.jit
def softcapped(scores, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """``SOFTCAP tanh(scores / SOFTCAP)``, with both in the same units.

    Below 1, ``tanh x`` is the convergent ``x (945 + 105 x^2 + x^4) / (945 + 420 x^2 + 15 x^4)`` of Lambert's continued
    fraction, which is too large by at most 6.2e-8 of it. Above, it is ``(e - 1) / (e + 1)`` with ``e = exp(2 x)``. That
    form alone would cancel for small scores. Beyond 10, float32 has no number between ``tanh x`` and 1. In float32, the
    error of all this is at most 2.4e-7 of the result.

    The hardware's own tanh (sm_75 and newer) is off by up to 2^-11 of the cap, which is 0.02 at a cap of 50.
    """
    x = tl.minimum(tl.maximum(scores * (1.0 / SOFTCAP), -10.0), 10.0)
    square = x * x
    e = tl.exp2(x * 2.8853900817779268)
    small = square < 1.0
    above = tl.where(small, x * (945.0 + square * (105.0 + square)), e - 1.0)
    below = tl.where(small, 945.0 + square * (420.0 + square * 15.0), e + 1.0)
    return SOFTCAP * (tl.div_rn(above, below) if EXACT else above / below)


@triton.jit
def with_sink(row_sum, row_max, sinks_ptr, head, EXP2_SCALE: tl.constexpr):
    """``row_sum`` and the term of each row's sink, relative to the running maximum ``row_max``.

    A sink has no value, so it changes the denominator alone, once for all splits. If it exceeds the maximum by so much
    that its term is infinite, the row is 0, as it should be. ``head`` is each row's query head or that of all.
    """
    sink = tl.load(sinks_ptr + head).to(tl.float32)
    if EXP2_SCALE == 1.0:
        sink = sink * 1.4426950408889634
    base = tl.where(row_max == float("-inf"), 0.0, row_max)
    return row_sum + tl.exp2((sink - base) * EXP2_SCALE)


@triton.jit
def online_softmax(scores, row_max, row_sum, EXP2_SCALE: tl.constexpr):
    """One step of the online softmax over ``scores`` ``[R, N]`` (Milakov and Gimelshein, arXiv:1805.02867).

    Returns the unnormalized probabilities ``[R, N]``, the factor that rescales the previous accumulator, and the new
    running maximum and sum, each ``[R]``. The maximum is in the units of the scores.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # A row that has seen no visible key keeps -inf as its maximum. Subtracting 0 instead avoids inf - inf.
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    probs = tl.exp2((scores - base[:, None]) * EXP2_SCALE)
    rescale = tl.exp2((row_max - base) * EXP2_SCALE)
    return probs, rescale, new_max, row_sum * rescale + tl.sum(probs, 1)


@triton.jit
def index_bounds(bound_rows, side_stride):
    """Bounds ``[R]`` of the first term, clamped to 32 bits. These hold every key index, so clamping changes nothing.

    Loaded before the loop over tiles. Inside the loop, every tile would wait for them.
    """
    lower = tl.load(bound_rows)
    upper = tl.load(bound_rows + side_stride)
    lower = tl.minimum(tl.maximum(lower, -1), 2147483647).to(tl.int32)
    upper = tl.minimum(tl.maximum(upper, -1), 2147483647).to(tl.int32)
    return lower, upper


@triton.jit
def visible_in_intervals(intervals, start_n, n, in_range, TERMS: tl.constexpr, INDEX_TERM: tl.constexpr):
    """Which keys ``start_n + n`` each row sees, ``[R, N]``: each term's value must lie within the row's bounds.

    ``intervals`` is ``(bound_rows [R] pointers, side_stride, values_ptr, values_stride, lower [R], upper [R])``. With
    ``INDEX_TERM``, the last two are the results of :func:`index_bounds`. See :mod:`flashpte.kernels.intervals`.
    """
    bound_rows, side_stride, values_ptr, values_stride, index_lower, index_upper = intervals
    visible = in_range
    for term in tl.static_range(TERMS):
        if INDEX_TERM and term == 0:
            lower = index_lower
            upper = index_upper
            value = (start_n + n)[None, :]
        else:
            lower = tl.load(bound_rows + 2 * term * side_stride)
            upper = tl.load(bound_rows + (2 * term + 1) * side_stride)
            row = values_ptr + (term - INDEX_TERM) * values_stride
            value = tl.load(row + start_n + n[None, :], mask=in_range, other=0)
        visible = visible & (value >= lower[:, None]) & (value <= upper[:, None])
    return visible


@triton.jit
def mask_of_rows(tensors, strides, interval_strides, b, head, m, VISIBLE: tl.constexpr):
    """The mask of rows ``m [R]`` of one head, in the form that :func:`attend_tile` takes.

    Args:
        tensors: ``(mask_ptr, values_ptr)``. For intervals, the first holds the bounds.
        strides: the mask's strides per batch entry, head, row and key. Bounds use only the one per batch entry.
        interval_strides: strides of the bounds per side, and of the values per batch entry and per term.
        b, head: int64.
    """
    mask_ptr, values_ptr = tensors
    stride_mb, stride_mh, stride_mm, stride_mn = strides
    side_stride, stride_ib, stride_it = interval_strides
    MASK: tl.constexpr = VISIBLE[1]
    INDEX_TERM: tl.constexpr = VISIBLE[3]
    mask = (m, 0, values_ptr, 0, m, m)
    if MASK == 3:
        bound_rows = mask_ptr + b * stride_mb + m
        values_ptr += b * stride_ib
        lower, upper = index_bounds(bound_rows, side_stride) if INDEX_TERM else (m, m)
        mask = (bound_rows, side_stride, values_ptr, stride_it, lower, upper)
    elif MASK != 0:
        mask_rows = mask_ptr + b * stride_mb + head * stride_mh + m.to(tl.int64) * stride_mm
        mask = (mask_rows, stride_mn, values_ptr, 0, m, m)
    return mask


@triton.jit
def attend_tile(
    state,
    rows,
    keys,
    mask,
    start_n,
    DIMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHECK_KEYS: tl.constexpr,
    VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY_VALUES: tl.constexpr = False,
):
    """Attends the query rows to keys ``start_n .. start_n + BLOCK_N`` and returns the new ``state``.

    Args:
        state: ``(acc [R, DV] float32, row_max [R] float32, row_sum [R] float32)``.
        rows: ``(q [R, D], q_rest [R, REST], q_rows [R] pointers to the query rows, q_pos [R] for CAUSAL, qk_scale)``.
            Uses ``q_rows`` if ``EXACT``, otherwise ``q``, and ``q_rest`` if ``BLOCK_REST``.
        keys: ``(k_ptr, stride_kn, v_ptr, stride_vn, kv_len)``.
        mask: for a dense mask, ``([R] pointers to its rows, stride_mn, ...)``; for intervals, the argument of
            :func:`visible_in_intervals`; anything if ``MASK`` is ``MASK_NONE``.
        DIMS: ``(HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_REST, BLOCK_DV)``; see :func:`tuning.tile_columns`.
        CHECK_KEYS: whether the tile may extend past the end of the keys.
        VISIBLE: ``(CAUSAL, MASK, TERMS, INDEX_TERM)``; :data:`ALL_VISIBLE` for a full tile.
        PRECISION: ``(EXP2_SCALE, EXACT, SOFTCAP)``.
        EARLY_VALUES: whether to load the values with the keys instead of after the softmax. In a loop that is not
            pipelined, this waits for memory once instead of twice, but needs more registers.
    """
    acc, row_max, row_sum = state
    q, q_rest, q_rows, q_pos, qk_scale = rows
    HEAD_DIM: tl.constexpr = DIMS[0]
    V_HEAD_DIM: tl.constexpr = DIMS[1]
    BLOCK_D: tl.constexpr = DIMS[2]
    BLOCK_REST: tl.constexpr = DIMS[3]
    BLOCK_DV: tl.constexpr = DIMS[4]
    MASK: tl.constexpr = VISIBLE[1]
    EXP2_SCALE: tl.constexpr = PRECISION[0]
    EXACT: tl.constexpr = PRECISION[1]
    SOFTCAP: tl.constexpr = PRECISION[2]
    k_ptr, stride_kn, v_ptr, stride_vn, kv_len = keys
    n = tl.arange(0, BLOCK_N)
    n_keys = kv_len - start_n
    # int64, because start_n * stride exceeds 2^31 elements in a [B, L, H, D] cache of 128K tokens.
    tile_start = start_n.to(tl.int64)
    k_ptr += tile_start * stride_kn
    dv = tl.arange(0, BLOCK_DV)
    v_ptr += tile_start * stride_vn
    if EARLY_VALUES:
        v = load_tile(v_ptr, n, stride_vn, n_keys, dv, V_HEAD_DIM, CHECK_KEYS, BLOCK_DV != V_HEAD_DIM)
    if EXACT:
        scores = exact_scores(q_rows, k_ptr, n, stride_kn, n_keys, HEAD_DIM)
    else:
        d = tl.arange(0, BLOCK_D)
        k = load_tile(k_ptr, n, stride_kn, n_keys, d, HEAD_DIM, CHECK_KEYS, BLOCK_D > HEAD_DIM)
        scores = tl.dot(q, tl.trans(k))
        if BLOCK_REST > 0:
            d = BLOCK_D + tl.arange(0, BLOCK_REST)
            k = load_tile(k_ptr, n, stride_kn, n_keys, d, HEAD_DIM, CHECK_KEYS, BLOCK_D + BLOCK_REST > HEAD_DIM)
            scores = tl.dot(q_rest, tl.trans(k), scores)
    scores = scores * qk_scale
    if SOFTCAP > 0.0:
        scores = softcapped(scores, SOFTCAP, EXACT)
    # Always mask the scores as well as the load. A key past the end reads as zeros, which would be a score of 0.
    if CHECK_KEYS:
        scores = tl.where((n < n_keys)[None, :], scores, float("-inf"))
    if VISIBLE[0]:
        scores = tl.where((start_n + n)[None, :] <= q_pos[:, None], scores, float("-inf"))
    in_range = (n < n_keys)[None, :]
    if MASK == 3:
        visible = visible_in_intervals(mask, start_n, n, in_range, VISIBLE[2], VISIBLE[3])
        scores = tl.where(visible, scores, float("-inf"))
    elif MASK != 0:
        mask_rows, stride_mn, _, _, _, _ = mask
        mask_ptrs = mask_rows[:, None] + (tile_start * stride_mn + n * stride_mn)[None, :]
        if MASK == 1:
            visible = tl.load(mask_ptrs, mask=in_range, other=0)
            scores = tl.where(visible != 0, scores, float("-inf"))
        else:
            scores += tl.load(mask_ptrs, mask=in_range, other=0.0).to(tl.float32)
    probs, rescale, row_max, row_sum = online_softmax(scores, row_max, row_sum, EXP2_SCALE)
    if not EARLY_VALUES:
        v = load_tile(v_ptr, n, stride_vn, n_keys, dv, V_HEAD_DIM, CHECK_KEYS, BLOCK_DV != V_HEAD_DIM)
    if EXACT:
        acc = acc * rescale[:, None] + tl.dot(probs, v, input_precision="ieee")
    else:
        acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None])
    return acc, row_max, row_sum


@triton.jit
def normalise(acc, row_sum):
    """``acc / row_sum`` per row, correctly rounded; 0 for a row that attends to nothing."""
    return tl.div_rn(acc, tl.broadcast_to(tl.where(row_sum == 0.0, 1.0, row_sum)[:, None], acc.shape))
