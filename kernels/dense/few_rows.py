"""Products of a 16-bit weight with few rows of x, in plain Triton for every arch.

They are memory-bound: the weight is read once, and of a small one the launch and the first read take longer than the
bytes. So a program has few rows of the weight, and all of their columns. It reads a step ahead. Where a kernel may
start early, it reads its first block of the weight before it waits for the kernels that make x.

With one row of x, and with up to 4 and a small weight, lanes multiply and add in float32. The rest goes to tensor
cores: warps take blocks of columns, and their sums are added at the end. No sum depends on timing.

Shapes: ``x [M, K]``, ``weight [N, K]``, ``y [M, N]``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from flashpte.kernels.dense.tuning import MAX_ROWS, DenseConfig, choose_dense
from flashpte.kernels.facts import register
from flashpte.kernels.launch import cdiv, dependent_launch, may_read_weights_early, with_unit_stride
from flashpte.kernels.primitives import INTERPRETED, let_dependents_start, wait_for_earlier_kernels

ACTIVATIONS = ("", "silu", "gelu_tanh")
"""None, or what the first half of the weight's rows goes through before the second half's result multiplies it."""


@triton.jit
def _with(values, value):
    """A tuple with one more value."""
    return values + (value,)  # noqa: RUF005  (Triton has no star in tuples)


@triton.jit
def _load_parts(w_ptrs, part_offset, ok, PARTS: tl.constexpr):
    """The block of each part of the weight; 0 outside."""
    parts = (tl.load(w_ptrs, mask=ok, other=0.0),)
    if PARTS == 2:
        parts = _with(parts, tl.load(w_ptrs + part_offset, mask=ok, other=0.0))
    return parts


@triton.jit
def _finish(sums, bias_ptrs, ok, bias_offset, BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    """The result of a program from the sums of each part: ``act(gate) * up`` for two parts. All are float32."""
    y = sums[0]
    if BIAS:
        y += tl.load(bias_ptrs, mask=ok, other=0.0).to(tl.float32)
    if ACTIVATION > 0:
        inner = y
        if ACTIVATION == 2:
            inner = 1.5957691216057308 * (y + 0.044715 * y * y * y)  # 2 sqrt(2 / pi); tanh(z) is 2 sigmoid(2 z) - 1
        up = sums[1]
        if BIAS:
            up += tl.load(bias_ptrs + bias_offset, mask=ok, other=0.0).to(tl.float32)
        y = y * tl.sigmoid(inner) * up
    return y


@triton.jit
def _add_rows(sums, w, x_ptrs, ok, stride_xm):
    """``sums[m][part] [N, K] += w[part] [N, K] * x[m] [K]`` for each row m; sums are one tuple, row by row."""
    PARTS: tl.constexpr = len(w)
    added = ()
    for m in tl.static_range(len(sums) // PARTS):
        x = tl.load(x_ptrs + m * stride_xm, mask=ok, other=0.0).to(tl.float32)
        for part in tl.static_range(PARTS):
            added = _with(added, sums[m * PARTS + part] + w[part].to(tl.float32) * x[None, :])
    return added


@triton.jit
def _dense_lanes_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, N, stride_xm,
    M: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr, EARLY_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """All ``M`` rows of x times ``BLOCK_N`` rows of each part of the weight."""
    PARTS: tl.constexpr = 2 if ACTIVATION > 0 else 1
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one, so that every pointer made from them is in range.
    w_ptrs = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    part = tl.full([], K, tl.int64) * N
    if not EARLY_WEIGHTS:
        wait_for_earlier_kernels(DEPENDENT)
    w = _load_parts(w_ptrs, part, (k < K)[None, :], PARTS)
    if EARLY_WEIGHTS:
        wait_for_earlier_kernels(DEPENDENT)
    let_dependents_start(DEPENDENT)
    sums = ()
    for _ in tl.static_range(M * PARTS):
        sums = _with(sums, tl.zeros([BLOCK_N, BLOCK_K], tl.float32))
    for start in range(0, K, BLOCK_K):
        ahead = start + BLOCK_K
        following = _load_parts(w_ptrs + ahead, part, (ahead + k < K)[None, :], PARTS)
        sums = _add_rows(sums, w, x_ptr + start + k, start + k < K, stride_xm)
        w = following
    for m in tl.static_range(M):
        parts = (tl.sum(sums[m * PARTS], 1),)
        if PARTS == 2:
            parts = _with(parts, tl.sum(sums[m * PARTS + 1], 1))
        y = _finish(parts, bias_ptr + n, n < N, N, BIAS, ACTIVATION)
        tl.store(y_ptr + tl.full([], m, tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


register(_dense_lanes_kernel, "matmul", early_start="DEPENDENT")


@triton.jit
def _dense_tensor_cores_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, M, N, stride_xm,
    K: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
    DEPENDENT: tl.constexpr, EARLY_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """All rows of x times ``BLOCK_N`` rows of each part of the weight, ``TILES`` blocks of columns at a time."""
    PARTS: tl.constexpr = 2 if ACTIVATION > 0 else 1
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    column = tl.arange(0, TILES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    w_ptrs = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :, None] * K + column[:, None, :]
    part = tl.full([], K, tl.int64) * N
    x_ptrs = x_ptr + m[None, :, None] * stride_xm + column[:, None, :]
    if not EARLY_WEIGHTS:
        wait_for_earlier_kernels(DEPENDENT)
    w = _load_parts(w_ptrs, part, (column < K)[:, None, :], PARTS)
    if EARLY_WEIGHTS:
        wait_for_earlier_kernels(DEPENDENT)
    let_dependents_start(DEPENDENT)
    sums = tl.zeros([TILES, BLOCK_N, BLOCK_M], tl.float32)
    up_sums = sums
    for start in range(0, K, TILES * BLOCK_K):
        ahead = start + TILES * BLOCK_K
        following = _load_parts(w_ptrs + ahead, part, (ahead + column < K)[:, None, :], PARTS)
        x_ok = (m < M)[None, :, None] & (start + column < K)[:, None, :]
        x = tl.permute(tl.load(x_ptrs + start, mask=x_ok, other=0.0), (0, 2, 1))
        sums = tl.dot(w[0], x, sums)
        if PARTS == 2:
            up_sums = tl.dot(w[1], x, up_sums)
        w = following
    parts = (tl.sum(sums, 0),)
    if PARTS == 2:
        parts = _with(parts, tl.sum(up_sums, 0))
    y = _finish(parts, bias_ptr + n[:, None], n[:, None] < N, N, BIAS, ACTIVATION)
    ok = (n < N)[:, None] & (m < M)[None, :]
    tl.store(y_ptr + m.to(tl.int64)[None, :] * N + n[:, None], y.to(y_ptr.dtype.element_ty), mask=ok)


register(_dense_tensor_cores_kernel, "matmul", early_start="DEPENDENT")


def launch_few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str = "",
    config: DenseConfig | None = None,
) -> torch.Tensor:
    """Launches the kernel that fits the number of rows.

    Args:
        x: ``[..., K]`` with at most :data:`MAX_ROWS` rows.
        weight: ``[N, K]``, contiguous; ``[2 N, K]`` with an activation.
        bias: one number for each row of the weight, or ``None``.
        activation: one of :data:`ACTIVATIONS`.
        config: tile choice; by default that for the shape.

    Returns:
        ``[..., N]`` in the dtype of x, contiguous.
    """
    weight_rows, in_features = weight.shape
    parts = 2 if activation else 1
    out_features = weight_rows // parts
    out = x.new_empty((*x.shape[:-1], out_features))
    rows_of_x = with_unit_stride(x.reshape(-1, in_features))
    rows = rows_of_x.shape[0]
    if rows == 0 or out_features == 0:
        return out
    if config is None:
        config = choose_dense(rows, weight_rows, in_features, parts)
    dependent = {"DEPENDENT": False} if INTERPRETED else dependent_launch(x)
    options = {
        "K": in_features,
        "BIAS": bias is not None,
        "ACTIVATION": ACTIVATIONS.index(activation),
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "EARLY_WEIGHTS": may_read_weights_early(dependent),
        "num_warps": config.num_warps,
        **dependent,
    }
    tensors = (rows_of_x, weight, weight if bias is None else bias, out)
    grid = (cdiv(out_features, config.block_n),)
    if not config.tiles:
        lanes = _dense_lanes_kernel if INTERPRETED else wrap_triton(_dense_lanes_kernel)
        lanes[grid](*tensors, out_features, rows_of_x.stride(0), M=rows, **options)
    else:
        cores = _dense_tensor_cores_kernel if INTERPRETED else wrap_triton(_dense_tensor_cores_kernel)
        sizes = (rows, out_features, rows_of_x.stride(0))
        cores[grid](*tensors, *sizes, BLOCK_M=MAX_ROWS, TILES=config.tiles, **options)
    return out
