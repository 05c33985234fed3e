"""Brings attention that is written out into the form of a call: operands without copies and factors, one mask.

``run_decompositions()`` scales queries and keys by the root of the factor each, in float32 for 16-bit tensors, and
merges batch and heads by copies. A kernel reads the tensors as they were: factors become one, and the casts go where
the result is cast back, because that is how kernels compute.
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
from flashpte.passes.attention.written import Written, packet_of
from flashpte.passes.graph.aliasing import written_between
from flashpte.passes.graph.insert import call_before, size_argument
from flashpte.passes.graph.layouts import Layout, Layouts, moved_input, regrouped
from flashpte.passes.graph.values import same_size, val

aten = torch.ops.aten

# From here on a number that a mask puts in place of scores is the minimum of its dtype, which other masks may add to.
_MINIMUM = -1e38

Masks = dict[tuple, Node]


@dataclasses.dataclass(frozen=True)
class _Operand:
    origin: Origin
    factor: float
    dtype: torch.dtype


def call_of(written: Written, masks: Masks, constants: Mapping[str, torch.Tensor] | None = None) -> SdpaCall | str:
    """The call that stands for ``written``, or in one sentence why there is none; inserts views and a mask.

    Args:
        written: attention that is written out.
        masks: the masks that were put together so far: layers share them.
        constants: the values of placeholders that no run of the program changes, by name.
    """
    query, key = written.scores.args[1:3] if packet_of(written.scores) is aten.baddbmm else written.scores.args[:2]
    given = ((query, False), (key, True), (written.result.args[1], False))
    for node in dict.fromkeys((written.node, written.uncast)):
        # What is cast down behind the attention may have been cast up in front of it.
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
    scale = found[0].factor * found[1].factor
    if found[2].factor != 1.0:
        return "written out; its values are scaled"
    mask: Node | None = None
    kind = ""
    for step in written.steps:
        if step.kind == "scale":
            if mask is not None:
                return "written out; its scores are scaled after the mask"
            scale *= step.number
            continue
        if mask is not None and kind == "finite":
            return "written out; it has several masks, of which one hides scores by a finite number"
        assert step.tensor is not None
        aligned = _aligned(node, step.tensor, masks)
        mask, kind = _masked(node, mask, step.kind, aligned, step.number, step.flipped, masks, kind)
        if not kind:
            return "written out; it has several masks, of which one hides scores by a finite number"
    nodes = [operand.origin for operand in found]
    readers = {node for origin in nodes for node in (origin.source, *origin.chain)}
    readers |= {step.tensor for step in written.steps if step.tensor is not None}
    first = next(known for known in node.graph.nodes if known in readers or known is written.scores)
    if written_between(first, node, readers):
        return "written out; what it reads may be written to before its result is made"
    query, key, value = (origin.insert(node) for origin in nodes)
    grouped = any(origin.group > 1 for origin in nodes)
    return SdpaCall(node, query, key, value, mask, 0.0, False, scale, grouped)


def _operand(
    node: Node, swap: bool, result: Node, casts: bool, constants: Mapping[str, torch.Tensor] | None
) -> _Operand | None:
    """Where an argument of a product comes from; ``swap``: it is the transposed keys."""
    chain, factors, same = [node], [1.0], set()
    while True:
        current = chain[-1]
        source, factor = _unscaled(current)
        if source is None and casts:
            source = _upcast_source(current)
        if source is not None:
            same.add(current)
        else:
            source = moved_input(current)
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
    """A layout with the leading dimensions of the result, which a product may have merged."""
    if len(shape) == rank or len(shape) != 3:
        return layout
    return regrouped(layout, [*lead, *shape[-2:]])


def _unscaled(node: Node) -> tuple[Node | None, float]:
    """The tensor that ``node`` is a constant factor of, and that factor."""
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
    """The 16-bit tensor that ``node`` is in float32."""
    source = node.args[0] if packet_of(node) in (aten.to, aten._to_copy) else None
    if not isinstance(source, Node) or val(node).dtype != torch.float32 or val(source).device != val(node).device:
        return None
    return source if val(source).dtype in (torch.bfloat16, torch.float16) else None


def _aligned(anchor: Node, mask: Node, masks: Masks) -> Node:
    """A mask of merged batches of heads ``[B * H, L, S]`` with the dimensions of the result."""
    lead = val(anchor).shape[:-2]
    source = mask_source(mask)
    if val(source).dim() != 3 or len(lead) < 2 or same_size(val(source).shape[0], 1) or _is_of_heads(source, lead):
        return mask
    key = ("aligned", source, *(str(size) for size in lead))
    if key not in masks:
        rows = [size_argument(anchor, source, dim) for dim in (1, 2)]
        heads = [size if isinstance(size, int) else -1 for size in lead]
        masks[key] = call_before(anchor, aten.view.default, source, [*heads, *rows])
    return masks[key]


def _is_of_heads(mask: Node, lead: Sequence[int | torch.SymInt]) -> bool:
    """Whether a mask of three dimensions broadcasts along all leading dimensions but the heads."""
    return same_size(val(mask).shape[0], lead[-1]) and not all(same_size(size, 1) for size in lead[:-1])


def _masked(
    anchor: Node, mask: Node | None, kind: str, tensor: Node, number: float, flipped: bool, masks: Masks, before: str
) -> tuple[Node, str]:
    """The mask with one more step, and ``"bool"``, ``"float"`` or ``"finite"``; ``""`` where there is no such mask."""
    source = mask_source(tensor)
    key = (mask, kind, source, number, flipped)
    finite = kind == "keep" and number != float("-inf")
    after = "float" if kind == "add" or (mask is not None and before == "float") else "bool"
    if finite:
        after = "float" if number <= _MINIMUM else "finite"
        if after == "finite" and mask is not None and before == "float":
            return source, ""
    if key not in masks:
        masks[key] = _made(anchor, mask, kind, source, number, flipped, before)
    return masks[key], after


def _made(anchor: Node, mask: Node | None, kind: str, source: Node, number: float, flipped: bool, before: str) -> Node:
    device = val(source).device

    def constant(value: float) -> Node:
        return call_before(anchor, aten.full.default, [1], value, dtype=torch.float32, device=device, pin_memory=False)

    if kind == "add":
        if mask is None:
            return source
        if before == "bool":
            return call_before(anchor, aten.where.self, mask, source, constant(float("-inf")))
        return call_before(anchor, aten.add.Tensor, mask, source)
    shown = call_before(anchor, aten.logical_not.default, source) if flipped else source
    if number == float("-inf"):
        if mask is None:
            return shown
        if before == "bool":
            return call_before(anchor, aten.logical_and.default, mask, shown)
        return call_before(anchor, aten.where.self, shown, mask, constant(number))
    # A number that hides scores of float16 hides none of float32: only a row of nothing else tells, whatever it is.
    number = number if number <= _MINIMUM else torch.finfo(torch.float32).min
    if mask is None:
        mask = constant(0.0)
    elif before == "bool":
        mask = call_before(anchor, aten.where.self, mask, constant(0.0), constant(float("-inf")))
    return call_before(anchor, aten.where.self, shown, mask, constant(number))
