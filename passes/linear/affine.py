"""Recovers the codes, scales and zero points of a weight that the program dequantizes.

A weight ``[N, K]`` is quantized if the program computes it from one integer tensor by casts, views and affine
arithmetic: ``q * a + b``, with ``a`` and ``b`` equal within groups of columns. :func:`quantized_weight` follows the
graph from the weight down to that tensor, carries ``a`` and ``b`` along as tensors of the same shape, and in the end
compares ``q * a + b`` with what the program computes. So it does not depend on how the arithmetic is spelled, and a
wrong reading ends in a refusal, not in wrong numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

from flashpte.kernels.linear.format import GROUPS
from flashpte.passes.graph.values import val
from flashpte.passes.graph.views import Kind, kind_of, packet_of
from flashpte.passes.linear.known import Known

aten = torch.ops.aten
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LAYOUT = (Kind.SAME, Kind.RESHAPE, Kind.EXPAND, Kind.PERMUTE, Kind.TRANSPOSE, Kind.SLICE, Kind.SELECT)
# The result of a product is rounded to the weight's dtype: two units in the last place of bfloat16.
_RELATIVE = 2.0**-7
# Zero points that float32 arithmetic leaves this close to an integer are that integer.
_WHOLE = 1e-4


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """``weight[n, k] = (codes[n, k] - zeros[n, k // group]) * scales[n, k // group]``.

    Attributes:
        codes: uint8 ``[N, K]``, below ``2 ** bits``.
        scales: float32 ``[N, K / group]``.
        zeros: float32 ``[N, K / group]``; ``None`` if each is ``2 ** (bits - 1)``, which makes the codes symmetric.
        bits: 4 or 8.
        group: columns that share a scale.
        source: the node that holds the codes, perhaps in another layout.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int
    group: int
    source: Node


class NotQuantized(Exception):
    """Says why a weight cannot be read as codes, scales and zero points."""


def quantized_weight(node: Node, transposed: bool, known: Known) -> QuantizedWeight:
    """Reads the weight that a known node computes.

    Args:
        node: computes ``[N, K]``, or ``[K, N]`` if ``transposed``.
        transposed: see ``node``.
        known: values of the graph.

    Raises:
        NotQuantized: it is not quantized, or not in a form that the kernels take; the text says why.
    """
    path = list(_path(node, known))
    source = path[-1].node
    codes = known.value(source)
    slope, offset = torch.ones((), dtype=torch.float32), torch.zeros((), dtype=torch.float32)
    slope, offset = slope.expand(codes.shape), offset.expand(codes.shape)
    for step in reversed(path[:-1]):
        codes, slope, offset = step.carry(codes, slope, offset)
    if transposed:
        codes, slope, offset = (tensor.t() for tensor in (codes, slope, offset))
    weight = known.value(node)
    weight = weight.t() if transposed else weight
    low, high = int(codes.min()), int(codes.max())
    bits, lowest = _range(low, high)
    group = _group(slope, offset, bits)
    scales = slope[:, ::group].contiguous()
    codes = (codes.to(torch.int16) - lowest).to(torch.uint8).contiguous()
    safe = torch.where(scales == 0, 1.0, scales)
    zeros = torch.where(scales == 0, 2.0 ** (bits - 1), -offset[:, ::group] / safe - lowest)
    whole = zeros.round()
    zeros = torch.where((zeros - whole).abs() < _WHOLE, whole, zeros)
    _compare(weight, codes, scales, zeros, group)
    symmetric = bool((zeros == 2 ** (bits - 1)).all())
    return QuantizedWeight(codes, scales, None if symmetric else zeros, bits, group, source)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One node on the way from the weight to its codes, and what it does to codes, slope and offset."""

    node: Node
    carry: Callable[[Any, Any, Any], tuple[Any, Any, Any]]


def _path(node: Node, known: Known) -> Iterator[_Step]:
    """The nodes from a weight down to the integer tensor that it is computed from."""
    while True:
        value = val(node)
        packet, kind = packet_of(node), kind_of(node)
        if not value.dtype.is_floating_point:
            if value.dtype not in _INTEGERS:
                raise NotQuantized(f"it is computed from {value.dtype} numbers")
            if packet in (aten.sub, aten.add) and _larger_operand(node) is not None:
                step, node = _arithmetic(node, known)  # zero points that are subtracted from the codes as integers
                yield step
                continue
            yield _Step(node, lambda q, a, b: (q, a, b))
            return
        if value.dtype not in _FLOATS:
            raise NotQuantized(f"it is rounded to {_short(value.dtype)}")
        if node.op != "call_function":
            raise NotQuantized(f"it is {_short(value.dtype)}, not quantized")
        if kind is Kind.CAST:
            yield _Step(node, lambda q, a, b: (q, a, b))
            node = node.args[0]  # type: ignore[assignment]
        elif kind in _LAYOUT:
            yield _Step(node, _moved(node, known))
            node = node.args[0]  # type: ignore[assignment]
        elif packet in _ARITHMETIC:
            step, node = _arithmetic(node, known)
            yield step
        elif (name := str(packet)) in _DEQUANTIZE:
            yield _Step(node, _dequantized(node, known, _DEQUANTIZE[name]))
            node = node.args[0]  # type: ignore[assignment]
        else:
            raise NotQuantized(f"it is computed by {packet}")


def _moved(node: Node, known: Known) -> Callable[..., tuple[Any, Any, Any]]:
    reshapes = kind_of(node) is Kind.RESHAPE

    def move(tensor: torch.Tensor) -> torch.Tensor:
        args, kwargs = known.arguments(node)
        # Slope and offset may have other strides than the codes, for which the program's view would be none.
        tensor = tensor.contiguous() if reshapes else tensor
        return node.target(tensor, *args[1:], **kwargs)  # type: ignore[operator]

    return lambda q, a, b: (move(q), move(a), move(b))


_ARITHMETIC = (aten.mul, aten.div, aten.add, aten.sub, aten.rsub, aten.neg)


def _arithmetic(node: Node, known: Known) -> tuple[_Step, Node]:
    """A step that multiplies by or adds something known, and the operand that holds the codes."""
    packet, args = packet_of(node), list(node.args[:2])
    if packet is aten.neg:
        return _Step(node, lambda q, a, b: (q, -a, -b)), args[0]  # type: ignore[return-value]
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
        raise NotQuantized(f"it is computed by {packet} with options")
    codes = _larger_operand(node)
    if codes is None:
        raise NotQuantized(f"{packet} combines two tensors of {list(val(node).shape)}")
    side = args.index(codes)
    other = args[1 - side]
    number = known.value(other) if isinstance(other, Node) else other
    number = torch.as_tensor(number).to(torch.float32)
    shape = val(node).shape

    def carry(q: Any, a: Any, b: Any) -> tuple[Any, Any, Any]:
        q, a, b = (tensor.expand(shape) for tensor in (q, a, b))
        if packet is aten.mul:
            return q, a * number, b * number
        if packet is aten.div and side == 0:
            return q, a / number, b / number
        if packet is aten.add:
            return q, a, b + number
        if (packet is aten.sub) == (side == 0) and packet is not aten.div:
            return q, a, b - number
        if packet in (aten.sub, aten.rsub):
            return q, -a, number - b
        raise NotQuantized("its codes are a divisor")

    return _Step(node, carry), codes


def _larger_operand(node: Node) -> Node | None:
    """The operand with more numbers than the other, which is a scale or zero point; ``None`` if they have as many."""
    sizes = [val(arg).numel() if isinstance(arg, Node) and _is_tensor(arg) else 1 for arg in node.args[:2]]
    if sizes[0] == sizes[1]:
        return None
    larger = node.args[sizes.index(max(sizes))]
    return larger if isinstance(larger, Node) else None


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


class Codes:
    """Which nodes are computed from integers by casts, views and arithmetic, so that they may be quantized weights."""

    def __init__(self) -> None:
        self._held: dict[Node, bool] = {}

    def held_by(self, node: Node) -> bool:
        """Whether a node may hold codes. No recursion, and each node is looked at once."""
        pending = [node]
        while pending:
            top = pending[-1]
            sources = [] if top in self._held else _followed(top)
            missing = [source for source in sources if source not in self._held]
            if missing:
                pending += missing
                continue
            pending.pop()
            if top not in self._held:
                integers = _is_tensor(top) and val(top).dtype in _INTEGERS and val(top).dim() > 1
                self._held[top] = integers or any(self._held[source] for source in sources)
        return self._held[node]


def _followed(node: Node) -> list[Node]:
    """The operands that may hold the codes of a node's result."""
    if node.op != "call_function" or not _is_tensor(node) or not val(node).dtype.is_floating_point:
        return []
    kind, packet = kind_of(node), packet_of(node)
    if packet in _ARITHMETIC:
        return [arg for arg in node.args[:2] if isinstance(arg, Node)]
    if kind is Kind.CAST or kind in _LAYOUT or str(packet) in _DEQUANTIZE:
        return [arg for arg in node.args[:1] if isinstance(arg, Node)]
    return []


def _blocks(node: Node, known: Known) -> tuple[Any, Any, list[int]]:
    """Scale, zero point and block sizes of ``torchao.dequantize_affine``."""
    block: Any = node.args[1]
    return node.args[2], node.args[3] if len(node.args) > 3 else None, list(block)


def _per_group(node: Node, known: Known) -> tuple[Any, Any, list[int]]:
    """The same of ``quantized_decomposed.dequantize_per_channel_group``."""
    return node.args[1], node.args[2], [1, int(node.args[6])]  # type: ignore[arg-type]


def _per_channel(node: Node, known: Known) -> tuple[Any, Any, list[int]]:
    """The same of ``quantized_decomposed.dequantize_per_channel``."""
    shape = list(val(node).shape)
    axis = int(node.args[3]) % len(shape)  # type: ignore[arg-type]
    return node.args[1], node.args[2], [1 if d == axis else int(size) for d, size in enumerate(shape)]


_DEQUANTIZE = {
    "torchao.dequantize_affine": _blocks,
    "quantized_decomposed.dequantize_per_channel_group": _per_group,
    "quantized_decomposed.dequantize_per_channel": _per_channel,
}


def _dequantized(node: Node, known: Known, parts: Callable[..., Any]) -> Callable[..., tuple[Any, Any, Any]]:
    scale, zero, block = parts(node, known)
    shape = list(val(node).shape)

    def spread(number: Any) -> torch.Tensor:
        tensor = known.value(number) if isinstance(number, Node) else number
        tensor = torch.as_tensor(tensor).to(torch.float32)
        tensor = tensor.reshape([size // each for size, each in zip(shape, block, strict=True)])
        for dim, each in enumerate(block):
            tensor = tensor.repeat_interleave(each, dim)
        return tensor

    def carry(q: Any, a: Any, b: Any) -> tuple[Any, Any, Any]:
        scales = spread(scale)
        return q, a * scales, (b - spread(zero) if zero is not None else b) * scales

    return carry


def _range(low: int, high: int) -> tuple[int, int]:
    """Bits of codes between ``low`` and ``high``, and the smallest code of those bits."""
    for bits in (4, 8):
        half = 2 ** (bits - 1)
        if -half <= low and high < half:
            return bits, -half
        if low >= 0 and high < 2 * half:
            return bits, 0
    raise NotQuantized(f"its codes go from {low} to {high}, which 8 bits do not hold")


def _group(slope: torch.Tensor, offset: torch.Tensor, bits: int) -> int:
    """The largest group that the kernels take in which all columns share slope and offset."""
    k, widest_first = slope.shape[1], GROUPS[::-1]
    for group in (k, *widest_first) if bits == 8 else widest_first:
        if k % group == 0 and all(_equal_in(tensor, group) for tensor in (slope, offset)):
            return group
    raise NotQuantized(f"its scales are not shared by groups of 32, 64 or 128 of {k} columns")


def _equal_in(tensor: torch.Tensor, group: int) -> bool:
    grouped = tensor.reshape(tensor.shape[0], -1, group)
    return bool((grouped == grouped[..., :1]).all())


def _compare(weight: torch.Tensor, codes: Any, scales: Any, zeros: Any, group: int) -> None:
    """Raises unless the weight is what codes, scales and zero points say, within its own rounding."""
    n, k = codes.shape
    grouped = codes.reshape(n, k // group, group).to(torch.float32)
    read = ((grouped - zeros[..., None]) * scales[..., None]).reshape(n, k)
    # Where the program subtracts rounded products, it may be off by more than its result's rounding. A wrong code is
    # off by a whole step.
    allowed = torch.maximum(_RELATIVE * read.abs(), scales.abs().repeat_interleave(group, 1)[:, :k] / 8)
    weight = weight.to(torch.float32)
    difference = (weight - read).abs()
    few = difference.norm() <= _RELATIVE * weight.norm()  # codes of two bits are coarse: a step is most of the weight
    if not (bool((difference <= allowed).all()) and bool(few)):
        raise NotQuantized("the program computes other values than its codes, scales and zero points give")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
