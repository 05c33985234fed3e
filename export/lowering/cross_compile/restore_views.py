"""Turns the edge dialect's view copies back into views before AOTInductor compiles the program.

The edge dialect has no views: ``transpose`` becomes ``transpose_copy`` and so on. Inductor folds such copies into its
own kernels. But a Triton operator needs its arguments in memory, so a transposed cache or an expanded mask would be
copied whole before every call. Views reach the kernel as strides.

The trap: a view that leaves the program would have strides that its caller does not expect, and would alias a buffer.
So a chain of views that ends in an output keeps its copies.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from executorch.exir.dialects._ops import ops as edge_ops
from executorch.exir.dialects.edge._ops import EdgeOpOverload
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

_aten = torch.ops.aten
_edge = edge_ops.edge.aten

# Copies and the views that they came from. ``view`` becomes ``reshape``: the edge passes drop clones that a view copy
# makes redundant, and without the clone a transposed tensor cannot always be viewed.
VIEWS: dict[Any, Any] = {
    copy: view
    for edge_copy, aten_copy, view in (
        (_edge.alias_copy.default, _aten.alias_copy.default, _aten.alias.default),
        (_edge.expand_copy.default, _aten.expand_copy.default, _aten.expand.default),
        (_edge.permute_copy.default, _aten.permute_copy.default, _aten.permute.default),
        (_edge.select_copy.int, _aten.select_copy.int, _aten.select.int),
        (_edge.slice_copy.Tensor, _aten.slice_copy.Tensor, _aten.slice.Tensor),
        (_edge.split_copy.Tensor, _aten.split_copy.Tensor, _aten.split.Tensor),
        (_edge.split_with_sizes_copy.default, _aten.split_with_sizes_copy.default, _aten.split_with_sizes.default),
        (_edge.squeeze_copy.dim, _aten.squeeze_copy.dim, _aten.squeeze.dim),
        (_edge.squeeze_copy.dims, _aten.squeeze_copy.dims, _aten.squeeze.dims),
        (_edge.t_copy.default, _aten.t_copy.default, _aten.t.default),
        (_edge.transpose_copy.int, _aten.transpose_copy.int, _aten.transpose.int),
        (_edge.unbind_copy.int, _aten.unbind_copy.int, _aten.unbind.int),
        (_edge.unsqueeze_copy.default, _aten.unsqueeze_copy.default, _aten.unsqueeze.default),
        (_edge.view_copy.default, _aten.view_copy.default, _aten.reshape.default),
    )
    for copy in (edge_copy, aten_copy)
}
# A getitem picks one view out of the several that split and unbind return.
_VIEW_TARGETS = frozenset(VIEWS) | frozenset(VIEWS.values()) | {operator.getitem}


class RestoreViews(PassBase):
    """Replaces view copies by views in a graph module before AOTInductor compiles it."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrites ``graph_module`` in place, and the branches inside it."""
        changed = False
        for module in graph_module.modules():
            if isinstance(module, GraphModule):
                changed |= _restore(module)
        return PassResult(graph_module, changed)


def _restore(module: GraphModule) -> bool:
    escaping = _escaping(module)
    changed = False
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in VIEWS and node not in escaping:
            node.target = VIEWS[node.target]
            changed = True
    if changed:
        module.graph.lint()
        module.recompile()
    return changed


def _escaping(module: GraphModule) -> set[Node]:
    """Views that reach an output, or an operator that writes to them, through other views only."""
    escaping: set[Node] = set()
    for node in reversed(module.graph.nodes):
        if node.op != "call_function" or node.target not in _VIEW_TARGETS:
            continue
        for user in node.users:
            is_view = user.op == "call_function" and user.target in _VIEW_TARGETS
            if (is_view and user in escaping) or (not is_view and _keeps(user, node)):
                escaping.add(node)
                break
    return escaping


def _keeps(user: Node, node: Node) -> bool:
    """Whether ``user`` does more with ``node`` than read from it."""
    if user.op != "call_function":
        return True  # an output, or a call whose body is not visible
    schema = _schema(user.target)
    if schema is None:
        return False  # a Python operator on sizes, or control flow, which only reads once a program is functional
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            passed = user.args[index] if index < len(user.args) else user.kwargs.get(argument.name)
            if passed is node:
                return True
    return False


def _schema(target: Callable[..., Any] | str) -> torch.FunctionSchema | None:
    if isinstance(target, EdgeOpOverload):
        return target._op._schema
    return getattr(target, "_schema", None)
