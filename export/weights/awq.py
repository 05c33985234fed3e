"""AWQ folders: 4-bit codes as AutoAWQ's ``gemm`` version packs them.

A linear layer ``[N, K]`` has ``qweight`` int32 ``[K, N / 8]``, ``qzeros`` int32 ``[K / group, N / 8]`` and ``scales``
``[K / group, N]``. A weight is ``(q - zero) * scale``. The eight codes of a word belong to eight rows of the weight, in
the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on.
"""

from __future__ import annotations

import torch

from flashpte.export.common.errors import ExportError
from flashpte.export.weights.quantized import Grouped
from flashpte.export.weights.safetensors import Checkpoint
from flashpte.export.weights.stored_codes import (
    SCALES,
    HeldCodes,
    Linears,
    format_of,
    groups_of,
    natural,
    tensor,
    unpack_words,
    words_of,
)
from flashpte.kernels.linear.format import Groupwise

BITS = 4
_PLACE = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
"""Where in its word row ``j`` of eight is."""
_ALL_EIGHTS = -0x77777778  # 0x88888888 as int32: eight zero points of 8


def find(linears: Linears) -> dict[str, HeldCodes]:
    """The quantized weights of an AWQ folder, by their names; reads zero points, but no codes.

    Raises:
        ExportError: a field of the config is not served, or a tensor is missing or does not fit.
    """
    checkpoint, fields = linears.checkpoint, linears.fields
    fields.choice("bits", (BITS,), BITS)
    fields.either(("version", "format"), ("gemm",), "gemm")
    fields.choice("pack_dtype", ("int32",), "int32")
    fields.nothing("dynamic", "gives layers different numbers, which is not read")
    group, has_zeros = fields.group(), fields.flag("zero_point", True)
    kept = fields.names("modules_to_not_convert")
    found = {}
    for layer, shape in linears.shapes.items():
        if not linears.holds(layer, ("qweight", "qzeros", "scales")):
            continue
        if excluded := [part for part in kept if f".{part}." in f".{layer}."]:
            fields.refuse("modules_to_not_convert", f"names {excluded[0]}, but the folder quantizes {layer}")
        held = _layer(checkpoint, layer, shape, group)
        if not has_zeros and held.format is not None and "-z" in held.format:
            raise ExportError(
                f"tensor {layer}.qzeros of {checkpoint.folder} holds zero points other than 8, but "
                "quantization_config.zero_point is false"
            )
        found[f"{layer}.weight"] = held
    return found


def _layer(checkpoint: Checkpoint, layer: str, shape: tuple[int, int], group: int | None) -> HeldCodes:
    rows, columns = shape
    codes, zeros, scales = (f"{layer}.{part}" for part in ("qweight", "qzeros", "scales"))
    if rows % words_of(BITS):
        raise ExportError(f"{layer} has {rows} outputs, which {codes} cannot hold: words have {words_of(BITS)} codes")
    words = rows // words_of(BITS)
    tensor(checkpoint, codes, (columns, words), ("I32",))
    groups = groups_of(checkpoint, codes, columns, group)
    why = f", which {codes} needs"
    dtype = tensor(checkpoint, scales, (groups, rows), SCALES, why)
    tensor(checkpoint, zeros, (groups, words), ("I32",), why)
    assert dtype is not None
    symmetric = bool((checkpoint.read(zeros) == _ALL_EIGHTS).all())
    format = format_of(BITS, group, columns, None if symmetric else "zeros", dtype)
    kind = f"AWQ, {BITS} bits, {'a row' if group is None else f'groups of {group}'}"
    return HeldCodes(kind, format.name, (codes, zeros, scales), lambda: _read(checkpoint, layer, format))


def _read(checkpoint: Checkpoint, layer: str, format: Grouped) -> Groupwise:
    codes = _rows(checkpoint.read(f"{layer}.qweight"))
    zeros = None if format.moved is None else _rows(checkpoint.read(f"{layer}.qzeros"))
    return natural(codes, (checkpoint.read(f"{layer}.scales").t(), zeros, None), format)


def _rows(words: torch.Tensor) -> torch.Tensor:
    """Words int32 ``[C, N / 8]`` as uint8 ``[N, C]``."""
    return unpack_words(words, BITS).unflatten(1, (-1, 8))[..., _PLACE].flatten(1).t()
