"""Stores the results of a consumer warp group: 64 rows of the result, or of a split's partial result."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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
def store_results(acc, row_sum, rows, v_width, out, PACK: gl.constexpr, STORES: gl.constexpr):
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
def store_partial(acc, row_max, row_sum, row, rows, partial, STORES: gl.constexpr):
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
