"""Which values of a graph are equal, so that equal masks written in each layer share what is made of them.

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
from flashpte.passes.graph.planned import Value, frozen, nodes_of, with_nodes
from flashpte.passes.graph.values import aten_target, printable


class EqualValues:
    """The nodes of one graph by value."""

    def __init__(self, graph: Graph, writes: Writes) -> None:
        self._writes = writes
        self._number: dict[Node, Node] = {}
        first: dict[Any, Node] = {}
        for node in graph.nodes:
            key = self._key(node)
            self._number[node] = node if key is None else first.setdefault(key, node)

    def number(self, value: Value) -> Value:
        """The first node that computes what a node computes; of a plan, the same plan of such nodes."""
        return self._number.get(value, value) if isinstance(value, Node) else with_nodes(value, self.number)

    def unwritten(self, values: Iterable[Value], user: Node) -> bool:
        """Whether neither the values nor what they are computed from is written to before ``user`` reads them."""
        # Down to nodes that are equal only to themselves.
        computed = computed_from(nodes_of(list(values)), lambda node: self._key(node) is not None)
        return not computed or not self._writes.between(min(computed), user, computed)

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
        return node.target, self._numbered(node.args), self._numbered(sorted(node.kwargs.items()))

    def _numbered(self, argument: Any) -> Any:
        if isinstance(argument, Node):
            return self.number(argument)
        if isinstance(argument, (list, tuple)):
            return tuple(self._numbered(item) for item in argument)
        return frozen(argument)
