"""Shapes around attention that is written out: whether views keep its matrices, and which node is its result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from flashpte.passes.graph.layouts import Layouts, moved_input, regrouped
from flashpte.passes.graph.values import same_size, val
from flashpte.passes.graph.views import Kind, kind_of, packet_of

aten = torch.ops.aten


def same_sizes(a: torch.Size, b: torch.Size) -> bool:
    """Whether two shapes are known to be equal."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def same_matrix(source: Node, chain: Sequence[Node]) -> bool:
    """Whether the nodes after ``source`` keep rows, columns and the order of the matrices."""
    moving = [node for node in chain if moved_input(node) is not None]
    layout, shape = Layouts().through(source, moving), val(source).shape
    # Regrouping to the source's dimensions undoes what views split.
    again = None if layout is None else regrouped(layout, shape)
    last = val((moving or [source])[-1]).shape
    whole = [dim for dim, size in enumerate(shape) if not same_size(size, 1)]
    return (
        again is not None
        and [factors[0].dim for factors in again if factors] == whole
        and all(len(factors) < 2 for factors in again)
        and all(same_size(last[at], shape[at]) for at in (-2, -1))
    )


def outcome(result: Node, shape: torch.Size) -> tuple[Node, Node] | None:
    """The node to replace, and the result before a cast to 16 bits (the same node if there is none).

    ``shape`` is the shape of the softmax. Returns ``None`` if the result has other heads.
    """
    node, lead = result, shape[:-2]
    if not same_sizes(val(node).shape[:-2], lead):
        view = next(iter(node.users)) if len(node.users) == 1 else None
        if (
            view is None
            or kind_of(view) is not Kind.RESHAPE
            or not same_sizes(val(view).shape[:-2], lead)
            or not same_sizes(val(view).shape[-2:], val(node).shape[-2:])
        ):
            return None
        node = view
    cast = next(iter(node.users)) if len(node.users) == 1 else None
    if (
        cast is not None
        and kind_of(cast) is Kind.CAST
        and val(node).dtype == torch.float32
        and val(cast).dtype in (torch.bfloat16, torch.float16)
        and val(cast).device == val(node).device
    ):
        return _behind_copy(cast), node
    node = _behind_copy(node)
    return node, node


def _behind_copy(node: Node) -> Node:
    """The end of a ``permute -> clone -> permute`` that only changes the memory layout, or else the node itself."""
    chain = [node]
    while len(chain) < 4 and len(chain[-1].users) == 1:
        user = next(iter(chain[-1].users))
        if moved_input(user) is not chain[-1]:
            break
        chain.append(user)
        if len(chain) == 4:
            kinds = [packet_of(n) for n in chain[1:]]
            layout = Layouts().through(node, chain[1:])
            same = layout is not None and [f.dim for dim in layout for f in dim] == [
                dim for dim, size in enumerate(val(node).shape) if not same_size(size, 1)
            ]
            moved = kinds == [aten.permute, aten.clone, aten.permute]
            if moved and same and same_sizes(val(user).shape, val(node).shape):
                return user
    return node
