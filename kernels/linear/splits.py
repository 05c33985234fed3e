"""Splits of the columns: where they store their sums, and the kernel that adds them.

A split stores float32 sums ``[M, N]``. A second launch adds them, first to last, so that results do not depend on
timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from flashpte.kernels.facts import register
from flashpte.kernels.launch import cdiv, static_int
from flashpte.kernels.linear.call import Destination, LinearCall
from flashpte.kernels.linear.tuning import MAX_FEW_ROWS
from flashpte.kernels.primitives import INTERPRETED

SUM_BLOCK = 256
"""Columns of the result of one program."""


@triton.jit
def _linear_sum_splits_kernel(
    partial_ptr,  # float32 [SPLITS, M, N]
    bias_ptr, y_ptr, M, N,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """``y [M, N]``: the sum over splits, first to last, plus the bias."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = n < N
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial_ptr + (tl.full([], split, tl.int64) * M + m) * N + n, mask=ok, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * N + n, total.to(y_ptr.dtype.element_ty), mask=ok)


register(_linear_sum_splits_kernel, "matmul")


def allocate_splits(call: LinearCall, splits: int, out: torch.Tensor) -> torch.Tensor:
    """Float32 memory for the sums of ``splits`` splits; ``out`` for a single one, which stores the result itself."""
    if splits == 1:
        return out
    # For a dynamic M, as many rows as a kernel for few rows can get.
    rows = static_int(call.rows)
    return out.new_empty((splits * (MAX_FEW_ROWS if rows is None else rows) * out.shape[-1],), dtype=torch.float32)


def launch_sum_splits(call: LinearCall, partial: torch.Tensor, splits: int, into: Destination) -> None:
    """Adds the splits in ``partial``, and the bias, into the result."""
    n, bias = call.fmt.out_features, call.tensors[-1]
    sum_splits = _linear_sum_splits_kernel if INTERPRETED else wrap_triton(_linear_sum_splits_kernel)
    sizes = {"SPLITS": splits, "BLOCK": SUM_BLOCK, "BIAS": call.bias is not None}
    sum_splits[(cdiv(n, SUM_BLOCK), call.rows * into.enabled)](
        partial, bias, into.out, call.rows, n, **sizes, num_warps=4
    )
