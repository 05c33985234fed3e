"""Computes what a graph computes from weights alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from flashpte.passes.graph.aliasing import storage_base, written_by


class Known:
    """Values that are the same in every call, computed on demand and kept until :meth:`forget`.

    A tensor that the graph writes in place is not known, nor is anything that shares its memory.

    Args:
        graph: the graph.
        held: tensors by the name of the placeholder that holds them.
    """

    def __init__(self, graph: Graph, held: Mapping[str, torch.Tensor]) -> None:
        self._held = held
        self._written = {base for _, bases in written_by(graph) for base in bases}
        self._is_known: dict[Node, bool] = {}
        self._values: dict[Node, Any] = {}

    def is_known(self, node: Node) -> bool:
        """Whether a node depends on nothing but weights and numbers."""
        for each in _sources_first(node, self._is_known):
            if storage_base(each) in self._written:
                known = False
            elif each.op == "placeholder":
                known = each.name in self._held
            else:
                known = _is_pure(each) and all(self._is_known[source] for source in each.all_input_nodes)
            self._is_known[each] = known
        return self._is_known[node]

    def value(self, node: Node) -> Any:
        """What a known node computes; the node must be known."""
        for each in _sources_first(node, self._values):
            if each.op == "placeholder":
                self._values[each] = self._held[each.name].detach()
                continue
            args, kwargs = self.arguments(each)
            with torch.no_grad():
                self._values[each] = each.target(*args, **kwargs)  # type: ignore[operator]
        return self._values[node]

    def arguments(self, node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a known node, with values in place of nodes."""
        args: Any = map_arg(node.args, self.value)
        kwargs: Any = map_arg(node.kwargs, self.value)
        return args, kwargs

    def forget(self) -> None:
        """Frees the values; what is known stays known."""
        self._values.clear()


def _sources_first(node: Node, done: Mapping[Node, Any]) -> Iterable[Node]:
    """A node and all that it is computed from, sources first, without those that are done. No recursion."""
    pending = [node]
    while pending:
        top = pending[-1]
        missing = [] if top in done else [source for source in top.all_input_nodes if source not in done]
        if missing:
            pending += missing
            continue
        pending.pop()
        if top not in done:
            yield top


def _is_pure(node: Node) -> bool:
    if node.op != "call_function":
        return False
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") == "_operator"
    random = torch.Tag.nondeterministic_seeded in target.tags
    return not (target._schema.is_mutable or random)
