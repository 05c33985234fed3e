"""Finds equal values in a graph, so that equal masks computed in each layer share tile maps and intervals.

Nodes are numbered by value. Two calls of the same operator with equal arguments are equal, and a size is identified by
its expression. This holds at the time when values are computed. A graph that is not functional may write to them, or to
their inputs, before they are used.
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
    """The nodes of one graph, numbered by value."""

    def __init__(self, graph: Graph, writes: Writes) -> None:
        self._writes = writes
        self._number: dict[Node, Node] = {}
        first: dict[Any, Node] = {}
        for node in graph.nodes:
            key = self._key(node)
            self._number[node] = node if key is None else first.setdefault(key, node)

    def number(self, value: Value) -> Value:
        """The first node that computes the same value. For a plan, the same plan on such nodes."""
        return self._number.get(value, value) if isinstance(value, Node) else with_nodes(value, self.number)

    def unwritten(self, values: Iterable[Value], user: Node) -> bool:
        """Whether neither the values nor their inputs are written before ``user`` reads them."""
        # Follow inputs up to nodes that are equal only to themselves.
        computed = computed_from(nodes_of(list(values)), lambda node: self._key(node) is not None)
        return not computed or not self._writes.between(min(computed), user, computed)

    def _key(self, node: Node) -> Any:
        """A key that is equal for nodes of equal values; ``None`` for a node that equals no other."""
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
