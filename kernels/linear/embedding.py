"""Rows of a packed weight by their index: an embedding table that shares its bytes with a tied output layer.

A program has one index and ``BLOCK`` columns of its row. The kernel is memory-bound: it reads the packed row once.

Shapes: ``indices [...]``, packed table ``[N, K]`` (:mod:`flashpte.kernels.linear.format`), result ``[..., K]``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch.library import CustomOpDef, triton_op, wrap_triton

from flashpte.kernels.contract import SUPPORTED_DTYPES
from flashpte.kernels.facts import register
from flashpte.kernels.launch import cdiv, static_int
from flashpte.kernels.linear.call import LinearCall
from flashpte.kernels.linear.contract import format_of, why_not
from flashpte.kernels.linear.device import centered_codes, offsets_of_rows
from flashpte.kernels.linear.format import Groupwise, unpack
from flashpte.kernels.linear.reference import dequantize
from flashpte.kernels.primitives import INTERPRETED

TILES = 4
"""Tiles of 128 columns of one program. Not measured."""


@triton.jit
def _quantized_embedding_kernel(
    indices_ptr, w_ptr, s_ptr, z_ptr, out_ptr, N, K, column_tiles, scale_tiles,
    BITS: tl.constexpr, GROUPS: tl.constexpr, SCALE_STEP: tl.constexpr, ZEROS: tl.constexpr, OFFSETS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``BLOCK`` tiles of columns of the row that one index names."""
    at = tl.program_id(0).to(tl.int64)
    # An index out of range reads a row that exists.
    row = tl.minimum(tl.maximum(tl.load(indices_ptr + at), 0), N - 1)
    words, scales = offsets_of_rows(row, column_tiles, scale_tiles, BITS, GROUPS)
    TILE_WORDS: tl.constexpr = 512 if BITS == 4 else 2048
    CENTER: tl.constexpr = 2 ** (BITS - 1)
    tile = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Tiles past the end repeat the last one, and are not stored.
    safe = tl.minimum(tile, column_tiles - 1)
    lane = tl.arange(0, 32)
    for plane in tl.static_range(4):
        w_ptrs = w_ptr + words + (safe * TILE_WORDS)[:, None] + lane[None, :] + (plane * 32 if BITS == 8 else 0)
        values = centered_codes(tl.load(w_ptrs), plane, BITS, tl.float32)
        s_at = scales + safe * SCALE_STEP + plane * GROUPS // 4
        if ZEROS:
            values -= tl.load(z_ptr + s_at).to(tl.float32)[:, None] - CENTER
        if OFFSETS:
            values += CENTER
        values *= tl.load(s_ptr + s_at).to(tl.float32)[:, None]
        if OFFSETS:
            values += tl.load(z_ptr + s_at).to(tl.float32)[:, None]
        column = (tile * 128 + plane * 32)[:, None] + lane[None, :]
        tl.store(out_ptr + at * K + column, values.to(out_ptr.dtype.element_ty), mask=column < K)


register(_quantized_embedding_kernel, "rest")


def _as_call(
    indices: torch.Tensor,
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, offsets: torch.Tensor | None,
    dtype: torch.dtype,
    *numbers: int,
) -> LinearCall:  # fmt: skip
    """The table in the form of a linear layer without rows of x.

    Raises:
        ValueError: an argument does not fit.
    """
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices must have dtype torch.int64 or torch.int32, got {indices.dtype}")
    if dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"dtype {dtype}: the kernels give one of bfloat16, float16, float32")
    fmt = format_of(scales, zeros, offsets, *numbers)
    x = indices.new_empty((0, fmt.in_features), dtype=dtype)
    call = LinearCall(x, weight, scales, zeros, None, fmt, offsets)
    if (reason := why_not(call)) is not None:
        raise ValueError(reason.replace(", x on", ", indices on"))
    return call


def launch_embedding(call: LinearCall, indices: torch.Tensor) -> torch.Tensor:
    """Launches the kernel for a table given as a call without rows.

    Returns:
        ``[..., K]`` in the dtype of the call's x.
    """
    fmt = call.fmt
    out = call.x.new_empty((*indices.shape, fmt.in_features))
    if static_int(indices.numel()) == 0:
        return out
    kernel = _quantized_embedding_kernel if INTERPRETED else wrap_triton(_quantized_embedding_kernel)
    weight, scales, moved, _ = call.tensors
    constants = {name: value for name, value in call.constants.items() if name != "BIAS"}
    sizes = (fmt.out_features, fmt.in_features, fmt.column_tiles, fmt.scales_shape[1])
    kernel[(indices.numel(), cdiv(fmt.column_tiles, TILES))](
        indices.contiguous(), weight, scales, moved, out, *sizes, **constants, BLOCK=TILES, num_warps=4
    )
    return out


def _quantized_embedding(
    indices: torch.Tensor,
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, offsets: torch.Tensor | None,
    dtype: torch.dtype,
    bits: int, group: int, out_features: int, in_features: int,
) -> torch.Tensor:  # fmt: skip
    """Dequantized rows ``indices`` of a packed table.

    Programs are serialized with these arguments, so their names, order and types must not change.

    Args:
        indices: int64 or int32 ``[...]``. On CUDA, an index out of range gives the first or the last row.
        weight, scales, zeros, offsets, bits, group: as for ``flashpte::quantized_linear``.
        dtype: dtype of the result: bfloat16, float16 or float32.
        out_features, in_features: rows N and columns K of the table.

    Returns:
        ``[..., K]``, contiguous.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    call = _as_call(indices, weight, scales, zeros, offsets, dtype, bits, group, out_features, in_features)
    return launch_embedding(call, indices)


quantized_embedding = cast(
    CustomOpDef, triton_op("flashpte::quantized_embedding", _quantized_embedding, mutates_args=())
)
"""Rows of a packed table; see :func:`_quantized_embedding` for its arguments."""


@quantized_embedding.register_fake
def _fake(indices: torch.Tensor, *arguments: Any) -> torch.Tensor:
    call = _as_call(indices, *arguments)
    return call.x.new_empty((*indices.shape, call.fmt.in_features))


@quantized_embedding.register_kernel("cpu")
def _cpu(indices: torch.Tensor, *arguments: Any) -> torch.Tensor:
    call = _as_call(indices, *arguments)
    rows = indices.flatten().long()
    picked = Groupwise(*(None if tensor is None else tensor[rows] for tensor in unpack(call.packed, call.fmt)))  # type: ignore[arg-type]
    values = dequantize(*picked, call.fmt.bits, call.fmt.group)
    return values.to(call.x.dtype).view(*indices.shape, call.fmt.in_features)
