"""Weights that a folder holds as codes: what each quantization method finds, and helpers that they share.

Words are int32. A word of 4-bit codes holds eight of them, the first in its lowest bits; a word of 8-bit codes four.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from flashpte.export.common.errors import ExportError
from flashpte.export.weights.checkpoint_folder import CONFIG_FILE
from flashpte.export.weights.quantized import Grouped
from flashpte.export.weights.safetensors import Checkpoint
from flashpte.kernels.linear.format import GROUPS, Groupwise

SECTION = "quantization_config"
"""The config's field that describes how a folder is quantized."""

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
        fields: the fields of ``quantization_config``.
        shapes: the shape ``(N, K)`` of each linear layer's weight, by the layer's name.
        other: names of the model's other tensors.
    """

    checkpoint: Checkpoint
    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int]]
    other: Collection[str]

    @property
    def config(self) -> Path:
        """The file that holds the fields, for errors."""
        return self.checkpoint.folder / CONFIG_FILE

    def refuse(self, field: str, why: str) -> NoReturn:
        """Raises an ExportError about a field of ``quantization_config``."""
        raise ExportError(f"{self.config}: {SECTION}.{field} {why}")

    def holds(self, layer: str, parts: Collection[str]) -> bool:
        """Whether the folder has any of a layer's tensors with these names."""
        return any(f"{layer}.{part}" in self.checkpoint.tensors for part in parts)

    def choice(self, field: str, known: Collection[Any], default: Any = None) -> Any:
        """A field that must have one of some values.

        Raises:
            ExportError: it has another one.
        """
        value = self.fields.get(field, default)
        if not any(type(value) is type(one) and value == one for one in known):  # 1 == True
            self.refuse(field, f"is {value!r}; read are {', '.join(map(str, known))}")
        return value

    def flag(self, field: str, default: bool) -> bool:
        """A field that is true or false.

        Raises:
            ExportError: it is neither.
        """
        return bool(self.choice(field, (True, False), default))

    def group(self, field: str = "group_size", within: Mapping[str, Any] | None = None) -> int | None:
        """A group size; ``None`` for a whole row, which configs write as -1.

        Raises:
            ExportError: it is no size, or one that no format serves.
        """
        value = (self.fields if within is None else within).get(field.rpartition(".")[2])
        if value == -1 and not isinstance(value, bool):
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(field, f"is {value!r}, must be a number of columns or -1 for a whole row")
        if value not in GROUPS and value % _ROW_GROUP:
            self.refuse(field, f"is {value}; served are 32, 64, multiples of 128, and -1 for a whole row")
        return value


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


def format_of(bits: int, group: int | None, columns: int, moved: str | None, dtype: torch.dtype) -> Grouped:
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

    def spread(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        # A last group of fewer columns belongs to a scale that serves the whole row.
        times = -(-fmt.groups // values.shape[1])
        return values.to(fmt.scale_dtype).repeat_interleave(times, 1)[:, : fmt.groups].contiguous()

    scales, zeros, offsets = (spread(values) for values in groups)
    assert scales is not None
    return Groupwise(codes.contiguous(), scales, zeros, offsets)
