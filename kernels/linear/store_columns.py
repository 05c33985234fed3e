"""Device function in Gluon that stores the sums of a warp group as columns of the result.

Shape legend: ``R`` rows of the weight of one warp group, which are columns of the result; ``BM`` rows of x.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def store_columns(acc, at, out, sizes, slot, FORMAT: gl.constexpr):
    """Stores ``acc [R, BM]`` as R columns of the result, 32 rows at a time; neighboring columns to one thread.

    Args:
        at: ``(n_first, m_first, n, m)``: the first column and row, in the result and within the block.
        out: ``(bias_ptr, y_ptr, partial_ptr)``.
        sizes: ``(M, N)``.
        slot: where in ``partial`` of :mod:`flashpte.kernels.linear.shares`; negative for the result.
        FORMAT: ``(GROUPS, ZEROS, WHOLE, BIAS, BLOCK_M, BLOCK_N, OFFSETS, S_DTYPE, Z_DTYPE, PER_CHANNEL)``.
    """
    R: gl.constexpr = acc.shape[0]
    BM: gl.constexpr = acc.shape[1]
    n_first, m_first, n_block, m_block = at
    if BM > 32:
        low, high = gl.split(gl.permute(gl.reshape(acc, [R, 2, BM // 2]), [0, 2, 1]))
        store_columns(low, at, out, sizes, slot, FORMAT)
        HALF: gl.constexpr = BM // 2
        store_columns(high, (n_first, m_first + HALF, n_block, m_block + HALF), out, sizes, slot, FORMAT)
    else:
        bias_ptr, y_ptr, partial_ptr = out
        M, N = sizes
        OUT: gl.constexpr = gl.BlockedLayout([8, 1], [R // 8, 256 // R], [1, 4], [0, 1])
        row = gl.arange(0, R, gl.SliceLayout(1, OUT))
        m = gl.arange(0, BM, gl.SliceLayout(0, OUT))
        result = slot < 0
        if FORMAT[2] or result:
            if FORMAT[3]:
                n = n_first + gl.arange(0, R, gl.SliceLayout(1, acc.type.layout))
                acc += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
            value = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), OUT)
            inside = (n_first + row < N)[:, None] & (m_first + m < M)[None, :]
            gl.store(y_ptr + (m_first + m).to(gl.int64)[None, :] * N + (n_first + row)[:, None], value, mask=inside)
        else:
            # Each thread stores what it has: the scratch memory of a conversion would be twice as large.
            ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
            COLUMN: gl.constexpr = gl.SliceLayout(0, acc.type.layout)
            first = slot.to(gl.int64) * (FORMAT[4] * FORMAT[5])
            n = n_block + gl.arange(0, R, ROW)
            at_m = m_block + gl.arange(0, BM, COLUMN)
            gl.store(partial_ptr + first + at_m[None, :] * FORMAT[5] + n[:, None], acc)
