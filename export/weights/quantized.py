"""Weights of 4 or 8 bits: a linear layer's weight becomes packed codes and one scale per group of columns.

A source gives such a weight as codes, scales and zero points or offsets, which are packed as they are, or dense. Dense
weights are rounded to nearest, symmetric around zero: a group's scale is its largest magnitude over ``2 ** (bits - 1) -
0.5``, so that both ends of the range lose half a step.

Names of formats say all of it: ``int4-g32-o-f16`` has 4 bits, groups of 32 columns, offsets and float16 scales.
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
    Groupwise,
    PackedFormat,
    PackedWeight,
    pack,
    pack_codes,
    pack_groups,
    unpack,
)
from flashpte.kernels.linear.reference import dequantize

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
    zeros: torch.Tensor | None
    offsets: torch.Tensor | None

    def __init__(self, fmt: PackedFormat, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.fmt, self.in_features, self.out_features = fmt, fmt.in_features, fmt.out_features
        held = _tensors_of(fmt)
        for name in _TENSORS:
            shape, kind = held.get(name, ((), None))
            self.register_buffer(name, None if kind is None else torch.empty(shape, dtype=kind))
        self.bias = nn.Parameter(torch.empty(fmt.out_features, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` to ``[..., N]``."""
        if torch.compiler.is_exporting():
            fmt = self.fmt
            numbers = (fmt.bits, fmt.group, fmt.out_features, fmt.in_features)
            tensors = (self.packed, self.scales, self.zeros, self.offsets, self.bias)
            return torch.ops.flashpte.quantized_linear(x, *tensors, *numbers)
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)

    def dequantized(self) -> torch.Tensor:
        """The weight that the codes stand for, float32 ``[N, K]``."""
        fmt = dataclasses.replace(self.fmt, scale_dtype=torch.float32)
        wide = (None if t is None else t.to(torch.float32) for t in (self.scales, self.zeros, self.offsets))
        natural = unpack(PackedWeight(self.packed, *wide), fmt)  # type: ignore[arg-type]
        return dequantize(*natural, fmt.bits, fmt.group)


_TENSORS = ("packed", "scales", "zeros", "offsets")
"""Names of a layer's tensors, in the order of :class:`flashpte.kernels.linear.format.PackedWeight`."""


def _tensors_of(fmt: PackedFormat) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors that a format has, by their names in the layer."""
    of_groups = (fmt.scales_shape, fmt.scale_dtype)
    optional = {"zeros": fmt.has_zeros, "offsets": fmt.has_offsets}
    return {
        "packed": (fmt.weight_shape, fmt.weight_dtype),
        "scales": of_groups,
        **{name: of_groups for name, held in optional.items() if held},
    }


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Stores a linear layer's weight as codes of ``bits`` bits with one scale per ``group`` columns.

    Attributes:
        bits: 4 or 8.
        group: 32, 64 or 128; with 8 bits, ``None`` for one scale per row.
        moved: ``"zeros"`` if groups have zero points, ``"offsets"`` if they have offsets, ``None`` if codes are
            symmetric.
        scale_dtype: bfloat16, float16 or float32, also of zero points and offsets.
    """

    bits: int
    group: int | None
    moved: str | None = None
    scale_dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """The format's name in recipes."""
        parts = [f"int{self.bits}"] if self.group is None else [f"int{self.bits}", f"g{self.group}"]
        parts += [] if self.moved is None else [self.moved[0]]
        return "-".join([*parts, *_SCALE_NAMES[self.scale_dtype]])

    def format_of(self, shape: Sequence[int]) -> PackedFormat:
        """The packed format of a weight ``[N, K]``."""
        rows, columns = shape
        zeros, offsets = self.moved == "zeros", self.moved == "offsets"
        return PackedFormat(self.bits, self.group or columns, rows, columns, zeros, self.scale_dtype, offsets)

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
        """Packed codes, scales, zero points and offsets; the weight's own name goes."""
        path = name.removesuffix(".weight")
        return {f"{path}.{part}": held for part, held in _tensors_of(self.format_of(shape)).items()}

    def pack(self, name: str, natural: Groupwise) -> dict[str, torch.Tensor]:
        """Packs a weight that the source holds as codes, without changing what it stands for.

        Raises:
            ExportError: it has other tensors, shapes or dtypes than the format, or a scale that is not finite.
        """
        path = name.removesuffix(".weight")
        for part, tensor in zip(("scales", "zero points", "offsets"), natural[1:], strict=True):
            if tensor is not None and not bool(tensor.isfinite().all()):
                raise ExportError(f"{name} has {part} that are infinite or NaN")
        try:
            packed = pack(natural, self.format_of(natural.codes.shape))
        except ValueError as error:
            raise ExportError(f"{name} does not fit the format {self.name}: {error}") from error
        return {f"{path}.{part}": tensor for part, tensor in zip(_TENSORS, packed, strict=True) if tensor is not None}

    def encode(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantizes a dense weight, some rows at a time.

        Raises:
            ExportError: the weight holds infinities or NaN, or the format is not symmetric.
        """
        if self.moved is not None:
            raise ExportError(f"{name}: {self.name} holds codes of a quantized checkpoint; rounding is symmetric")
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


_SCALE_NAMES = {torch.bfloat16: (), torch.float16: ("f16",), torch.float32: ("f32",)}

QUANTIZED = {
    format.name: format
    for bits, group in ((4, 32), (4, 64), (4, 128), (8, 32), (8, 64), (8, 128), (8, None))
    for moved in (None, "zeros", "offsets")
    for format in (Grouped(bits, group, moved, dtype) for dtype in _SCALE_NAMES)
}
"""The formats, by their names in recipes."""

QUANTIZED_NAMES = "int4-gN, int8-gN or int8 (N: 32, 64 or 128), then -z or -o, then -f16 or -f32"
"""The names in one line: ``z`` stands for zero points and ``o`` for offsets; scales are bfloat16 without a suffix."""
