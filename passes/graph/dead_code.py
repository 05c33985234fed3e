"""Removes what a rewritten graph no longer needs."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Graph, Node

from flashpte.passes.graph.values import aten_target
from flashpte.passes.graph.vmap import changes_level

_ASSERT = torch.ops.aten._assert_tensor_metadata.default


def eliminate_dead_code(graph: Graph, kept: Collection[str] = (), dropped: Collection[Node] = ()) -> None:
    """Erases nodes that nothing reads, and checks of the metadata of a tensor that nothing else reads.

    The traps: nothing reads what opens a level of ``vmap``, and without it the nodes inside of it raise; and
    ``torch.export`` writes a check beside each cast, which would keep a whole mask alive.

    Args:
        graph: the graph.
        kept: names of nodes that stay.
        dropped: nodes that go with the attention that they are part of, though they count as impure.
    """

    def stays(node: Node) -> bool:
        # What the body of a higher-order operator writes to is not looked into.
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


def _only_checked(tensor: object, kept: Collection[str]) -> bool:
    if not isinstance(tensor, Node) or tensor.op != "call_function" or tensor.name in kept:
        return False
    return all(aten_target(user) is _ASSERT for user in tensor.users)
