"""The rewrite of linear layers with 16-bit weights that get few rows of x: decode and verify.

ExecuTorch has no matrix product, so Inductor writes each one as a template that is made for many rows. With few rows,
most of such a kernel's time is spent waiting (:mod:`flashpte.kernels.dense.few_rows`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

import flashpte.kernels.dense  # noqa: F401  (registers the operator)
from flashpte.kernels.dense.ops import why_not
from flashpte.passes.graph.insert import insert_before
from flashpte.passes.graph.values import val
from flashpte.passes.linear.find import Product, find_product
from flashpte.passes.rewrite import Decision, Refusal, Rewrite, Scope


class FewRowsRewrite(Rewrite):
    """Replaces products of at most 16 rows of x with a weight of the program."""

    name = "few-rows"

    def match(self, node: Node, scope: Scope) -> Product | None:
        """A linear layer whose weight the program holds."""
        product = find_product(node)
        if product is None or product.weight.op != "placeholder" or scope.run.weights is None:
            return None
        is_weight = scope.module is scope.run.graph_module and product.weight.name in scope.run.weights.held
        return product if is_weight else None

    def decide(self, match: Product, scope: Scope) -> Decision | Refusal:
        """Replaces it if the kernels take it."""
        if match.transposed:
            return Refusal("the weight is [K, N]: the kernels read rows of [N, K]")
        x, weight = val(match.x), val(match.weight)
        if (reason := why_not(x, weight, None if match.bias is None else val(match.bias))) is not None:
            return Refusal(reason)
        rows = x.shape[:-1].numel()
        return Decision(f"{rows} row{'s' * (rows > 1)} of x by [{weight.shape[0]}, {weight.shape[1]}]: read once")

    def apply(self, match: Product, decision: Decision, scope: Scope) -> Any:
        """Puts the operator in the product's place."""
        current = find_product(match.node)  # an earlier match may have replaced x
        assert current is not None
        arguments = (current.x, current.weight, current.bias)
        node = insert_before(match.node, torch.ops.flashpte.few_rows_linear.default, arguments, val(match.node))
        match.node.replace_all_uses_with(node)
        scope.graph.erase_node(match.node)
        # The signatures of a program and of its modules refer to outputs by name.
        node.name = match.node.name
