"""Inserts nodes with correct metadata, in the ATen dialect or in ExecuTorch's edge dialect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from flashpte.passes.graph.values import is_edge
from flashpte.passes.graph.views import VIEW_COPIES

_INHERITED = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def insert_before(
    anchor: Node, target: Callable[..., Any], args: tuple[Any, ...], value: Any, kwargs: dict[str, Any] | None = None
) -> Node:
    """Inserts a call of ``target``, unchanged, before ``anchor``. ``value`` describes the result."""
    with anchor.graph.inserting_before(anchor):
        node = anchor.graph.call_function(target, args, kwargs)
    node.meta.update({key: anchor.meta[key] for key in _INHERITED if key in anchor.meta})
    node.meta["val"] = value
    return node


def in_dialect(anchor: Node, op: Any) -> Any:
    """The operator overload in the dialect of ``anchor``. Python operators are the same in every dialect."""
    if not is_edge(anchor) or not isinstance(op, torch._ops.OpOverload):
        return op
    from executorch.exir.dialects._ops import ops as exir_ops

    # The edge dialect has no views. It uses copies, which lowering turns back into views.
    op = VIEW_COPIES.get(op, op)
    namespace, name = op._schema.name.split("::")
    return getattr(getattr(getattr(exir_ops.edge, namespace), name), op._overloadname)


def keep_names(before: Graph, after: Graph) -> None:
    """Restores the original node names in a copied graph, because signatures refer to nodes by name.

    Copying renames nodes that are named like a builtin: ``input`` becomes ``input_1``.
    """
    for old, new in zip(before.nodes, after.nodes, strict=True):
        new.name = old.name
