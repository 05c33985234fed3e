"""Removes nodes that a rewritten graph no longer needs."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Graph, Node

from flashpte.passes.graph.values import aten_target
from flashpte.passes.graph.vmap import changes_level

_ASSERT = torch.ops.aten._assert_tensor_metadata.default


def eliminate_dead_code(graph: Graph, kept: Collection[str] = (), dropped: Collection[Node] = ()) -> None:
    """Erases nodes that nothing reads, and metadata checks of tensors that nothing else reads.

    Two traps. Nothing reads a node that opens a level of ``vmap``, but without it the nodes inside raise.
    ``torch.export`` writes a metadata check next to each cast, which would keep a whole mask alive.

    Args:
        graph: the graph.
        kept: names of nodes that stay.
        dropped: nodes that are removed with their attention even though they count as impure.
    """

    def stays(node: Node) -> bool:
        # Treat every higher-order operator as having an effect. Writes in its body are not analyzed here.
        runs_body = isinstance(node.target, torch._ops.HigherOrderOperator)
        has_effect = node.is_impure() or runs_body or changes_level(node)
        return node.name in kept or (has_effect and node not in dropped)

    while True:
        graph.eliminate_dead_code(stays)
        unread = [node for node in graph.nodes if aten_target(node) is _ASSERT and _only_checked(node.args[0], kept)]
        if not unread:
            return
        for node in unread:
            graph.erase_node(node)


def readers(node: Node) -> list[Node]:
    """The users of a node, without the metadata checks that ``torch.export`` writes next to casts."""
    return [user for user in node.users if aten_target(user) is not _ASSERT]


def _only_checked(tensor: object, kept: Collection[str]) -> bool:
    if not isinstance(tensor, Node) or tensor.op != "call_function" or tensor.name in kept:
        return False
    return not readers(tensor)
