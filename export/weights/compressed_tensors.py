"""Folders of compressed-tensors (LLM Compressor, vLLM) whose weights have the format ``pack-quantized``.

A linear layer ``[N, K]`` has ``weight_packed`` int32 ``[N, K * bits / 32]``, ``weight_scale`` ``[N, K / group]`` or
``[N, 1]`` and ``weight_shape`` with N and K. Stored codes are signed numbers plus ``2 ** (bits - 1)``. Asymmetric
layers have ``weight_zero_point`` int32 ``[N * bits / 32, K / group]``, packed along N, with the same number added. A
weight is ``(q - zero) * scale``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import torch

from flashpte.export.common.errors import ExportError
from flashpte.export.weights.quantization_fields import Fields
from flashpte.export.weights.quantized import Grouped
from flashpte.export.weights.safetensors import Checkpoint
from flashpte.export.weights.stored_codes import (
    SCALES,
    HeldCodes,
    Linears,
    check_order,
    format_of,
    groups_of,
    natural,
    tensor,
    unpack_words,
    words_of,
)
from flashpte.kernels.linear.format import Groupwise

FORMAT = "pack-quantized"
PACKED, SCALE, SHAPE, ZERO, ORDER = (f"weight_{part}" for part in ("packed", "scale", "shape", "zero_point", "g_idx"))

_LINEAR_CLASSES = ("Linear", "LinearBase")


@dataclasses.dataclass(frozen=True)
class _Scheme:
    """What a config says about the layers that match one of ``targets``; a group of ``None`` is a row."""

    targets: tuple[str, ...]
    bits: int
    group: int | None
    symmetric: bool


def find(linears: Linears) -> dict[str, HeldCodes]:
    """The quantized weights of a folder, by their names; reads shapes and zero points, but no codes.

    Raises:
        ExportError: a field of the config is not served, or a tensor is missing or does not fit.
    """
    fields = linears.fields
    fields.nothing("kv_cache_scheme", "quantizes the KV cache, which is not served")
    fields.nothing("transform_config", "transforms weights and activations, which is not served")
    if fields.get("sparsity_config"):
        fields.part("sparsity_config").choice("format", ("dense",), "dense")
    groups, ignored = fields.part("config_groups"), fields.names("ignore")
    schemes = [_scheme(groups.part(name), fields.get("format")) for name in groups.values]
    found = {}
    for layer, shape in linears.shapes.items():
        if not linears.holds(layer, (PACKED, SCALE, SHAPE, ZERO)):
            continue
        names = _names(linears.checkpoint, layer)
        if any(_rank(names, one) is not None for one in ignored):
            fields.refuse("ignore", f"names {layer}, but the folder quantizes it")
        matching = [(rank, scheme) for scheme in schemes if (rank := _best(names, scheme)) is not None]
        if not matching:
            fields.refuse("config_groups", f"has no targets that match {layer}, but the folder quantizes it")
        scheme = min(matching, key=lambda match: match[0])[1]
        found[f"{layer}.weight"] = _layer(linears.checkpoint, layer, shape, scheme)
    return found


def _scheme(group: Fields, folder_format: object) -> _Scheme:
    for name in ("input_activations", "output_activations"):
        group.nothing(name, "quantizes activations, which is not served")
    weights = group.part("weights")
    weights.choice("type", ("int",), "int")
    bits = weights.choice("num_bits", (4, 8))
    given = group.get("format") or folder_format
    if given != FORMAT:
        group.refuse("format", f"is {given!r} here or for the whole folder; read is {FORMAT}")
    weights.choice("dynamic", (False,), False)
    # "weight" and "static" reorder columns only while they are quantized.
    if weights.get("actorder") not in (None, False, "weight", "static"):
        weights.refuse("actorder", f"is {weights.get('actorder')!r}: act-order is not served; quantize without it")
    size = weights.get("group_size")
    inferred = None if size is None else "channel" if size == -1 else "group"
    strategy = weights.choice("strategy", ("group", "channel"), inferred)
    row = strategy == "channel"
    return _Scheme(
        group.names("targets"), bits, None if row else weights.group(), weights.flag("symmetric", default=True)
    )


def _names(checkpoint: Checkpoint, layer: str) -> tuple[str, ...]:
    """A layer's names in the model and in the folder."""
    stored = (checkpoint.tensors.get(f"{layer}.{part}") for part in (PACKED, SCALE, SHAPE, ZERO))
    return (layer, *{one.name.rpartition(".")[0] for one in stored if one is not None})


def _rank(names: Sequence[str], target: str) -> int | None:
    """How closely a target matches: 0 by name, 1 by expression, 2 by class; ``None`` if it does not.

    Raises:
        ExportError: it is no regular expression.
    """
    if target.startswith("re:"):
        try:
            return 1 if any(re.match(target[3:], name) for name in names) else None
        except re.error as error:
            raise ExportError(f"quantization_config: {target!r} is not a regular expression ({error})") from error
    if target in names:
        return 0
    return 2 if target in _LINEAR_CLASSES else None


def _best(names: Sequence[str], scheme: _Scheme) -> int | None:
    """The closest match of a scheme's targets."""
    return min((rank for target in scheme.targets if (rank := _rank(names, target)) is not None), default=None)


def _layer(checkpoint: Checkpoint, layer: str, shape: tuple[int, int], scheme: _Scheme) -> HeldCodes:
    (rows, columns), bits, per_word = shape, scheme.bits, words_of(scheme.bits)
    packed, scale, sizes, zero, order = (f"{layer}.{part}" for part in (PACKED, SCALE, SHAPE, ZERO, ORDER))
    tensor(checkpoint, packed, (rows, -(-columns // per_word)), ("I32",))
    groups = groups_of(checkpoint, packed, columns, scheme.group)
    why = f", which {packed} needs"
    dtype = tensor(checkpoint, scale, (rows, groups), SCALES, why)
    tensor(checkpoint, sizes, (2,), ("I64", "I32"), why)
    assert dtype is not None
    if (said := checkpoint.read(sizes).tolist()) != list(shape):
        raise ExportError(f"tensor {sizes} of {checkpoint.folder} says {said}, the config asks for {list(shape)}")
    names = [packed, scale, sizes]
    if order in checkpoint.tensors:
        check_order(checkpoint, order, columns, scheme.group)
        names.append(order)
    symmetric = scheme.symmetric
    if not symmetric:
        tensor(checkpoint, zero, (-(-rows // per_word), groups), ("I32",), ": symmetric is false")
        symmetric = bool((_zeros(checkpoint, zero, rows, bits) == 1 << (bits - 1)).all())
        names.append(zero)
    elif zero in checkpoint.tensors:
        names.append(_nothing(checkpoint, zero, (rows, groups)))
    format = format_of(bits, scheme.group, columns, None if symmetric else "zeros", dtype)
    what = "a row" if scheme.group is None else f"groups of {scheme.group}"
    return HeldCodes(
        f"compressed-tensors, {bits} bits, {what}",
        format.name,
        tuple(names),
        lambda: _read(checkpoint, layer, columns, format),
    )


def _read(checkpoint: Checkpoint, layer: str, columns: int, format: Grouped) -> Groupwise:
    codes = unpack_words(checkpoint.read(f"{layer}.{PACKED}"), format.bits)[:, :columns]
    zeros = None
    if format.moved is not None:
        zeros = _zeros(checkpoint, f"{layer}.{ZERO}", codes.shape[0], format.bits)
    return natural(codes, (checkpoint.read(f"{layer}.{SCALE}"), zeros, None), format)


def _zeros(checkpoint: Checkpoint, name: str, rows: int, bits: int) -> torch.Tensor:
    """Zero points uint8 ``[N, G]``."""
    return unpack_words(checkpoint.read(name).t(), bits)[:, :rows].t()


def _nothing(checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> str:
    """The name of the zero points of a symmetric layer, which old releases stored.

    Raises:
        ExportError: they are not 0.
    """
    tensor(checkpoint, name, shape, ("I8",))
    if bool(checkpoint.read(name).any()):
        raise ExportError(f"tensor {name} of {checkpoint.folder} is not zero, but its config says symmetric: true")
    return name
