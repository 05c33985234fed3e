"""The operator ``flashpte::quantized_linear``: registration, fake and CPU implementations.

Its CUDA implementation is the launcher, which AOTInductor traces into. Its CPU implementation is the reference. All
implementations raise the same ``ValueError`` (:mod:`flashpte.kernels.linear.contract`).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.library import CustomOpDef, triton_op

from flashpte.kernels.linear.call import LinearCall
from flashpte.kernels.linear.contract import check_linear, format_of
from flashpte.kernels.linear.dispatch import launch_linear
from flashpte.kernels.linear.format import unpack
from flashpte.kernels.linear.reference import dequantize, linear_reference


def _quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int, group: int, out_features: int, in_features: int,
) -> torch.Tensor:  # fmt: skip
    """``x @ dequantized(weight)^T + bias``.

    Programs are serialized with these arguments, so their names, order and types must not change.

    Args:
        x: ``[..., K]``, any strides; bfloat16, float16 or float32. Leading sizes may be dynamic.
        weight: packed codes: int16 ``[N / 16, K / 128, 16, 32]`` of 4 bits, int8 ``[N / 16, K / 128, 16, 128]`` of 8.
        scales: packed scales ``[N / 16, K / 128, 8, 2, 128 / group]``; bfloat16, float16 or float32.
        zeros: packed zero points, like ``scales`` or int16; ``None`` for ``2 ** (bits - 1)``, or with ``offsets``.
        offsets: packed offsets, like ``scales``, for a weight ``q * s + o``; ``None`` for ``(q - z) * s``.
        bias: ``[N]`` in the dtype of ``x``, or ``None``.
        bits: 4 or 8.
        group: columns that share a scale: 32, 64, 128 or, with 8 bits, K.
        out_features, in_features: N and K, without padding.

    Returns:
        ``[..., N]`` in the dtype of ``x``, contiguous.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    return launch_linear(_call(x, weight, scales, zeros, offsets, bias, bits, group, out_features, in_features))


def _call(
    x: torch.Tensor,
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
    *numbers: int,
) -> LinearCall:  # fmt: skip
    """The operator's arguments in the form that launchers take."""
    return LinearCall(x, weight, scales, zeros, bias, format_of(scales, zeros, offsets, *numbers), offsets)


quantized_linear = cast(CustomOpDef, triton_op("flashpte::quantized_linear", _quantized_linear, mutates_args=()))
"""A linear layer with a packed weight; see :func:`_quantized_linear` for its arguments."""


@quantized_linear.register_fake
def _fake(*arguments: Any) -> torch.Tensor:
    call = _call(*arguments)
    check_linear(call)
    return call.empty_output()


@quantized_linear.register_kernel("cpu")
def _cpu(*arguments: Any) -> torch.Tensor:
    call = _call(*arguments)
    check_linear(call)
    natural = unpack(call.packed, call.fmt)
    return linear_reference(call.x, dequantize(*natural, call.fmt.bits, call.fmt.group), call.bias)
