"""GPTQ folders: codes of 4 or 8 bits as AutoGPTQ and GPTQModel pack them.

A linear layer ``[N, K]`` has ``qweight`` int32 ``[K * bits / 32, N]``, ``qzeros`` int32 ``[K / group, N * bits / 32]``,
``scales`` ``[K / group, N]`` and ``g_idx`` ``[K]``, the group of each column. A weight is ``(q - zero) * scale``.

``qzeros`` holds ``zero - 1``; with ``checkpoint_format: gptq_v2`` it holds ``zero``. GPTQModel subtracts from whole
words: a zero point of 0 borrows from the next one in its word, and adding to whole words gives it back. Act-order gives
neighboring columns different groups, which the packed format does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from flashpte.export.common.errors import ExportError
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

_SUBTRACTED = {"gptq": 1, "gptq_v2": 0}
"""What each format subtracts from a zero point before it stores it."""


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """The folder's numbers: bits, group size (``None``: a row), what is subtracted from zero points, and flags."""

    bits: int
    group: int | None
    subtracted: int
    symmetric: bool | None
    act_order: bool


def find(linears: Linears) -> dict[str, HeldCodes]:
    """The quantized weights of a GPTQ folder, by their names; reads zero points and groups, but no codes.

    Raises:
        ExportError: a field of the config is not served, or a tensor is missing or does not fit.
    """
    fields = linears.fields
    numbers = _Numbers(
        fields.choice("bits", (4, 8)),
        fields.group(),
        _SUBTRACTED[fields.either(("checkpoint_format", "format"), tuple(_SUBTRACTED), "gptq")],
        None if fields.get("sym") is None else fields.flag("sym", True),
        fields.flag("desc_act", False),
    )
    fields.choice("is_marlin_format", (False,), False)
    fields.choice("pack_dtype", ("int32",), "int32")
    fields.nothing("dynamic", "gives layers different numbers, which is not read")
    found = {}
    for layer, shape in linears.shapes.items():
        if linears.holds(layer, ("qweight", "qzeros", "scales", "g_idx")):
            found[f"{layer}.weight"] = _layer(linears, layer, shape, numbers)
    return found


def _layer(linears: Linears, layer: str, shape: tuple[int, int], numbers: _Numbers) -> HeldCodes:
    checkpoint, (rows, columns), bits = linears.checkpoint, shape, numbers.bits
    codes, zeros, scales, order = (f"{layer}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
    per_word = words_of(bits)
    if rows % per_word or columns % per_word:
        raise ExportError(f"{layer} is {rows} x {columns}, which {codes} cannot hold: words have {per_word} codes")
    tensor(checkpoint, codes, (columns // per_word, rows), ("I32",))
    groups = groups_of(checkpoint, codes, columns, numbers.group)
    why = f", which {codes} needs"
    dtype = tensor(checkpoint, scales, (groups, rows), SCALES, why)
    tensor(checkpoint, zeros, (groups, rows // per_word), ("I32",), why)
    assert dtype is not None
    names = [codes, zeros, scales]
    if order in checkpoint.tensors:
        check_order(checkpoint, order, columns, numbers.group)
        names.append(order)
    elif numbers.act_order:
        tensor(checkpoint, order, (columns,), ("I32",), ": quantization_config.desc_act is true")
    names += _empty_bias(linears, layer)
    middle = 1 << (bits - 1)
    symmetric = bool((checkpoint.read(zeros) == _repeated(middle - numbers.subtracted, bits)).all())
    if numbers.symmetric and not symmetric:
        raise ExportError(
            f"tensor {zeros} of {checkpoint.folder} holds zero points other than {middle}, but "
            "quantization_config.sym is true; is checkpoint_format right?"
        )
    format = format_of(bits, numbers.group, columns, None if symmetric else "zeros", dtype)
    kind = f"GPTQ, {bits} bits, {'a row' if numbers.group is None else f'groups of {numbers.group}'}"
    read = _reader(checkpoint, layer, format, numbers.subtracted)
    return HeldCodes(kind, format.name, tuple(names), read)


def _reader(checkpoint: Checkpoint, layer: str, format: Grouped, subtracted: int) -> Callable[[], Groupwise]:
    def read() -> Groupwise:
        bits = format.bits
        codes = unpack_words(checkpoint.read(f"{layer}.qweight").t(), bits)
        scales = checkpoint.read(f"{layer}.scales").t()
        if format.moved is None:
            return natural(codes, (scales, None, None), format)
        words = checkpoint.read(f"{layer}.qzeros") + _repeated(subtracted, bits)  # wraps
        zeros = unpack_words(words, bits).t()
        return natural(codes, (scales, zeros, None), format)

    return read


def _repeated(code: int, bits: int) -> int:
    """The int32 word that holds the same code everywhere."""
    word = sum(code << at for at in range(0, 32, bits))
    return word - (1 << 32) if word >> 31 else word


def _empty_bias(linears: Linears, layer: str) -> list[str]:
    """The name of a bias that the model does not have: AutoGPTQ stores one of zeros for each layer.

    Raises:
        ExportError: it is not zero.
    """
    name = f"{layer}.bias"
    if name not in linears.checkpoint.tensors or name in linears.tensors:
        return []
    if bool(linears.checkpoint.read(name).any()):
        raise ExportError(f"tensor {name} of {linears.checkpoint.folder} is not zero, but the model has no such bias")
    return [name]
