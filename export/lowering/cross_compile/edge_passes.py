"""Skips passes of ExecuTorch that would interpret a whole program to find nothing.

A pass on the edge dialect runs each operator of a program on fake tensors and records a new program. Two such passes
look for operators that an exported program no longer has at that point. For 30 layers and three methods, each takes 5 s
on the one core that converts all methods.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from flashpte.passes.graph.values import all_nodes

Call = Callable[[Any, GraphModule], PassResult]


def only_with(found: Callable[[Node], bool], original: Call) -> Call:
    """A pass that returns its program as it is if ``found`` is true of no node, in no branch of it."""

    @functools.wraps(original)
    def call(self: Any, graph_module: GraphModule) -> PassResult:
        if any(node.op == "call_function" and found(node) for node in all_nodes(graph_module)):
            return original(self, graph_module)
        return PassResult(graph_module, False)

    return call


def is_transpose(node: Node) -> bool:
    """Whether a node is ``aten.t``, which ``NormalizeTransposePass`` replaces."""
    return node.target is torch.ops.aten.t.default


def is_view(node: Node) -> bool:
    """Whether a node is a view, which ``ReplaceBrokenOpsWithFunctionalOpsPass`` replaces by a copy."""
    return bool(getattr(node.target, "is_view", False))
