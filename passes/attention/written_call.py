"""Turns attention that is written out into a call: operands without copies and factors, and a single mask.

``run_decompositions()`` scales queries and keys each by the square root of the factor, in float32 for 16-bit tensors,
and merges batch and heads by copies. A kernel reads the original tensors. The factors are multiplied into one. Casts to
float32 are dropped if the result is cast back to 16 bits, because the kernels compute that way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch.fx import Node

from flashpte.passes.attention.call import SdpaCall
from flashpte.passes.attention.forms import mask_source
from flashpte.passes.attention.masks.operators import constant_of
from flashpte.passes.attention.recover_gqa import Origin, origin_from
from flashpte.passes.attention.written import Step, Written
from flashpte.passes.attention.written_sinks import sinks_of
from flashpte.passes.graph.aliasing import written_between
from flashpte.passes.graph.layouts import Layout, Layouts, moved_input, regrouped
from flashpte.passes.graph.planned import Value, nodes_of, planned, planned_size
from flashpte.passes.graph.values import same_size, val
from flashpte.passes.graph.views import packet_of

aten = torch.ops.aten

# A masked score at or below this number is its dtype's minimum, and another mask may be added to it.
_MINIMUM = -1e38


@dataclasses.dataclass(frozen=True)
class _Operand:
    origin: Origin
    factor: float
    dtype: torch.dtype


def call_of(written: Written, constants: Mapping[str, torch.Tensor] | None = None) -> SdpaCall | str:
    """The call that is equivalent to ``written``, with planned views and mask; or one sentence that says why none is.

    Args:
        written: attention that is written out.
        constants: the values of placeholders that are the same in every call, by name.
    """
    query, key = written.scores.args[1:3] if packet_of(written.scores) is aten.baddbmm else written.scores.args[:2]
    given = ((query, False), (key, True), (written.result.args[1], False))
    for node in dict.fromkeys((written.node, written.uncast)):
        # If the result is cast down, the operands may have been cast up.
        casts = node is not written.uncast
        operands = [_operand(tensor, swap, node, casts, constants) for tensor, swap in given]  # type: ignore[arg-type]
        found = [operand for operand in operands if operand is not None]
        if len(found) < len(operands):
            return "written out; its operands are not the matrices of its heads"
        if {operand.dtype for operand in found} == {val(node).dtype}:
            break
    else:
        dtypes = ", ".join(str(operand.dtype) for operand in found)
        return f"written out; dtypes {dtypes}, and {val(written.node).dtype} of the result"
    scores = _scores(written.steps, found[0].factor * found[1].factor)
    if isinstance(scores, str):
        return f"written out; {scores}"
    scale, softcap = scores
    if found[2].factor != 1.0:
        return "written out; its values are scaled"
    mask: Value | None = None
    kind = ""
    for step in written.steps:
        if step.tensor is None:
            continue
        if mask is not None and kind == "finite":
            return "written out; it has several masks, one of which hides scores by a finite number"
        aligned = _aligned(node, step.tensor)
        mask, kind = _masked(mask, step.kind, aligned, step.number, step.flipped, kind)
        if not kind:
            return "written out; it has several masks, one of which hides scores by a finite number"
    sinks: Value | None = None
    made: tuple[Node, ...] = ()
    if written.joined is not None:
        given_sinks = sinks_of(written.joined, val(node).shape[-3] if val(node).dim() > 2 else 1, constants)
        if isinstance(given_sinks, str):
            return f"written out; {given_sinks}"
        sinks, made = given_sinks
    nodes = [operand.origin for operand in found]
    if _may_be_written(written, node, nodes) or (
        sinks is not None and _sinks_may_be_written(written, node, sinks, made)
    ):
        return "written out; what it reads may be written to before its result is made"
    q, k, v = (origin.planned() for origin in nodes)
    grouped = any(origin.group > 1 for origin in nodes)
    return SdpaCall(node, q, k, v, mask, 0.0, False, scale, grouped, softcap, sinks)


def _may_be_written(written: Written, result: Node, origins: Sequence[Origin]) -> bool:
    """Whether an operand or a mask may be written between the place where the products read it and ``result``."""
    products = (written.scores, written.scores, written.result)
    for origin, product in zip(origins, products, strict=True):
        if origin.may_be_written(result):
            return True
        if product is not result and written_between(product, result, set(nodes_of(origin.source))):
            return True
    masks = [step.tensor for step in written.steps if step.tensor is not None]
    return any(written_between(mask, result, {mask}) for mask in masks)


def _sinks_may_be_written(written: Written, result: Node, sinks: Value, made: Sequence[Node]) -> bool:
    """Whether sinks may be written after ``made``, the nodes that make a column of them, began to read them."""
    assert written.joined is not None
    start = made[0] if made else written.joined.node
    return written_between(start, result, {*nodes_of(sinks), *made})


def _scores(steps: Sequence[Step], scale: float) -> tuple[float, float] | str:
    """The scale of the scores and their softcap (0 for none), given the product's own scale; or why they have none.

    ``b tanh(a s)`` is a softcap of ``|b|`` on scores with the scale ``a b``, because tanh is odd.
    """
    kinds = [step.kind for step in steps]
    masked = next((place for place, kind in enumerate(kinds) if kind in ("add", "keep")), len(kinds))
    if "tanh" in kinds[masked:]:
        return "a softcap (tanh) is applied to its masked scores"
    if "scale" in kinds[masked:]:
        return "its scores are scaled after the mask"
    limit: float | None = None
    for step in steps[:masked]:
        if step.kind == "tanh" and limit is not None:
            return "it has several softcaps (tanh)"
        if step.kind == "tanh":
            limit = 1.0
        elif limit is None:
            scale *= step.number
        else:
            limit *= step.number
    return (scale, 0.0) if limit is None else (scale * limit, abs(limit))


def _operand(
    node: Node, swap: bool, result: Node, casts: bool, constants: Mapping[str, torch.Tensor] | None
) -> _Operand | None:
    """The origin of an argument of a product. ``swap`` marks the transposed keys."""
    chain, factors, same = [node], [1.0], set()
    while True:
        current = chain[-1]
        unscaled, factor = _unscaled(current)
        if unscaled is None and casts:
            unscaled = _upcast_source(current)
        if unscaled is not None:
            same.add(current)
        source = moved_input(current) if unscaled is None else unscaled
        if not isinstance(source, Node):
            break
        chain.append(source)
        factors.append(factors[-1] * factor)
    lead, rank = val(result).shape[:-2], val(result).dim()
    best: _Operand | None = None
    for length in range(len(chain)):
        layouts, behind = Layouts(constants), chain[:length][::-1]
        layout = layouts.through(chain[length], behind, same)
        placed = None if layout is None else _in_lead(layout, val(node).shape, lead, rank)
        if placed is None:
            continue
        if swap:
            placed = (*placed[:-2], placed[-1], placed[-2])
        origin = origin_from(chain[length], behind, placed, layouts.read)
        if origin is None:
            continue
        last = origin.dims[-1]
        unit = last is not None and same_size(val(origin.source).stride(last), 1)
        if best is None or unit or casts:
            best = _Operand(origin, factors[length], val(origin.source).dtype)
    return best


def _in_lead(
    layout: Layout, shape: Sequence[int | torch.SymInt], lead: Sequence[int | torch.SymInt], rank: int
) -> Layout | None:
    """The layout with the leading dimensions of the result, which a product may have merged."""
    if len(shape) == rank or len(shape) != 3:
        return layout
    return regrouped(layout, [*lead, *shape[-2:]])


def _unscaled(node: Node) -> tuple[Node | None, float]:
    """The tensor and the constant factor whose product ``node`` is; ``None`` and 1 if it is no such product."""
    packet, args = packet_of(node), node.args
    if packet in (aten.mul, aten.div) and len(args) == 2:
        number = constant_of(args[1], set())
        scaled = args[0]
        if not isinstance(number, (int, float)) or number == 0 or not isinstance(scaled, Node):
            return None, 1.0
        if val(scaled).dtype == val(node).dtype and val(scaled).dim() == val(node).dim():
            return scaled, float(number) if packet is aten.mul else 1.0 / number
    return None, 1.0


def _upcast_source(node: Node) -> Node | None:
    """The 16-bit tensor that ``node`` casts to float32; ``None`` if it does not."""
    source = node.args[0] if packet_of(node) in (aten.to, aten._to_copy) else None
    if not isinstance(source, Node) or val(node).dtype != torch.float32 or val(source).device != val(node).device:
        return None
    return source if val(source).dtype in (torch.bfloat16, torch.float16) else None


def _aligned(anchor: Node, mask: Node) -> Value:
    """The mask with the dimensions of the result, if it is ``[B * H, L, S]`` with batch and heads merged."""
    lead = val(anchor).shape[:-2]
    source = mask_source(mask)
    if val(source).dim() != 3 or len(lead) < 2 or same_size(val(source).shape[0], 1) or _is_of_heads(source, lead):
        return mask
    rows = [planned_size(source, dim) for dim in (1, 2)]
    heads = [size if isinstance(size, int) else -1 for size in lead]
    return planned(aten.view.default, source, [*heads, *rows], near=source)


def _is_of_heads(mask: Value, lead: Sequence[int | torch.SymInt]) -> bool:
    """Whether a 3-dimensional mask broadcasts along all leading dimensions except the heads."""
    return same_size(val(mask).shape[0], lead[-1]) and not all(same_size(size, 1) for size in lead[:-1])


def _masked(
    mask: Value | None, kind: str, tensor: Value, number: float, flipped: bool, before: str
) -> tuple[Value, str]:
    """The mask with one more step, and its kind ``"bool"``, ``"float"`` or ``"finite"``; ``""`` if impossible."""
    source = mask_source(tensor)
    finite = kind == "keep" and number != float("-inf")
    after = "float" if kind == "add" or (mask is not None and before == "float") else "bool"
    if finite:
        after = "float" if number <= _MINIMUM else "finite"
        if after == "finite" and mask is not None and before == "float":
            return source, ""
    return _planned_mask(mask, kind, source, number, flipped, before), after


def _planned_mask(mask: Value | None, kind: str, source: Value, number: float, flipped: bool, before: str) -> Value:
    device = val(source).device

    def constant(value: float) -> Value:
        return planned(aten.full.default, [1], value, near=source, dtype=torch.float32, device=device, pin_memory=False)

    if kind == "add":
        if mask is None:
            return source
        if before == "bool":
            return planned(aten.where.self, mask, source, constant(float("-inf")), near=source)
        return planned(aten.add.Tensor, mask, source, near=source)
    shown = planned(aten.logical_not.default, source, near=source) if flipped else source
    if number == float("-inf"):
        if mask is None:
            return shown
        if before == "bool":
            return planned(aten.logical_and.default, mask, shown, near=source)
        return planned(aten.where.self, shown, mask, constant(number), near=source)
    # float16's minimum would not hide float32 scores, so use float32's. Only a fully masked row could tell, and it is
    # the mean of the values for any finite number.
    number = number if number <= _MINIMUM else torch.finfo(torch.float32).min
    if mask is None:
        mask = constant(0.0)
    elif before == "bool":
        mask = planned(aten.where.self, mask, constant(0.0), constant(float("-inf")), near=source)
    return planned(aten.where.self, shown, mask, constant(number), near=source)
