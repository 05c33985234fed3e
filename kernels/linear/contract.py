"""The contract for linear layers with packed weights: one sentence that says why the kernels refuse, or ``None``.

Every implementation of the operator (CPU, fake, CUDA) raises ``ValueError`` with this sentence before it launches
anything, because kernels trust the sizes that they get. Sizes of ``x`` may be symbolic: they are refused only if they
are known to differ, and get no guard.
"""

from __future__ import annotations

import torch

from flashpte.kernels.contract import SUPPORTED_DTYPES, may_be_equal, printable
from flashpte.kernels.linear.call import LinearCall
from flashpte.kernels.linear.format import SCALE_DTYPES, PackedFormat, why_not_format


def _why_not_x(x: torch.Tensor, in_features: int) -> str | None:
    if x.dtype not in SUPPORTED_DTYPES:
        return f"x has dtype {x.dtype}: the kernels take one of bfloat16, float16, float32"
    if x.dim() == 0:
        return "x has no dimensions; its last one must be in_features"
    if not may_be_equal(x.shape[-1], in_features):
        return f"x has {printable(x.shape[-1])} columns, the weight takes {in_features}"
    return None


def _why_not_packed(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    if tensor.dtype != dtype:
        return f"{name} must have dtype {dtype}, got {tensor.dtype}"
    if tuple(tensor.shape) != shape:
        return f"{name} must have the shape {list(shape)}, got {list(tensor.shape)}"
    if not tensor.is_contiguous():
        return f"{name} must be contiguous"
    return None


def why_not(call: LinearCall) -> str | None:
    """Why an operator refuses a call, or ``None``."""
    x, fmt = call.x, call.fmt
    if (reason := _why_not_x(x, fmt.in_features)) is not None:
        return reason
    wanted = [
        ("weight", call.weight, fmt.weight_shape, fmt.weight_dtype),
        ("scales", call.scales, fmt.scales_shape, fmt.scale_dtype),
    ]
    for name, tensor, given in (
        ("zeros", call.zeros, fmt.has_zeros),
        ("offsets", call.offsets, fmt.has_offsets),
    ):
        if (tensor is not None) != given:
            return f"{name} must be {'given' if given else 'None'} for this format"
        if tensor is not None:
            wanted.append((name, tensor, fmt.scales_shape, fmt.scale_dtype))
    if call.bias is not None:
        wanted.append(("bias", call.bias, (fmt.out_features,), x.dtype))
    for name, tensor, shape, dtype in wanted:
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}"
        if (reason := _why_not_packed(name, tensor, shape, dtype)) is not None:
            return reason
    return None


def check_linear(call: LinearCall) -> None:
    """Raises ``ValueError`` with the sentence that :func:`why_not` returns, if any."""
    if (reason := why_not(call)) is not None:
        raise ValueError(reason)


def format_of(
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    offsets: torch.Tensor | None,
    bits: int,
    group: int,
    out_features: int,
    in_features: int,
) -> PackedFormat:
    """The format that an operator's arguments name.

    Raises:
        ValueError: there is no such format, the scales have another dtype than bfloat16, float16 or float32, or there
            are both zero points and offsets.
    """
    reason = why_not_format(bits, group, out_features, in_features)
    if reason is None and scales.dtype not in SCALE_DTYPES:
        reason = f"scales must have dtype bfloat16, float16 or float32, got {scales.dtype}"
    if reason is None and zeros is not None and offsets is not None:
        reason = "zeros and offsets are both given; one of them must be None"
    if reason is not None:
        raise ValueError(reason)
    has_zeros, has_offsets = zeros is not None, offsets is not None
    return PackedFormat(bits, group, out_features, in_features, has_zeros, scales.dtype, has_offsets)
