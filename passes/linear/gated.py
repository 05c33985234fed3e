"""The rewrite of ``activation(gate) * up`` after a fused product of few rows: the product's kernel computes it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

import flashpte.kernels.dense  # noqa: F401  (registers the operator)
from flashpte.passes.graph.aliasing import Writes
from flashpte.passes.graph.insert import insert_before
from flashpte.passes.graph.values import val
from flashpte.passes.rewrite import Decision, Refusal, Rewrite, Scope

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Gated:
    """``node`` is ``activation(gate) * up``, and gate and up are slices of ``product``."""

    node: Node
    product: Node
    activation: str


def _activation(node: Any) -> tuple[Node, str] | None:
    """The input of an activation and its name."""
    if not isinstance(node, Node) or len(node.users) != 1:
        return None
    arguments: Any = node.args
    if node.target is aten.silu.default:
        return arguments[0], "silu"
    if node.target is aten.gelu.default and node.kwargs.get("approximate") == "tanh":
        return arguments[0], "gelu_tanh"
    return None


def _half(node: Any) -> tuple[Node, int] | None:
    """The few-rows product that a node is half of, and which half."""
    if not isinstance(node, Node) or node.target is not aten.slice.Tensor or len(node.users) != 1:
        return None
    arguments: Any = (*node.args, 1)
    product, dim, start, end, step = arguments[:5]
    if product.target is not torch.ops.flashpte.few_rows_linear.default or len(product.users) != 2:
        return None
    size, last = val(product).shape[-1], val(product).dim() - 1
    if dim not in (-1, last) or step != 1 or size % 2 or end - start != size // 2 or start not in (0, size // 2):
        return None
    return product, int(start > 0)


def _writes(scope: Scope) -> Writes:
    return Writes(scope.graph)


class GatedRewrite(Rewrite):
    """Moves the activation of a gate and its product with "up" into the kernel that computes both."""

    name = "gated"

    def match(self, node: Node, scope: Scope) -> Gated | None:
        """A product of an activation of one half of a fused linear layer's result with the other half."""
        if node.target is not aten.mul.Tensor:
            return None
        factors: Any = node.args
        for first, second in (factors, reversed(factors)):
            activated = _activation(first)
            if activated is None:
                continue
            gate, up = _half(activated[0]), _half(second)
            if gate is not None and up is not None and gate[0] is up[0] and (gate[1], up[1]) == (0, 1):
                return Gated(node, gate[0], activated[1])
        return None

    def decide(self, match: Gated, scope: Scope) -> Decision | Refusal:
        """Always, unless something writes into what disappears."""
        if len(match.product.args) > 3 and match.product.args[3]:
            return Refusal("the product has an activation already")
        if scope.state(_writes).to(match.product):
            return Refusal("the product is written in place")
        return Decision(f"{match.activation}(gate) * up in the kernel that computes both")

    def apply(self, match: Gated, decision: Decision, scope: Scope) -> Any:
        """Puts one operator in the place of the product, the activation and the multiplication."""
        x, weight, bias = (*match.product.args, None)[:3]
        arguments = (x, weight, bias, match.activation)
        node = insert_before(match.node, torch.ops.flashpte.few_rows_linear.default, arguments, val(match.node))
        match.node.replace_all_uses_with(node)
        scope.graph.erase_node(match.node)
        # The signatures of a program and of its modules refer to outputs by name.
        node.name = match.node.name
