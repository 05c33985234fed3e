"""Computes what a graph computes from weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

_ASSERTIONS = (torch.ops.aten._assert_tensor_metadata.default,)


class Known:
    """Values that are the same in every call, computed on demand and kept until :meth:`forget`.

    Args:
        held: tensors by the name of the placeholder that holds them.
    """

    def __init__(self, held: Mapping[str, torch.Tensor]) -> None:
        self._held = held
        self._is_known: dict[Node, bool] = {}
        self._values: dict[Node, Any] = {}

    def is_known(self, node: Node) -> bool:
        """Whether a node depends on nothing but weights and numbers."""
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self._is_known:
                stack.pop()
                continue
            if top.op == "placeholder":
                self._is_known[top] = top.name in self._held
            elif not _is_pure(top):
                self._is_known[top] = False
            else:
                open_ = [n for n in top.all_input_nodes if n not in self._is_known]
                if open_:
                    stack.extend(open_)
                    continue
                self._is_known[top] = all(self._is_known[n] for n in top.all_input_nodes)
            stack.pop()
        return self._is_known[node]

    def value(self, node: Node) -> Any:
        """What a known node computes; the node must be known."""
        if node.op == "placeholder":
            return self._held[node.name].detach()
        if node not in self._values:
            args, kwargs = self.arguments(node)
            with torch.no_grad():
                self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._values[node]

    def arguments(self, node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a known node, with values in place of nodes."""
        args: Any = map_arg(node.args, self.value)
        kwargs: Any = map_arg(node.kwargs, self.value)
        return args, kwargs

    def forget(self) -> None:
        """Frees the values; what is known stays known."""
        self._values.clear()


def _is_pure(node: Node) -> bool:
    if node.op != "call_function":
        return False
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") == "_operator"
    random = torch.Tag.nondeterministic_seeded in target.tags
    return not (target._schema.is_mutable or random or target in _ASSERTIONS)
