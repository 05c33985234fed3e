"""Learned sinks in attention that is written out: a column that joins the scores, and is dropped after the softmax.

A sink is one more score of each query head. It takes part in the softmax and has no value::

    joined = torch.cat((scores, sinks.reshape(1, -1, 1, 1).expand(B, -1, L, 1)), -1)
    weights = torch.softmax(joined - joined.max(-1, keepdim=True).values, -1)[..., :-1]

The column may also stand in front of the scores. The kernels take the numbers themselves, one per query head.

Two traps. The column must be the same for every row and batch entry: what it is made of says so, not its shape. And
subtracting the maximum changes nothing only if it is the maximum of these scores over their keys.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from flashpte.passes.attention.masks.operators import constant_of
from flashpte.passes.graph.layouts import Layouts, moved_input
from flashpte.passes.graph.planned import Value, planned
from flashpte.passes.graph.values import same_size, val
from flashpte.passes.graph.views import Kind, kind_of, packet_of

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Joined:
    """A column that joins the scores.

    Attributes:
        node: the scores and the column, ``[..., H, L, S + 1]``.
        scores: ``[..., H, L, S]``.
        column: ``[..., H, L, 1]``.
        in_front: whether the column stands to the left of the scores.
    """

    node: Node
    scores: Node
    column: Node
    in_front: bool


def joined_column(node: Node) -> Joined | None:
    """What ``node`` joins, if that is one column and some scores; otherwise ``None``."""
    if kind_of(node) is not Kind.JOIN or packet_of(node) is aten.stack:
        return None
    parts, rank = node.args[0], val(node).dim()
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(parts, (list, tuple)) or not isinstance(dim, int) or dim % rank != rank - 1 or len(parts) != 2:
        return None
    columns = [isinstance(part, Node) and same_size(val(part).shape[-1], 1) for part in parts]
    if columns not in ([False, True], [True, False]):
        return None
    scores, column = (parts[columns.index(of_column)] for of_column in (False, True))
    assert isinstance(scores, Node)
    assert isinstance(column, Node)
    return Joined(node, scores, column, columns[0])


def drops(node: Node, joined: Joined) -> bool:
    """Whether ``node`` is a slice of weights that keeps those of the scores and drops those of the column."""
    if kind_of(node) is not Kind.SLICE:
        return False
    source, kept = node.args[0], val(node)
    given: dict[str, Any] = dict(zip(("self", "dim", "start", "end", "step"), node.args, strict=False)) | dict(
        node.kwargs
    )
    dim, start = given.get("dim", 0), given.get("start")
    if given.get("step", 1) != 1:
        return False
    if not isinstance(source, Node) or not isinstance(dim, int) or dim % kept.dim() != kept.dim() - 1:
        return False
    if not same_size(kept.shape[-1], val(joined.scores).shape[-1]):
        return False
    return isinstance(start or 0, int) and (start or 0) == int(joined.in_front)


def shifted(node: Node) -> tuple[Node, Node] | None:
    """The scores from which ``node`` subtracts their own maximum over the last dimension, and that maximum.

    Subtracting the same number from a whole row leaves its softmax as it is. Returns ``None`` for any other node.
    """
    if packet_of(node) not in (aten.sub, aten.sub_) or len(node.args) != 2 or node.kwargs:
        return None
    scores, largest = node.args
    if not isinstance(scores, Node) or not isinstance(largest, Node):
        return None
    found = largest.args[0] if largest.target is operator.getitem and largest.args[1] == 0 else largest
    if not isinstance(found, Node) or packet_of(found) is not (aten.amax if found is largest else aten.max):
        return None
    given: dict[str, Any] = dict(zip(("self", "dim", "keepdim"), found.args, strict=False)) | dict(found.kwargs)
    dims = given.get("dim", ())
    last = val(scores).dim() - 1
    over_keys = [dim % (last + 1) for dim in ([dims] if isinstance(dims, int) else dims)] == [last]
    return (scores, found) if given["self"] is scores and given.get("keepdim") is True and over_keys else None


def sinks_of(
    joined: Joined, heads: int | torch.SymInt, constants: Mapping[str, torch.Tensor] | None = None
) -> tuple[Value, tuple[Node, ...]] | str:
    """The numbers of a column, planned as ``[H_q]``, and the nodes that make the column of them; or what is wrong.

    Args:
        joined: the column.
        heads: H_q, the size of the third dimension from the end.
        constants: the values of placeholders that are the same in every call, by name.
    """
    column = joined.column
    rank = val(column).dim()
    if rank < 4 or not isinstance(heads, int):
        return f"its sinks belong to scores of {rank} dimensions, whose heads are not told from their batch"
    number = constant_of(column, set())
    if isinstance(number, (int, float)):
        device, options = val(column).device, {"dtype": torch.float32, "pin_memory": False}
        return planned(aten.full.default, [heads], float(number), near=column, device=device, **options), ()
    chain: list[Node] = [column]
    while (source := _source(chain[-1])) is not None:
        chain.append(source)
    # The farthest source that fits needs the fewest operators of the program.
    for length in range(len(chain) - 1, -1, -1):
        layouts, behind = Layouts(constants), chain[:length][::-1]
        same = [node for node in behind if moved_input(node) is None]
        layout = layouts.through(chain[length], behind, same)
        if layout is None or layouts.read:
            continue
        source, own = chain[length], layout[-3]
        others = [factor.dim for dim, factors in enumerate(layout) if dim != rank - 3 for factor in factors]
        if any(dim is not None for dim in others):
            continue
        size = heads if own and own[0].dim is not None else 1
        if len(own) > 1 or val(source).numel() != size:
            continue
        flat = source if val(source).dim() == 1 else planned(aten.view.default, source, [size], near=source)
        return flat if size == heads else planned(aten.expand.default, flat, [heads], near=flat), tuple(behind)
    return "its sinks are not one number for each head, the same for every row"


def _source(node: Node) -> Node | None:
    """The tensor whose entries ``node`` rearranges or holds in a wider dtype."""
    moved = moved_input(node)
    if moved is None and kind_of(node) is Kind.CAST and isinstance(node.args[0], Node):
        source, widens = node.args[0], torch.promote_types(val(node.args[0]).dtype, val(node).dtype) == val(node).dtype
        if widens and val(source).dtype.is_floating_point and val(source).device == val(node).device:
            return source
    return moved if isinstance(moved, Node) else None
