"""Device functions that the delta rule's kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-6)


@triton.jit
def norm_factor(x, AXIS: tl.constexpr, L2NORM: tl.constexpr):
    """1 over the length of the vectors along ``AXIS`` of float32 ``x``; 1 without ``L2NORM``. Shape: a sum's."""
    squares = tl.sum(x * x, AXIS)
    return tl.rsqrt(squares + EPS) if L2NORM else squares * 0.0 + 1.0


@triton.jit
def _quarters(matrix, BATCH: tl.constexpr, N: tl.constexpr):
    """The top left, bottom left and bottom right ``[BATCH, N, N]`` of matrices ``[BATCH, 2 N, 2 N]``."""
    left, right = tl.split(tl.permute(tl.reshape(matrix, [BATCH, 2, N, 2, N]), (0, 2, 4, 1, 3)))
    top, bottom = tl.split(left)
    _, last = tl.split(right)
    return top, bottom, last


@triton.jit
def _joined(top, bottom, last, BATCH: tl.constexpr, N: tl.constexpr):
    """What :func:`_quarters` takes apart, with zeros at the top right."""
    quarters = tl.join(tl.join(top, bottom), tl.join(top * 0.0, last))
    return tl.reshape(tl.permute(quarters, (0, 3, 1, 4, 2)), [BATCH, 2 * N, 2 * N])


@triton.jit
def _stacked(first, second, BATCH: tl.constexpr, N: tl.constexpr):
    """Matrices ``[2 BATCH, N, N]``, alternately of each argument."""
    return tl.reshape(tl.permute(tl.join(first, second), (0, 3, 1, 2)), [2 * BATCH, N, N])


@triton.jit
def _unstacked(matrices, BATCH: tl.constexpr, N: tl.constexpr):
    """The two arguments of :func:`_stacked`."""
    return tl.split(tl.permute(tl.reshape(matrices, [BATCH, 2, N, N]), (0, 2, 3, 1)))


@triton.jit
def _below(first, bottom, second):
    """Bottom left of the inverse of ``[[A, 0], [bottom, B]]``, given the inverses of A and B."""
    return -tl.dot(tl.dot(second, bottom, input_precision="ieee"), first, input_precision="ieee")


@triton.jit
def unit_lower_inverse(lower):
    """``(I + lower)^-1`` ``[64, 64]``, float32. ``lower`` is 0 on the diagonal and above.

    The diagonal blocks of 16 are inverted by forward substitution, all four at once. Two inverses and what is below
    the first give that of twice the size. No power of ``lower`` occurs: if keys are alike, powers would cancel each
    other. The products have 82,000 terms in all, so they stay in float32 without tensor cores.
    """
    row = tl.arange(0, 16)
    top, bottom, last = _quarters(tl.reshape(lower, [1, 64, 64]), 1, 32)
    top_16, bottom_16, last_16 = _quarters(_stacked(top, last, 1, 32), 2, 16)
    columns = tl.permute(_stacked(top_16, last_16, 2, 16), (0, 2, 1))
    inverse = tl.broadcast_to(tl.where(row[:, None] == row[None, :], 1.0, 0.0)[None, :, :], [4, 16, 16])
    for i in range(1, 16):
        factors = tl.sum(tl.where((row == i)[None, None, :], columns, 0.0), 2)  # [4, 16], row i of each block
        known = tl.sum(factors[:, :, None] * inverse, 1)
        inverse = tl.where((row == i)[None, :, None], inverse - known[:, None, :], inverse)
    first, second = _unstacked(inverse, 2, 16)
    halves = _joined(first, _below(first, bottom_16, second), second, 2, 16)
    first, second = _unstacked(halves, 1, 32)
    return tl.reshape(_joined(first, _below(first, bottom, second), second, 1, 32), [64, 64])
