"""Folders that torchao quantized: safetensors whose metadata describes tensor subclasses.

A weight ``<module>.weight`` is stored as ``<module>._weight_qdata``, ``_weight_scale`` and ``_weight_zero_point``. The
file's metadata has a JSON text for ``<module>.weight``: ``_type``, the subclass; ``_data``, its attributes; and
``_tensor_data_names``, the names of its tensors. ``{"_type": "Tensor"}`` is a dense weight. For a weight ``[N, K]`` and
groups of ``g`` columns:

==========================  ===========================  =======================  ==============================
type                        qdata                        scale, zero_point        a weight
==========================  ===========================  =======================  ==============================
Int4Tensor                  int8 ``[N, K / 2]``, signed  ``[K / g, N]``           ``q * scale + zero_point``
                            nibbles, the low one first
IntxUnpackedToInt8Tensor    int8 ``[N, K]``              ``[N, K / g]``           ``(q - zero_point) * scale``
Int8Tensor                  int8 ``[N, K]``              ``[N, K / g]`` or one    ``(q - zero_point) * scale``
==========================  ===========================  =======================  ==============================

A zero point of Int4Tensor is in the units of the weight. It becomes an offset in float32, ``zero_point - 8 * scale``,
for codes ``q + 8``, which is what ``torchao.prototype.gptq`` computes.
"""

from __future__ import annotations

import dataclasses
import json
import re

import torch

from flashpte.export.common.errors import ExportError
from flashpte.export.weights.quantization_fields import Fields
from flashpte.export.weights.quantized import Moved
from flashpte.export.weights.safetensors import Checkpoint
from flashpte.export.weights.stored_codes import SCALES, HeldCodes, Linears, format_of, natural, nibbles, tensor
from flashpte.kernels.linear.format import GROUPS, TILE_COLUMNS, Groupwise
from flashpte.kernels.linear.reference import dequantize

_QUANTIZES_ACTIVATIONS = {
    "Int4Tensor": "activation_dtype",
    "IntxUnpackedToInt8Tensor": "activation_quantization",
    "Int8Tensor": "act_quant_kwargs",
}
"""The types that are read, each with the attribute that says whether activations are quantized, too."""

_INTEGERS = re.compile(r"int([1-8])")
_FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A weight of one of the types that are read.

    Attributes:
        type: the subclass.
        bits: 4 or 8, the bits of the codes that it becomes.
        integer: the integers that ``qdata`` holds, for people.
        block: rows and columns that share a scale.
        prefix: what the names of its tensors start with.
        shape: N and K.
        dtype: the dtype of what torchao dequantizes; ``None`` for that of the scales.
    """

    type: str
    bits: int
    integer: str
    block: tuple[int, int]
    prefix: str
    shape: tuple[int, int]
    dtype: torch.dtype | None

    @property
    def group(self) -> int | None:
        """Columns that share a scale; ``None`` for a row."""
        return None if self.block[1] == self.shape[1] else self.block[1]

    @property
    def groups_shape(self) -> tuple[int, int]:
        """The shape of scales and zero points."""
        rows, groups = (size // block for size, block in zip(self.shape, self.block, strict=True))
        return (groups, rows) if self.type == "Int4Tensor" else (rows, groups)


def find(linears: Linears) -> dict[str, HeldCodes]:
    """The quantized weights of a folder, by their names; reads zero points, but no codes.

    Raises:
        ExportError: the metadata is missing or broken, a type or an attribute is not served, or a tensor is missing or
            does not fit.
    """
    checkpoint = linears.checkpoint
    described = checkpoint.metadata()
    if not described and (parts := [name for name in checkpoint.tensors if name.endswith("._weight_qdata")]):
        raise ExportError(f"{checkpoint.folder} has a tensor {parts[0]}, but its files have no metadata of torchao")
    found = {}
    for name, text in described.items():
        if name not in linears.tensors:
            continue
        fields = _fields(checkpoint, name, text)
        if fields.get("_type") == "Tensor":
            continue
        stored = _described(fields, name, linears.tensors[name])
        found[name] = _held(checkpoint, stored, name.removesuffix(".weight") in linears.shapes)
    return found


def _fields(checkpoint: Checkpoint, name: str, text: str) -> Fields:
    where = f"metadata of {name}"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ExportError(f"{checkpoint.folder}: the {where} is no JSON object")
    return Fields(checkpoint.folder, value, where)


def _described(fields: Fields, name: str, shape: tuple[int, ...]) -> _Stored:
    """What the metadata says about a weight.

    Raises:
        ExportError: it is not of a type or a kind that is read.
    """
    type = fields.choice("_type", _QUANTIZES_ACTIVATIONS)
    data, parts = fields.part("_data"), fields.names("_tensor_data_names")
    if len(shape) != 2:
        raise ExportError(f"{fields.path}: {name} is a {type} of shape {list(shape)}; read are matrices")
    activations = _QUANTIZES_ACTIVATIONS[type]
    if data.get(activations) not in (None, _named("bfloat16") if type == "Int4Tensor" else None):
        data.refuse(activations, "says that activations are quantized, which is not served")
    if others := [part for part in parts if part not in ("qdata", "scale", "zero_point")]:
        fields.refuse("_tensor_data_names", f"has {others[0]}, which is not served")
    integer = {"Int4Tensor": "int4", "Int8Tensor": "int8"}.get(type) or _name_of(data, "target_dtype")
    if not (bits := _INTEGERS.fullmatch(integer)):
        data.refuse("target_dtype", f"is {integer}; read are int1 to int8")
    dtype = None if type == "Int4Tensor" else _FLOATS.get(_name_of(data, "dtype"))
    block = _block(data, (shape[0], shape[1]))
    prefix = "._".join(name.rsplit(".", 1)) + "_"
    return _Stored(type, 4 if int(bits[1]) <= 4 else 8, integer, block, prefix, (shape[0], shape[1]), dtype)


def _named(dtype: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": dtype}


def _name_of(data: Fields, name: str) -> str:
    """The name of an attribute that is a dtype."""
    return str(data.part(name).get("_data"))


def _block(data: Fields, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that share a scale.

    Raises:
        ExportError: no format serves them, or they do not divide the weight.
    """
    value = data.get("block_size")
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        data.refuse("block_size", f"is {value!r}, must be rows and columns")
    rows, columns = value
    if rows not in (1, shape[0]):
        data.refuse("block_size", f"is {value!r}: rows that share scales are not served")
    if shape[1] % columns:
        data.refuse("block_size", f"is {value!r}, which does not divide the weight's {shape[1]} columns")
    if columns != shape[1] and columns not in GROUPS and columns % TILE_COLUMNS:
        data.refuse("block_size", f"is {value!r}; served are 32, 64, multiples of 128, and all columns")
    return rows, columns


def _held(checkpoint: Checkpoint, stored: _Stored, linear: bool) -> HeldCodes:
    rows, columns = stored.shape
    nibbled = stored.type == "Int4Tensor"
    qdata, scale, zero = (f"{stored.prefix}{part}" for part in ("qdata", "scale", "zero_point"))
    if nibbled and columns % 2:
        raise ExportError(f"{qdata} of {checkpoint.folder}: {columns} columns do not fill bytes of two codes")
    tensor(checkpoint, qdata, (rows, columns // 2 if nibbled else columns), ("I8", "U8") if nibbled else ("I8",))
    dtype = tensor(checkpoint, scale, stored.groups_shape, SCALES, f", which {qdata} needs")
    assert dtype is not None
    names = [qdata, scale]
    moved: Moved = None
    if zero in checkpoint.tensors or stored.type != "Int8Tensor":
        tensor(checkpoint, zero, stored.groups_shape, SCALES if nibbled else ("I8", *SCALES), f", which {qdata} needs")
        names.append(zero)
        if bool(checkpoint.read(zero).any()):
            moved = "offsets" if nibbled else "zeros"
    if moved == "zeros":
        _check_whole(checkpoint, zero, stored.bits, dtype)
    format = format_of(stored.bits, stored.group, columns, moved, torch.float32 if moved == "offsets" else dtype)
    what = "a row" if stored.group is None else f"groups of {stored.group}"
    kind = f"torchao {stored.type}, {stored.integer}, {what if stored.block[0] == 1 else f'{what}, all rows together'}"

    def read() -> Groupwise:
        codes, groups = _read(checkpoint, stored, moved)
        return natural(codes, groups, format)

    def dense() -> torch.Tensor:
        fmt = format.format_of(stored.shape)
        return dequantize(*read(), fmt.bits, fmt.group).to(stored.dtype or dtype)

    return HeldCodes(kind, format.name if linear else None, tuple(names), read if linear else dense)


def _read(
    checkpoint: Checkpoint, stored: _Stored, moved: str | None
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
    """Codes uint8 ``[N, K]``, and scales, zero points and offsets ``[N, G]``."""
    qdata, scales = (checkpoint.read(f"{stored.prefix}{part}") for part in ("qdata", "scale"))
    zeros = None if moved is None else checkpoint.read(f"{stored.prefix}zero_point")
    middle = 1 << (stored.bits - 1)
    if stored.type == "Int4Tensor":
        codes, scales = nibbles(qdata.view(torch.uint8)) ^ middle, scales.t()
        offsets = None if zeros is None else zeros.t().float() - scales.float() * middle
        return codes, (scales, None, offsets)
    # Adding modulo 256: a number outside its integers becomes a code that packing refuses.
    codes = qdata.view(torch.uint8) + middle
    zeros = None if zeros is None else zeros.float() + middle
    rows = stored.shape[0]
    spread = (None if t is None else t.expand(rows, -1) for t in (scales, zeros))
    return codes, (*spread, None)  # type: ignore[return-value]


def _check_whole(checkpoint: Checkpoint, name: str, bits: int, dtype: torch.dtype) -> None:
    """Checks that zero points are whole numbers which the format's dtype holds.

    Raises:
        ExportError: they are not.
    """
    zeros = checkpoint.read(name).float()
    moved = zeros + (1 << (bits - 1))
    if not torch.equal(zeros, zeros.round()) or not torch.equal(moved.to(dtype).float(), moved):
        raise ExportError(f"tensor {name} of {checkpoint.folder} holds zero points that are no whole numbers of a code")
