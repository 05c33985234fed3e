"""Weights that a folder holds as codes: what each quantization method finds, and helpers that they share.

Words are int32. A word of 4-bit codes holds eight of them, the first in its lowest bits; a word of 8-bit codes four.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

import torch

from flashpte.export.common.errors import ExportError
from flashpte.export.weights.quantization_fields import Fields
from flashpte.export.weights.quantized import Grouped, Moved
from flashpte.export.weights.safetensors import Checkpoint
from flashpte.kernels.linear.format import GROUPS, Groupwise

SCALES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""The dtypes of scales, by their names in safetensors headers."""

_ROW_GROUP = 128
"""Columns of the groups that repeat a row's scale, which 4 bits need."""


@dataclasses.dataclass(frozen=True)
class HeldCodes:
    """A weight that a folder holds as codes.

    Attributes:
        kind: what it is, for people: a method and its numbers.
        format: the format that holds the same numbers; ``None`` for a weight that becomes dense.
        tensors: names of its tensors in the checkpoint.
        read: reads it: :class:`Groupwise` if there is a format, else a dense tensor.
    """

    kind: str
    format: str | None
    tensors: tuple[str, ...]
    read: Callable[[], Groupwise | torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Linears:
    """What a quantization method looks for in a folder.

    Attributes:
        checkpoint: the opened folder.
        fields: ``quantization_config``.
        shapes: the shape ``(N, K)`` of each linear layer's weight, by the layer's name.
        tensors: the shape of each tensor of the model, by its name.
    """

    checkpoint: Checkpoint
    fields: Fields
    shapes: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, tuple[int, ...]]

    def holds(self, layer: str, parts: Collection[str]) -> bool:
        """Whether the folder has any of a layer's tensors with these names."""
        return any(f"{layer}.{part}" in self.checkpoint.tensors for part in parts)


def tensor(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtypes: Collection[str], also: str = ""
) -> torch.dtype | None:
    """Checks the header of one of a weight's tensors.

    Args:
        checkpoint: the folder.
        name: the tensor.
        shape: the shape that it must have.
        dtypes: the dtypes that it may have.
        also: why it must be there, for the error.

    Returns:
        The dtype of scales; ``None`` for others.

    Raises:
        ExportError: it is missing, or has another shape or dtype.
    """
    stored = checkpoint.tensors.get(name)
    if stored is None:
        raise ExportError(f"{checkpoint.folder} has no tensor {name} ({' or '.join(dtypes)} {list(shape)}){also}")
    if stored.shape != shape:
        raise ExportError(
            f"tensor {stored.name} in {stored.file} has shape {list(stored.shape)}, the config asks for {list(shape)}"
        )
    if stored.dtype not in dtypes:
        raise ExportError(
            f"tensor {stored.name} in {stored.file} has dtype {stored.dtype}, must be {' or '.join(dtypes)}"
        )
    return SCALES.get(stored.dtype)


def groups_of(checkpoint: Checkpoint, name: str, columns: int, group: int | None) -> int:
    """How many groups a row of ``columns`` columns has.

    Raises:
        ExportError: the group size does not divide the columns; the text names the tensor.
    """
    if group is not None and columns % group:
        stored = checkpoint.tensors[name]
        raise ExportError(
            f"tensor {stored.name} in {stored.file}: its {columns} columns are no multiple of the group size {group}"
        )
    return 1 if group is None else columns // group


def check_order(checkpoint: Checkpoint, name: str, columns: int, group: int | None) -> None:
    """Checks that a tensor of each column's group is the one without act-order: neighboring columns share a group.

    Raises:
        ExportError: the tensor does not fit, or the checkpoint has act-order.
    """
    tensor(checkpoint, name, (columns,), ("I32", "I64"))
    expected = torch.arange(columns) // (group or columns)
    if not torch.equal(checkpoint.read(name).to(torch.int64), expected):
        raise ExportError(
            f"tensor {name} of {checkpoint.folder} gives neighboring columns different groups: act-order is not "
            "served; quantize without it"
        )


def words_of(bits: int) -> int:
    """How many codes a word holds."""
    return 32 // bits


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes in int32 ``[R, C]``: uint8 ``[R, C * 32 / bits]``."""
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 8 else nibbles(octets)


def nibbles(octets: torch.Tensor) -> torch.Tensor:
    """The nibbles in uint8 ``[R, C]``, the low one of each byte first: uint8 ``[R, 2 C]``."""
    return torch.stack((octets & 15, octets >> 4), -1).flatten(1)


def format_of(bits: int, group: int | None, columns: int, moved: Moved, dtype: torch.dtype) -> Grouped:
    """The format of a weight with scales per ``group`` columns.

    With 4 bits, a row's scale is repeated for groups of 128 columns, and so is that of a group larger than 128. Both
    mean the same weight.

    Args:
        bits: 4 or 8.
        group: columns that share a scale; ``None`` for a row.
        columns: columns of a row.
        moved: ``"zeros"``, ``"offsets"`` or ``None``.
        dtype: dtype of the scales.
    """
    if group is None or (group == columns and group not in GROUPS):
        group = None if bits == 8 else _ROW_GROUP
    elif group not in GROUPS:
        group = _ROW_GROUP
    return Grouped(bits, group, moved, dtype)


def natural(codes: torch.Tensor, groups: tuple[torch.Tensor | None, ...], format: Grouped) -> Groupwise:
    """Codes with the tensors of their groups, repeated where the format has more groups.

    Args:
        codes: uint8 ``[N, K]``.
        groups: scales, zero points and offsets ``[N, G]`` of any dtype, each or ``None``.
        format: the result of :func:`format_of`.
    """
    fmt = format.format_of(codes.shape)

    def spread(values: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        if values is None:
            return None
        # A last group of fewer columns belongs to a scale that serves the whole row.
        times = -(-fmt.groups // values.shape[1])
        return values.to(dtype).repeat_interleave(times, 1)[:, : fmt.groups].contiguous()

    dtypes = (fmt.scale_dtype, fmt.zeros_dtype, fmt.scale_dtype)
    scales, zeros, offsets = map(spread, groups, dtypes)
    assert scales is not None
    return Groupwise(codes.contiguous(), scales, zeros, offsets)
