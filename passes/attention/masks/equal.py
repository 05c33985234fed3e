"""Which nodes of a graph compute equal values, so that equal masks written in each layer share what is made of them.

Nodes are numbered by value: two calls of the same operator on equal arguments are equal, a size is its expression. That
holds for values when they are computed; a graph that is not functional may write to them, or to what they were computed
from, before they are used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from flashpte.passes.graph.aliasing import Writes, computed_from, is_in_place
from flashpte.passes.graph.values import aten_target, printable


class EqualMasks:
    """The masks that attention calls of one graph have used, each under the first node that computed it."""

    def __init__(self, graph: Graph, writes: Writes) -> None:
        self._writes = writes
        self._number: dict[Node, Node] = {}
        self._used: dict[Node, list[Node]] = {}
        first: dict[Any, Node] = {}
        for node in graph.nodes:
            key = self._key(node)
            self._number[node] = node if key is None else first.setdefault(key, node)

    def first(self, mask: Node, user: Node) -> Node:
        """The mask that an earlier call used and that is equal to ``mask`` where ``user`` reads it, or ``mask``."""
        used = self._used.setdefault(self.number(mask), [])
        if mask in used:
            return mask
        for other in used:
            if self.unwritten({mask, other}, user):
                return other
        used.append(mask)
        return mask

    def number(self, node: Node) -> Node:
        """The first node that computes what ``node`` computes."""
        return self._number.get(node, node)

    def unwritten(self, nodes: Iterable[Node], user: Node) -> bool:
        """Whether neither the nodes nor what they are computed from is written to before ``user`` reads them."""
        # Down to nodes that are equal only to themselves.
        computed = computed_from(nodes, lambda node: self._key(node) is not None)
        return not self._writes.between(min(computed), user, computed)

    def _key(self, node: Node) -> Any:
        """What is equal for nodes of equal values; ``None`` for a node that equals no other."""
        target = aten_target(node)
        value = node.meta.get("val")
        if isinstance(value, (int, torch.SymInt)):
            return "size", printable(value)
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            return None
        if torch.Tag.nondeterministic_seeded in target.tags or is_in_place(target):
            return None
        return node.target, self._frozen(node.args), self._frozen(sorted(node.kwargs.items()))

    def _frozen(self, argument: Any) -> Any:
        if isinstance(argument, Node):
            return self.number(argument)
        if isinstance(argument, (list, tuple)):
            return tuple(self._frozen(item) for item in argument)
        # The type and the text: True, 1 and 1.0 are equal and are different arguments; so are 0.0 and -0.0.
        return type(argument), str(argument)
