"""Weights of 4 or 8 bits: a linear layer's weight becomes packed codes and one scale per group of columns.

Codes are rounded to nearest, symmetric around zero: a group's scale is its largest magnitude over ``2 ** (bits - 1) -
0.5``, so that both ends of the range lose half a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

import flashpte.kernels.linear  # noqa: F401  (registers the operator)
from flashpte.export.common.errors import ExportError
from flashpte.kernels.linear.format import (
    TILE_ROWS,
    PackedFormat,
    PackedWeight,
    pack_codes,
    pack_groups,
    unpack,
)
from flashpte.kernels.linear.reference import dequantize

SCALE_DTYPE = torch.bfloat16
_ROWS = 256 * TILE_ROWS
"""Rows that are quantized at a time, so that only these exist in float32."""


class QuantizedLinear(nn.Module):
    """A linear layer with a packed weight. ``torch.export`` sees the kernel's operator; eager calls dequantize.

    Args:
        fmt: how the weight is packed.
        bias: whether there is a bias.
        dtype: the bias's dtype.
    """

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(self, fmt: PackedFormat, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.fmt, self.in_features, self.out_features = fmt, fmt.in_features, fmt.out_features
        self.register_buffer("packed", torch.empty(fmt.weight_shape, dtype=fmt.weight_dtype))
        self.register_buffer("scales", torch.empty(fmt.scales_shape, dtype=fmt.scale_dtype))
        self.bias = nn.Parameter(torch.empty(fmt.out_features, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` to ``[..., N]``."""
        if torch.compiler.is_exporting():
            fmt = self.fmt
            numbers = (fmt.bits, fmt.group, fmt.out_features, fmt.in_features)
            return torch.ops.flashpte.quantized_linear(x, self.packed, self.scales, None, None, self.bias, *numbers)
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)

    def dequantized(self) -> torch.Tensor:
        """The weight that the codes stand for, float32 ``[N, K]``."""
        fmt = dataclasses.replace(self.fmt, scale_dtype=torch.float32)
        natural = unpack(PackedWeight(self.packed, self.scales.to(torch.float32), None), fmt)
        return dequantize(*natural, fmt.bits, fmt.group)


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Stores a linear layer's weight as codes of ``bits`` bits with one scale per ``group`` columns.

    Attributes:
        bits: 4 or 8.
        group: 32, 64 or 128; with 8 bits, ``None`` for one scale per row.
    """

    bits: int
    group: int | None

    def format_of(self, shape: Sequence[int]) -> PackedFormat:
        """The packed format of a weight ``[N, K]``."""
        rows, columns = shape
        return PackedFormat(self.bits, self.group or columns, rows, columns, scale_dtype=SCALE_DTYPE)

    def adapt(self, module: nn.Module, name: str) -> None:
        """Replaces the linear layer that owns the weight ``name`` by a :class:`QuantizedLinear`.

        Raises:
            ExportError: the weight is not that of a linear layer.
        """
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if not isinstance(owner, nn.Linear) or leaf != "weight":
            raise ExportError(f"{name}: weights of {self.bits} bits are those of linear layers")
        with torch.device("meta"):
            bias = owner.bias is not None
            module.set_submodule(path, QuantizedLinear(self.format_of(owner.weight.shape), bias, owner.weight.dtype))

    def stored(self, name: str, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Packed codes and scales; the weight's own name goes."""
        path, fmt = name.removesuffix(".weight"), self.format_of(shape)
        return {
            f"{path}.packed": (fmt.weight_shape, fmt.weight_dtype),
            f"{path}.scales": (fmt.scales_shape, fmt.scale_dtype),
        }

    def encode(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantizes a dense weight, some rows at a time.

        Raises:
            ExportError: the weight holds infinities or NaN.
        """
        path, fmt = name.removesuffix(".weight"), self.format_of(weight.shape)
        parts = [self._quantized(name, rows, fmt) for rows in weight.split(_ROWS)]
        codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return {f"{path}.packed": pack_codes(codes, fmt), f"{path}.scales": pack_groups(scales, fmt)}

    def _quantized(self, name: str, rows: torch.Tensor, fmt: PackedFormat) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes uint8 ``[R, K]`` and scales ``[R, K / group]`` of some rows."""
        columns, half = fmt.in_features, 2 ** (fmt.bits - 1)
        grouped = F.pad(rows.float(), (0, fmt.groups * fmt.group - columns)).unflatten(1, (fmt.groups, fmt.group))
        if not bool(grouped.isfinite().all()):
            raise ExportError(f"{name} holds infinities or NaN, which codes cannot")
        scales = (grouped.abs().amax(2) / (half - 0.5)).to(fmt.scale_dtype)
        steps = torch.where(scales == 0, 1.0, scales.float())[..., None]
        codes = (grouped / steps + half).round().clamp(0, 2 * half - 1).to(torch.uint8)
        return codes.flatten(1)[:, :columns].contiguous(), scales


QUANTIZED = {
    **{f"int{bits}-g{group}": Grouped(bits, group) for bits in (4, 8) for group in (32, 64, 128)},
    "int8": Grouped(8, None),
}
"""The formats, by their names in recipes."""
