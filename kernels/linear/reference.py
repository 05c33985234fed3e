"""The plain definition of a linear layer with quantized weights. Optimized code never uses it.

The operator's CPU implementation is this reference, as it is for attention.
"""

from __future__ import annotations

import torch


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    offsets: torch.Tensor | None,
    bits: int,
    group: int,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weight ``(q - zero) * scale``, or ``q * scale + offset``.

    Args:
        codes: uint8 ``[N, K]``, each below ``2 ** bits``.
        scales: ``[N, ceil(K / group)]``, any float dtype.
        zeros: zero points like ``scales``; ``None`` for ``2 ** (bits - 1)``, or with ``offsets``.
        offsets: offsets like ``scales``, or ``None``.
        bits: bits of a code.
        group: columns that share a scale.
        compute_dtype: dtype of the arithmetic and of the result.

    Returns:
        ``[N, K]`` in ``compute_dtype``.
    """
    columns = codes.shape[1]

    def of_columns(values: torch.Tensor) -> torch.Tensor:
        return values.to(compute_dtype).repeat_interleave(group, 1)[:, :columns]

    if offsets is not None:
        return codes.to(compute_dtype) * of_columns(scales) + of_columns(offsets)
    zero = float(1 << (bits - 1)) if zeros is None else of_columns(zeros)
    return (codes.to(compute_dtype) - zero) * of_columns(scales)


def linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``x @ weight^T + bias``, computed in ``compute_dtype`` and returned in the dtype of ``x``.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``, such as the result of :func:`dequantize`.
        bias: ``[N]`` or ``None``.
        compute_dtype: dtype of the arithmetic. The tests compare with ``torch.float64``.

    Returns:
        ``[..., N]``, contiguous.
    """
    y = x.to(compute_dtype) @ weight.to(compute_dtype).t()
    if bias is not None:
        y = y + bias.to(compute_dtype)
    return y.to(x.dtype)
