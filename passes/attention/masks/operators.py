"""The operators that a proof about a mask understands, and what the graph says about their arguments."""

from __future__ import annotations

from typing import Any

import torch

from flashpte.passes.attention.masks.constants import Constants
from flashpte.passes.attention.masks.operands import is_cast, view_source
from flashpte.passes.graph.planned import Value
from flashpte.passes.graph.values import aten_target, val

aten = torch.ops.aten

AND = {aten.bitwise_and.Tensor, aten.logical_and.default, aten.mul.Tensor, aten.__and__.Tensor}
OR = {aten.bitwise_or.Tensor, aten.logical_or.default, aten.__or__.Tensor}
NOT = {aten.bitwise_not.default, aten.logical_not.default}
COMPARISONS = {
    aten.le.Tensor: "le",
    aten.le.Scalar: "le",
    aten.lt.Tensor: "lt",
    aten.lt.Scalar: "lt",
    aten.ge.Tensor: "ge",
    aten.ge.Scalar: "ge",
    aten.gt.Tensor: "gt",
    aten.gt.Scalar: "gt",
    aten.eq.Tensor: "eq",
    aten.eq.Scalar: "eq",
    aten.ne.Tensor: "ne",
    aten.ne.Scalar: "ne",
}
WHERE = {aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf}
FILL = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
ADD = {aten.add.Tensor, aten.add.Scalar}
SUB = {aten.sub.Tensor, aten.sub.Scalar}
MUL = {aten.mul.Tensor, aten.mul.Scalar}
ARANGES = {aten.arange.default, aten.arange.start, aten.arange.start_step}
TRIL, TRIU = {aten.tril.default}, {aten.triu.default}
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
CONSTANTS = {
    aten.full.default: lambda n: n.args[1],
    aten.full_like.default: lambda n: n.args[1],
    aten.new_full.default: lambda n: n.args[2],
    aten.scalar_tensor.default: lambda n: n.args[0],
    aten.zeros.default: lambda n: 0,
    aten.zeros_like.default: lambda n: 0,
    aten.new_zeros.default: lambda n: 0,
    aten.ones.default: lambda n: 1,
    aten.ones_like.default: lambda n: 1,
    aten.new_ones.default: lambda n: 1,
}


def constant_of(value: Any, looked_at: set[Value], constants: Constants | None = None) -> int | float | bool | None:
    """The number that all entries of an argument are equal to, if the graph says so; otherwise ``None``.

    Adds the nodes that say so to ``looked_at``. ``constants`` are the tensors with known content. Without them, only
    constants that the graph itself creates are known.
    """
    constants = constants or Constants()
    chain = []
    while isinstance(value, Value) and aten_target(value) not in CONSTANTS and constants.only_entry(value) is None:
        if view_source(value) is None and not is_cast(value):
            return None
        chain.append(value)
        value = value.args[0]
    if not isinstance(value, Value):
        return value if isinstance(value, (int, float, bool)) and not chain else None
    number = constants.only_entry(value)
    if number is None:
        number = CONSTANTS[aten_target(value)](value)
    if not isinstance(number, (int, float, bool)):
        return None
    chain.append(value)
    looked_at.update(chain)
    try:
        # A cast may change the number: 300 is 44 as uint8, and True as bool.
        tensor = torch.full((), number, dtype=val(chain[-1]).dtype)
    except RuntimeError:
        return None
    for node in reversed(chain):
        tensor = tensor.to(val(node).dtype)
    return tensor.item()


def compared_exactly(a: Any, b: Any) -> bool:
    """Whether the common dtype of a comparison can hold every value of both sides."""
    values = [val(v) if isinstance(v, Value) and isinstance(v.meta.get("val"), torch.Tensor) else v for v in (a, b)]
    if any(isinstance(v, Value) for v in values):
        return False
    common = torch.result_type(*values)
    if common == torch.int64 or common not in INTEGERS:
        return True  # other dtypes are rejected where they are read
    limits = torch.iinfo(common)
    return all(
        value.dtype == common if isinstance(value, torch.Tensor) else limits.min <= value <= limits.max
        for value in values
    )
