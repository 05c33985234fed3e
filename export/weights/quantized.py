"""Weights of 4 or 8 bits: the weight of a linear layer or an embedding becomes packed codes and a scale per group.

A source gives such a weight as codes, scales and zero points or offsets, which are packed as they are, or dense. Codes
of dense weights are rounded to nearest. Symmetric ones have the scale ``largest magnitude / (2 ** (bits - 1) - 0.5)``,
so that both ends of the range lose half a step. Zero points cover the range of each group, or are those of
:mod:`flashpte.export.weights.hqq`. Offsets only come from sources.

Names of formats say all of it: ``int4-g32-o-f16`` has 4 bits, groups of 32 columns, offsets and float16 scales.
``int4-g32-hqq`` is like ``int4-g32-z``, but its zero points are not whole numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from flashpte.export.common.errors import ExportError
from flashpte.export.weights.hqq import choose_range, choose_zeros, to_codes
from flashpte.export.weights.packed import TENSORS, PackedModule, tensors_of
from flashpte.export.weights.quantized_embedding import QuantizedEmbedding
from flashpte.kernels.linear.format import GROUPS, TILE_ROWS, Groupwise, PackedFormat, pack

_ELEMENTS = 1 << 18
"""Weights that are quantized at a time, so that a dozen passes over their float32 values stay in the cache."""

Moved = Literal["zeros", "offsets"] | None
"""What moves a group's codes: zero points, offsets, or neither."""


class QuantizedLinear(PackedModule):
    """A linear layer with a packed weight.

    Args:
        fmt: how the weight is packed.
        bias: whether there is a bias.
        dtype: the bias's dtype.
    """

    def __init__(self, fmt: PackedFormat, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(fmt)
        self.in_features, self.out_features = fmt.in_features, fmt.out_features
        self.bias = nn.Parameter(torch.empty(fmt.out_features, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` to ``[..., N]``."""
        return self.product(x, self.bias)


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Stores a weight as codes of ``bits`` bits with one scale, and perhaps a zero point or offset, per ``group``.

    Attributes:
        bits: 4 or 8.
        group: 32, 64 or 128 columns; with 8 bits, ``None`` for a whole row.
        moved: ``"zeros"`` if groups have zero points, ``"offsets"`` if they have offsets, ``None`` if codes are
            symmetric.
        scale_dtype: bfloat16, float16 or float32, also of offsets. Zero points are whole numbers.
        hqq: whether zero points of a dense weight are chosen by half-quadratic quantization. They are not whole then.
    """

    bits: int
    group: int | None
    moved: Moved = None
    scale_dtype: torch.dtype = torch.bfloat16
    hqq: bool = False

    @property
    def name(self) -> str:
        """The format's name in recipes."""
        parts = [f"int{self.bits}"] if self.group is None else [f"int{self.bits}", f"g{self.group}"]
        if self.moved is not None:
            parts.append("hqq" if self.hqq else self.moved[0])
        return "-".join([*parts, *_SCALE_NAMES[self.scale_dtype]])

    def format_of(self, shape: Sequence[int]) -> PackedFormat:
        """The packed format of a weight ``[N, K]``."""
        rows, columns = shape
        zeros, offsets = self.moved == "zeros", self.moved == "offsets"
        whole = zeros and not self.hqq
        return PackedFormat(self.bits, self.group or columns, rows, columns, zeros, self.scale_dtype, offsets, whole)

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
        """Packed codes, scales, zero points and offsets; the weight's own name goes."""
        path = name.removesuffix(".weight")
        return {f"{path}.{part}": held for part, held in tensors_of(self.format_of(shape)).items()}

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
        return {f"{path}.{part}": tensor for part, tensor in zip(TENSORS, packed, strict=True) if tensor is not None}

    def encode(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantizes a dense weight, some rows at a time.

        Raises:
            ExportError: the weight holds infinities or NaN, or values too large for the scales; or the format has
                offsets.
        """
        if self.moved == "offsets":
            raise ExportError(f"{name}: {self.name} is for codes of quantized files; a dense weight gets no offsets")
        fmt = self.format_of(weight.shape)
        tiles = max(1, _ELEMENTS // (TILE_ROWS * fmt.in_features))  # packed tensors hold one row of tiles after another
        parts = [self.pack(name, self._quantized(name, rows, fmt)) for rows in weight.split(tiles * TILE_ROWS)]
        return {part: torch.cat([tensors[part] for tensors in parts]) for part in parts[0]}

    def _quantized(self, name: str, rows: torch.Tensor, fmt: PackedFormat) -> Groupwise:
        """Quantizes some rows."""
        columns, levels, dtype = fmt.in_features, 2**fmt.bits, fmt.scale_dtype
        grouped = F.pad(rows.float(), (0, fmt.groups * fmt.group - columns)).unflatten(1, (fmt.groups, fmt.group))
        largest = grouped.abs().amax(2)
        if not bool(largest.isfinite().all()):
            raise ExportError(f"{name} holds infinities or NaN, which codes cannot")
        zeros = None
        if self.hqq:
            scales, zeros = choose_zeros(grouped, levels, dtype, columns - (fmt.groups - 1) * fmt.group)
        elif self.moved == "zeros":
            scales, zeros = choose_range(grouped, levels, dtype)
            # A whole zero point keeps the weight 0, and its kernel is faster.
            zeros = zeros.float().round().clamp(0, levels).to(fmt.zeros_dtype)
        else:
            scales = (largest / (levels / 2 - 0.5)).to(dtype)
        center = torch.full_like(scales, levels / 2) if zeros is None else zeros.to(torch.float32)
        steps = torch.where(scales == 0, 1.0, scales.float())[..., None]
        codes = to_codes(grouped / steps, center, levels).to(torch.uint8)
        codes = codes.flatten(1)[:, :columns].contiguous()
        return Groupwise(codes, scales, zeros)


_SCALE_NAMES = {torch.bfloat16: (), torch.float16: ("f16",), torch.float32: ("f32",)}
_MOVED: tuple[Moved, ...] = (None, "zeros", "offsets")

QUANTIZED = {
    format.name: format
    for format in (
        *(
            Grouped(bits, group, moved, dtype)
            for bits, group in (*((bits, group) for bits in (4, 8) for group in GROUPS), (8, None))
            for moved in _MOVED
            for dtype in _SCALE_NAMES
        ),
        *(Grouped(4, group, "zeros", hqq=True) for group in GROUPS),
    )
}
"""The formats, by their names in recipes."""

QUANTIZED_NAMES = "int4-gN, int8-gN or int8 (N: 32, 64 or 128), then -z or -o, then -f16 or -f32; int4-gN-hqq"
"""The names in one line: ``z`` stands for zero points and ``o`` for offsets; scales are bfloat16 without a suffix."""
