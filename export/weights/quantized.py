"""Weights of 4 or 8 bits: the weight of a linear layer or an embedding becomes packed codes and a scale per group.

Codes are rounded to nearest. Symmetric ones (``rtn``) have the scale ``largest magnitude / (2 ** (bits - 1) - 0.5)``,
so that both ends of the range lose half a step. ``zeros`` covers the range of each group with zero points, and ``hqq``
chooses better ones (:mod:`flashpte.export.weights.hqq`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import flashpte.kernels.linear  # noqa: F401  (registers the operator)
from flashpte.export.common.errors import ExportError
from flashpte.export.weights.hqq import choose_range, choose_zeros, to_codes
from flashpte.export.weights.quantized_embedding import QuantizedEmbedding
from flashpte.kernels.linear.format import (
    GROUPS,
    TILE_ROWS,
    PackedFormat,
    PackedWeight,
    pack_codes,
    pack_groups,
    unpack,
)
from flashpte.kernels.linear.reference import dequantize

SCALE_DTYPE = torch.bfloat16
_GROUPS = ("scales", "zeros")
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

    def __init__(self, fmt: PackedFormat, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.fmt, self.in_features, self.out_features = fmt, fmt.in_features, fmt.out_features
        self.register_buffer("packed", torch.empty(fmt.weight_shape, dtype=fmt.weight_dtype))
        self.register_buffer("scales", torch.empty(fmt.scales_shape, dtype=fmt.scale_dtype))
        self.register_buffer("zeros", torch.empty_like(self.scales) if fmt.has_zeros else None)
        self.bias = nn.Parameter(torch.empty(fmt.out_features, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` to ``[..., N]``."""
        if torch.compiler.is_exporting():
            fmt = self.fmt
            numbers = (fmt.bits, fmt.group, fmt.out_features, fmt.in_features)
            return torch.ops.flashpte.quantized_linear(x, self.packed, self.scales, self.zeros, self.bias, *numbers)
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)

    def dequantized(self) -> torch.Tensor:
        """The weight that the codes stand for, float32 ``[N, K]``."""
        fmt = dataclasses.replace(self.fmt, scale_dtype=torch.float32)
        zeros = None if self.zeros is None else self.zeros.float()
        natural = unpack(PackedWeight(self.packed, self.scales.float(), zeros), fmt)
        return dequantize(*natural, fmt.bits, fmt.group)


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Stores a weight as codes of ``bits`` bits with one scale, and perhaps a zero point, per ``group`` columns.

    Attributes:
        bits: 4 or 8.
        group: 32, 64 or 128; with 8 bits, ``None`` for one scale per row.
        algorithm: ``rtn`` (symmetric), ``zeros`` or ``hqq`` (both with zero points).
    """

    bits: int
    group: int | None
    algorithm: Literal["rtn", "zeros", "hqq"] = "rtn"

    def format_of(self, shape: Sequence[int]) -> PackedFormat:
        """The packed format of a weight ``[N, K]``."""
        rows, columns = shape
        has_zeros = self.algorithm != "rtn"
        return PackedFormat(self.bits, self.group or columns, rows, columns, has_zeros, SCALE_DTYPE)

    def adapt(self, module: nn.Module, name: str) -> None:
        """Replaces the layer that owns the weight ``name`` by a :class:`QuantizedLinear` or ``QuantizedEmbedding``.

        Raises:
            ExportError: the weight is not that of a linear layer or an embedding, or the embedding computes more than
                a row times ``embed_scale``.
        """
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if not isinstance(owner, nn.Linear | nn.Embedding) or leaf != "weight":
            raise ExportError(f"{name}: weights of {self.bits} bits are those of linear layers and embeddings")
        fmt = self.format_of(owner.weight.shape)
        if isinstance(owner, nn.Embedding):
            factor = getattr(owner, "embed_scale", None)
            plain = type(owner).forward is nn.Embedding.forward
            if owner.max_norm is not None or not (plain or isinstance(factor, torch.Tensor)):
                raise ExportError(f"{name}: an embedding of type {type(owner).__name__} cannot have {self.bits} bits")
        with torch.device("meta"):
            replacement: nn.Module
            if isinstance(owner, nn.Embedding):
                replacement = QuantizedEmbedding(fmt, factor)
            else:
                replacement = QuantizedLinear(fmt, owner.bias is not None, owner.weight.dtype)
        module.set_submodule(path, replacement)

    def stored(self, name: str, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Packed codes, scales and zero points, if any; the weight's own name goes."""
        path, fmt = name.removesuffix(".weight"), self.format_of(shape)
        stored = {
            f"{path}.packed": (fmt.weight_shape, fmt.weight_dtype),
            f"{path}.scales": (fmt.scales_shape, fmt.scale_dtype),
        }
        return stored | ({f"{path}.zeros": (fmt.scales_shape, fmt.scale_dtype)} if fmt.has_zeros else {})

    def encode(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantizes a dense weight, some rows at a time.

        Raises:
            ExportError: the weight holds infinities or NaN.
        """
        path, fmt = name.removesuffix(".weight"), self.format_of(weight.shape)
        parts = [self._quantized(name, rows, fmt) for rows in weight.split(_ROWS)]
        codes, *groups = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        packed = {f"{path}.packed": pack_codes(codes, fmt)}
        return packed | {
            f"{path}.{kind}": pack_groups(values, fmt) for kind, values in zip(_GROUPS, groups, strict=False)
        }

    def _quantized(self, name: str, rows: torch.Tensor, fmt: PackedFormat) -> tuple[torch.Tensor, ...]:
        """Codes uint8 ``[R, K]``, scales ``[R, K / group]`` and zero points, if any, of some rows."""
        columns, levels, dtype = fmt.in_features, 2**fmt.bits, fmt.scale_dtype
        grouped = F.pad(rows.float(), (0, fmt.groups * fmt.group - columns)).unflatten(1, (fmt.groups, fmt.group))
        if not bool(grouped.isfinite().all()):
            raise ExportError(f"{name} holds infinities or NaN, which codes cannot")
        zeros = None
        if self.algorithm == "hqq":
            scales, zeros = choose_zeros(grouped, levels, dtype, columns - (fmt.groups - 1) * fmt.group)
        elif self.algorithm == "zeros":
            scales, zeros = choose_range(grouped, levels, dtype)
        else:
            scales = (grouped.abs().amax(2) / (levels / 2 - 0.5)).to(dtype)
        center = torch.full_like(scales, levels / 2) if zeros is None else zeros
        steps = torch.where(scales == 0, 1.0, scales.float())[..., None]
        codes = to_codes(grouped / steps, center, levels).to(torch.uint8)
        codes = codes.flatten(1)[:, :columns].contiguous()
        return (codes, scales) if zeros is None else (codes, scales, zeros)


QUANTIZED = {
    **{f"int{bits}-g{group}": Grouped(bits, group) for bits in (4, 8) for group in GROUPS},
    "int8": Grouped(8, None),
    **{f"int4-g{group}-zeros": Grouped(4, group, "zeros") for group in GROUPS},
    **{f"int4-g{group}-hqq": Grouped(4, group, "hqq") for group in GROUPS},
}
"""The formats, by their names in recipes."""
