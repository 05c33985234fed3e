"""Packed weights of 4 or 8 bits: the format, packing and unpacking.

A weight ``[N, K]`` (``N = out_features``, ``K = in_features``) is stored as unsigned codes ``q`` of ``bits`` bits, with
one scale ``s`` for each ``group`` columns of a row. It stands for one of

* ``(q - 2 ** (bits - 1)) * s``: symmetric,
* ``(q - z) * s``: with a zero point ``z`` for each group,
* ``q * s + o``: with an offset ``o`` for each group, in the units of the weight.

Codes are packed in tiles of 16 rows x 128 columns, which follow each other row of tiles by row of tiles:

* 4 bits: int16 ``[N / 16, K / 128, 16, 32]``, planar. Nibble ``j`` (the lowest is 0) of word ``(r, c)`` is row ``r``,
  column ``32 j + c``. So one shift and one mask turn neighboring words into neighboring columns, and a plane of 32
  columns belongs to a single group.
* 8 bits: int8 ``[N / 16, K / 128, 16, 128]`` with ``q - 128``, in natural order.

Scales, zero points and offsets are ``[N / 16, K / 128, 8, 2, 128 / group]``. Row ``8 h + g`` of a tile is at
``[g, h]``. With one group per row (``group = K``, 8 bits only) they are ``[N / 16, 1, 8, 2, 1]``.

N that is no multiple of 16 and K that is no multiple of 128 are padded. Padding has the scale 0 where it has a scale of
its own, and the code ``2 ** (bits - 1)``.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F

from flashpte.kernels.launch import cdiv

TILE_ROWS = 16
TILE_COLUMNS = 128
PLANE = 32
"""Columns of a plane, the fewest that share a scale."""
GROUPS = (32, 64, 128)
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not_format(bits: int, group: int, out_features: int, in_features: int) -> str | None:
    """Why there is no packed format with these numbers, or ``None``."""
    if bits not in (4, 8):
        return f"weights of {bits} bits: the kernels take 4 or 8"
    if out_features < 1 or in_features < 1:
        return f"a weight of {out_features} x {in_features} is empty"
    if group not in GROUPS and not (bits == 8 and group == in_features):
        also = f", or {in_features} (one scale for each row)" if bits == 8 else ""
        return f"groups of {group} columns: the kernels take 32, 64 or 128{also} with {bits} bits"
    return None


@dataclasses.dataclass(frozen=True)
class PackedFormat:
    """How a weight ``[out_features, in_features]`` is stored.

    Attributes:
        bits: 4 or 8.
        group: columns that share a scale: 32, 64, 128 or, with 8 bits, ``in_features``. The last group of a row may
            have fewer columns.
        out_features, in_features: N and K, without padding.
        has_zeros: whether groups have zero points.
        scale_dtype: dtype of scales, zero points and offsets: bfloat16, float16 or float32.
        has_offsets: whether groups have offsets. A format has zero points, offsets or neither.
        whole_zeros: whether zero points are whole numbers, which are int16. Products of 4 bits are faster then.

    Raises:
        ValueError: the numbers or the dtype do not fit.
    """

    bits: int
    group: int
    out_features: int
    in_features: int
    has_zeros: bool = False
    scale_dtype: torch.dtype = torch.bfloat16
    has_offsets: bool = False
    whole_zeros: bool = False

    def __post_init__(self) -> None:
        reason = why_not_format(self.bits, self.group, self.out_features, self.in_features)
        if reason is None and self.scale_dtype not in SCALE_DTYPES:
            reason = f"scales of {self.scale_dtype}: the kernels take bfloat16, float16 or float32"
        if reason is None and self.has_zeros and self.has_offsets:
            reason = "a weight has zero points or offsets, not both"
        if reason is None and self.whole_zeros and not self.has_zeros:
            reason = "a weight without zero points has no whole ones"
        if reason is not None:
            raise ValueError(reason)

    @property
    def symmetric_zero(self) -> int:
        """The zero point of a symmetric weight, and the code of padding."""
        return 1 << (self.bits - 1)

    @property
    def zeros_dtype(self) -> torch.dtype:
        """The dtype of zero points, if there are any."""
        return torch.int16 if self.whole_zeros else self.scale_dtype

    @property
    def sums_x(self) -> bool:
        """Whether a product of few rows needs sums of x: codes of 4 bits minus whole zero points need none."""
        return self.has_offsets or (self.has_zeros and not (self.whole_zeros and self.bits == 4))

    @property
    def row_tiles(self) -> int:
        """Tiles along N."""
        return cdiv(self.out_features, TILE_ROWS)

    @property
    def column_tiles(self) -> int:
        """Tiles along K."""
        return cdiv(self.in_features, TILE_COLUMNS)

    @property
    def groups(self) -> int:
        """Groups of a row, without padding."""
        return cdiv(self.in_features, self.group)

    @property
    def per_channel(self) -> bool:
        """Whether a row has one scale, which all of its tiles share."""
        return self.group not in GROUPS

    @property
    def groups_per_tile(self) -> int:
        """Groups of a row in one tile."""
        return 1 if self.per_channel else TILE_COLUMNS // self.group

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of packed codes."""
        return torch.int16 if self.bits == 4 else torch.int8

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """The shape of packed codes."""
        words = PLANE if self.bits == 4 else TILE_COLUMNS
        return (self.row_tiles, self.column_tiles, TILE_ROWS, words)

    @property
    def scales_shape(self) -> tuple[int, int, int, int, int]:
        """The shape of packed scales, zero points and offsets."""
        return (self.row_tiles, 1 if self.per_channel else self.column_tiles, 8, 2, self.groups_per_tile)


class PackedWeight(NamedTuple):
    """The tensors of a packed weight.

    Attributes:
        weight: packed codes, :attr:`PackedFormat.weight_shape`.
        scales: packed scales, :attr:`PackedFormat.scales_shape`.
        zeros: packed zero points, or ``None``.
        offsets: packed offsets, or ``None``.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    offsets: torch.Tensor | None = None


class Groupwise(NamedTuple):
    """The tensors of a weight in natural order.

    Attributes:
        codes: uint8 ``[N, K]``.
        scales: ``[N, K / group]`` in the format's ``scale_dtype``.
        zeros: zero points, like ``scales``, or int16 from 0 to ``2 ** bits``; or ``None``.
        offsets: offsets, like ``scales``, or ``None``.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    offsets: torch.Tensor | None = None


def pack_codes(codes: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """Packs codes uint8 ``[N, K]``. Uses one more copy of the codes, and none in a wider dtype.

    Raises:
        ValueError: the shape or the dtype does not fit, or a code does not fit in ``fmt.bits`` bits.
    """
    _check(codes, (fmt.out_features, fmt.in_features), torch.uint8, "codes")
    if fmt.bits == 4 and int(codes.max()) > 15:
        raise ValueError(f"a code of 4 bits is at most 15, got {int(codes.max())}")
    rows, columns = fmt.row_tiles * TILE_ROWS, fmt.column_tiles * TILE_COLUMNS
    codes = F.pad(codes, (0, columns - fmt.in_features, 0, rows - fmt.out_features), value=fmt.symmetric_zero)
    tiles = codes.view(fmt.row_tiles, TILE_ROWS, fmt.column_tiles, TILE_COLUMNS).transpose(1, 2)
    if fmt.bits == 8:
        # Flipping the highest bit subtracts 128 in two's complement.
        return (tiles ^ 128).contiguous().view(torch.int8)
    planes = tiles.unflatten(3, (4, PLANE))
    # Low byte and high byte of a little-endian word.
    halves = [planes[..., low, :] | planes[..., low + 1, :] << 4 for low in (0, 2)]
    return torch.stack(halves, -1).view(torch.int16).squeeze(-1)


def unpack_codes(weight: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """The codes uint8 ``[N, K]`` that :func:`pack_codes` packed.

    Raises:
        ValueError: the shape or the dtype does not fit.
    """
    _check(weight, fmt.weight_shape, fmt.weight_dtype, "the packed weight")
    if fmt.bits == 8:
        tiles = weight.view(torch.uint8) ^ 128
    else:
        halves = weight.contiguous().unsqueeze(-1).view(torch.uint8)
        low, high = halves[..., 0], halves[..., 1]
        tiles = torch.cat((low & 15, low >> 4, high & 15, high >> 4), -1)
    rows = tiles.transpose(1, 2).reshape(fmt.row_tiles * TILE_ROWS, fmt.column_tiles * TILE_COLUMNS)
    return rows[: fmt.out_features, : fmt.in_features].contiguous()


def pack_groups(values: torch.Tensor, fmt: PackedFormat, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Packs scales, zero points or offsets ``[N, K / group]`` of ``dtype``, which is that of scales if not given.

    Raises:
        ValueError: the shape or the dtype does not fit.
    """
    _check(values, (fmt.out_features, fmt.groups), dtype or fmt.scale_dtype, "scales, zero points or offsets")
    tiles, columns, _, _, per_tile = fmt.scales_shape
    values = F.pad(values, (0, columns * per_tile - fmt.groups, 0, tiles * TILE_ROWS - fmt.out_features))
    return values.view(tiles, 2, 8, columns, per_tile).permute(0, 3, 2, 1, 4).contiguous()


def unpack_groups(packed: torch.Tensor, fmt: PackedFormat, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The scales, zero points or offsets ``[N, K / group]`` that :func:`pack_groups` packed.

    Raises:
        ValueError: the shape or the dtype does not fit.
    """
    _check(packed, fmt.scales_shape, dtype or fmt.scale_dtype, "packed scales, zero points or offsets")
    tiles, columns, _, _, per_tile = fmt.scales_shape
    values = packed.permute(0, 3, 2, 1, 4).reshape(tiles * TILE_ROWS, columns * per_tile)
    return values[: fmt.out_features, : fmt.groups].contiguous()


def pack(natural: Groupwise, fmt: PackedFormat) -> PackedWeight:
    """Packs a weight. It must have zero points exactly if ``fmt.has_zeros``, and offsets if ``fmt.has_offsets``.

    Raises:
        ValueError: a shape or a dtype does not fit, or a code or a whole zero point does not fit in ``fmt.bits`` bits.
    """
    codes, scales, zeros, offsets = natural
    for name, tensor, wanted in (("zero points", zeros, fmt.has_zeros), ("offsets", offsets, fmt.has_offsets)):
        if (tensor is not None) != wanted:
            raise ValueError(f"the format has {'' if wanted else 'no '}{name}, the weight differs")
    if fmt.whole_zeros and zeros is not None and not 0 <= int(zeros.min()) <= int(zeros.max()) <= 1 << fmt.bits:
        raise ValueError(f"a whole zero point of {fmt.bits} bits is from 0 to {1 << fmt.bits}")
    return PackedWeight(
        pack_codes(codes, fmt),
        pack_groups(scales, fmt),
        None if zeros is None else pack_groups(zeros, fmt, fmt.zeros_dtype),
        None if offsets is None else pack_groups(offsets, fmt),
    )


def unpack(packed: PackedWeight, fmt: PackedFormat) -> Groupwise:
    """The weight that :func:`pack` packed.

    Raises:
        ValueError: a shape or a dtype does not fit.
    """
    weight, scales, zeros, offsets = packed
    return Groupwise(
        unpack_codes(weight, fmt),
        unpack_groups(scales, fmt),
        None if zeros is None else unpack_groups(zeros, fmt, fmt.zeros_dtype),
        None if offsets is None else unpack_groups(offsets, fmt),
    )


def _check(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        wanted = f"{dtype} {list(shape)}"
        raise ValueError(f"{name} must be {wanted}, got {tensor.dtype} {list(tensor.shape)}")
