"""Linear layers with packed weights in plain Triton, for every arch: one kernel for few rows of x, one for many.

Few rows (M up to 16) are memory-bound: the packed weight is read once. A program has a block of the weight's rows. Its
warps share the columns, and so do ``num_splits`` programs. Codes enter the product as they are, exact in the dtype of
x, and the sums of a group are scaled in float32. A zero point costs no work for each weight::

    sum((q - z) * s * x) = s * (sum((q - c) * x) - (z - c) * sum(x)),    c = 2 ** (bits - 1)

Nor does an offset::

    sum((q * s + o) * x) = s * sum((q - c) * x) + (o + c * s) * sum(x)

Splits store float32 sums, which a second launch adds in a fixed order. So results do not depend on timing.

Many rows are compute-bound. A program has a tile of the result, and dequantizes each block of the weight to the dtype
of x before it multiplies.

Float32 is for tests: its products run outside the tensor cores.

Shapes: ``x [M, K]``, ``y [M, N]``, packed weights as in :mod:`flashpte.kernels.linear.format`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from flashpte.kernels import tuning
from flashpte.kernels.facts import register
from flashpte.kernels.launch import cdiv, static_int
from flashpte.kernels.linear.call import Destination, LinearCall
from flashpte.kernels.linear.contract import check_linear
from flashpte.kernels.linear.device import centered_codes, offsets_of_rows
from flashpte.kernels.linear.splits import allocate_splits, launch_sum_splits
from flashpte.kernels.linear.tuning import (
    MAX_FEW_ROWS,
    FewRowsConfig,
    ManyRowsConfig,
    choose_few_rows,
    choose_many_rows,
)
from flashpte.kernels.primitives import INTERPRETED


@triton.jit
def _add_group(acc, weight, x_of_tile, GROUP: tl.constexpr, FORMAT: tl.constexpr):
    """``acc [T, N, M] +=`` the product of group ``GROUP`` of T tiles of columns with x, times its scales.

    Args:
        weight: ``(w_ptrs [T, N, 32], s_ptrs [T, N], z_ptrs [T, N])``, the last one of zero points or offsets.
        x_of_tile: ``(x_rows [M] pointers, row_ok [M], first [T], K)``, where ``first`` are the tiles' first columns.
        FORMAT: ``(BITS, GROUPS, ZEROS, OFFSETS)``.
    """
    BITS: tl.constexpr = FORMAT[0]
    GROUPS: tl.constexpr = FORMAT[1]
    ZEROS: tl.constexpr = FORMAT[2]
    OFFSETS: tl.constexpr = FORMAT[3]
    CENTER: tl.constexpr = 2 ** (BITS - 1)
    w_ptrs, s_ptrs, z_ptrs = weight
    x_rows, row_ok, first, K = x_of_tile
    dtype: tl.constexpr = x_rows.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32
    product = tl.zeros(acc.shape, tl.float32)
    x_sum = tl.zeros([acc.shape[0], acc.shape[2]], tl.float32)
    scale = tl.load(s_ptrs + GROUP).to(tl.float32)
    if ZEROS:
        zero = tl.load(z_ptrs + GROUP).to(tl.float32) - CENTER
    if OFFSETS:
        offset = tl.load(z_ptrs + GROUP).to(tl.float32)
    for plane in tl.static_range(GROUP * 4 // GROUPS, (GROUP + 1) * 4 // GROUPS):
        column = first[:, None] + plane * 32 + tl.arange(0, 32)[None, :]
        x_ok = row_ok[None, :, None] & (column < K)[:, None, :]
        x = tl.load(x_rows[None, :, None] + column[:, None, :], mask=x_ok, other=0.0)
        words = tl.load(w_ptrs + (plane * 32 if BITS == 8 else 0))
        codes = centered_codes(words, plane, BITS, dtype)
        if ZEROS or OFFSETS:
            if not EXACT:
                x_sum += tl.sum(x.to(tl.float32), 2)
            elif ZEROS:
                codes = codes - zero[:, :, None]
            else:
                codes = (codes + CENTER) * scale[:, :, None] + offset[:, :, None]
        product = tl.dot(codes, tl.permute(x, (0, 2, 1)), product, input_precision="ieee")
    if OFFSETS and EXACT:
        acc += product
    else:
        if ZEROS and not EXACT:
            product -= zero[:, :, None] * x_sum[:, None, :]
        acc += scale[:, :, None] * product
        if OFFSETS:
            acc += (offset + CENTER * scale)[:, :, None] * x_sum[:, None, :]
    return acc


@triton.jit
def _linear_few_rows_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, bias_ptr, y_ptr,
    partial_ptr,  # float32 [num_splits, M, N]
    M, N, K, padded_n, column_tiles, scale_tiles, tiles_per_split, stride_xm,
    BITS: tl.constexpr, GROUPS: tl.constexpr, SCALE_STEP: tl.constexpr, ZEROS: tl.constexpr, OFFSETS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, SINGLE_SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """All rows of x times ``BLOCK_N`` rows of the weight, over one split of the columns, ``TILES`` tiles at once."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    begin = split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, column_tiles)
    # Rows past the end repeat the last one, so that every pointer made from them is in range.
    row = tl.minimum(n, padded_n - 1)
    words, scales = offsets_of_rows(row, column_tiles, scale_tiles, BITS, GROUPS)
    TILE_WORDS: tl.constexpr = 512 if BITS == 4 else 2048
    w_rows = (w_ptr + words)[None, :, None] + tl.arange(0, 32)[None, None, :]
    FORMAT: tl.constexpr = (BITS, GROUPS, ZEROS, OFFSETS)
    tile = tl.arange(0, TILES)
    x_rows = x_ptr + m.to(tl.int64) * stride_xm
    acc = tl.zeros([TILES, BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(begin, end, TILES, num_stages=STAGES):
        # Tiles past the end repeat the last one. They multiply zeros, because x ends there.
        at = tl.minimum(start + tile, column_tiles - 1)
        w_ptrs = w_rows + (at * TILE_WORDS)[:, None, None]
        s_at = scales[None, :] + (at * SCALE_STEP)[:, None]
        x_of_tile = (x_rows, m < M, (start + tile) * 128, K)
        for group in tl.static_range(GROUPS):
            acc = _add_group(acc, (w_ptrs, s_ptr + s_at, z_ptr + s_at), x_of_tile, group, FORMAT)
    y = tl.sum(acc, 0)
    ok = (n < N)[:, None] & (m < M)[None, :]
    at_y = m.to(tl.int64)[None, :] * N + n[:, None]
    if SINGLE_SPLIT:
        if BIAS:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(y_ptr + at_y, y.to(y_ptr.dtype.element_ty), mask=ok)
    else:
        tl.store(partial_ptr + split.to(tl.int64) * M * N + at_y, y, mask=ok)


register(_linear_few_rows_kernel, "matmul")


@triton.jit
def _linear_many_rows_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, bias_ptr, y_ptr,
    M, N, K, padded_n, column_tiles, scale_tiles, stride_xm,
    BITS: tl.constexpr, GROUPS: tl.constexpr, SCALE_STEP: tl.constexpr, ZEROS: tl.constexpr, OFFSETS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``BLOCK_M`` rows of x times ``BLOCK_N`` rows of the weight, 32 columns at a time."""
    # Programs with the same rows of the weight are neighbors, so that they share them in L2.
    m_tiles = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // m_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end repeat the last one, so that every pointer made from them is in range.
    words, scales = offsets_of_rows(tl.minimum(n, padded_n - 1), column_tiles, scale_tiles, BITS, GROUPS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    TILE_WORDS: tl.constexpr = 512 if BITS == 4 else 2048
    CENTER: tl.constexpr = 2 ** (BITS - 1)
    lane = tl.arange(0, 32)
    w_rows = (w_ptr + words)[:, None] + lane[None, :]
    x_rows = x_ptr + m.to(tl.int64) * stride_xm
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for tile in tl.range(0, column_tiles, num_stages=STAGES):
        s_at = scales + tile * SCALE_STEP
        for plane in tl.static_range(4):
            column = tile * 128 + plane * 32 + lane
            x_ok = (m < M)[:, None] & (column < K)[None, :]
            x = tl.load(x_rows[:, None] + column[None, :], mask=x_ok, other=0.0)
            packed = tl.load(w_rows + tile * TILE_WORDS + (plane * 32 if BITS == 8 else 0))
            weight = centered_codes(packed, plane, BITS, dtype).to(tl.float32)
            group = plane * GROUPS // 4
            if ZEROS:
                weight -= tl.load(z_ptr + s_at + group).to(tl.float32)[:, None] - CENTER
            if OFFSETS:
                weight += CENTER
            weight *= tl.load(s_ptr + s_at + group).to(tl.float32)[:, None]
            if OFFSETS:
                weight += tl.load(z_ptr + s_at + group).to(tl.float32)[:, None]
            acc = tl.dot(weight.to(dtype), tl.trans(x), acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


register(_linear_many_rows_kernel, "matmul")


def _sizes(call: LinearCall) -> tuple[int, ...]:
    """What both kernels take after their tensors: M, N, K, N with padding, tiles of columns, tiles that have scales."""
    fmt = call.fmt
    padded_n = call.weight.shape[0] * call.weight.shape[2]
    return call.rows, fmt.out_features, fmt.in_features, padded_n, fmt.column_tiles, fmt.scales_shape[1]


def launch_few_rows(
    call: LinearCall, config: FewRowsConfig | None = None, into: Destination | None = None
) -> torch.Tensor:
    """Launches the few-rows kernel, and the kernel that adds splits if there are several.

    Args:
        call: M must be at most :data:`MAX_FEW_ROWS`. A symbolic M is assumed to be.
        config: tile choice; by default the current arch's choice.
        into: where to write the result; allocated here if ``None``.

    Returns:
        ``[..., N]`` in the dtype of x.

    Raises:
        ValueError: the call does not fit, or has more rows.
    """
    check_linear(call)
    rows = static_int(call.rows)
    if rows is not None and rows > MAX_FEW_ROWS:
        raise ValueError(f"the kernel takes at most {MAX_FEW_ROWS} rows of x, got {rows}")
    if config is None:
        config = choose_few_rows(call.shape(), tuning.current_arch(call.x.device))
    out, enabled = (call.empty_output(), 1) if into is None else into
    x, fmt, splits = call.rows_of_x, call.fmt, config.num_splits
    steps = cdiv(cdiv(fmt.column_tiles, config.tiles_at_once), splits)
    partial = allocate_splits(call, splits, out)
    few_rows = _linear_few_rows_kernel if INTERPRETED else wrap_triton(_linear_few_rows_kernel)
    few_rows[(cdiv(fmt.out_features, config.block_n) * enabled, splits)](
        x,
        *call.tensors,
        out,
        partial,
        *_sizes(call),
        steps * config.tiles_at_once,
        x.stride(0),
        **call.constants,
        BLOCK_M=MAX_FEW_ROWS,
        BLOCK_N=config.block_n,
        TILES=config.tiles_at_once,
        SINGLE_SPLIT=splits == 1,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        launch_sum_splits(call, partial, splits, Destination(out, enabled))
    return out


def launch_many_rows(
    call: LinearCall, config: ManyRowsConfig | None = None, into: Destination | None = None
) -> torch.Tensor:
    """Launches the many-rows kernel.

    Args:
        call: any M.
        config, into: as for :func:`launch_few_rows`.

    Returns:
        ``[..., N]`` in the dtype of x.

    Raises:
        ValueError: the call does not fit.
    """
    check_linear(call)
    if config is None:
        config = choose_many_rows(call.shape(), tuning.current_arch(call.x.device))
    out, enabled = (call.empty_output(), 1) if into is None else into
    x = call.rows_of_x
    many_rows = _linear_many_rows_kernel if INTERPRETED else wrap_triton(_linear_many_rows_kernel)
    programs = cdiv(call.rows, config.block_m) * cdiv(call.fmt.out_features, config.block_n)
    many_rows[(programs * enabled,)](
        x,
        *call.tensors,
        out,
        *_sizes(call),
        x.stride(0),
        **call.constants,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
