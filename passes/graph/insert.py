"""Inserting nodes with correct metadata, in the ATen dialect or in ExecuTorch's edge dialect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from flashpte.passes.graph.values import is_edge

# The edge dialect has no views: it spells them as copies, which lowering turns back into views.
_EDGE_NAMES = {
    torch.ops.aten.unsqueeze.default: torch.ops.aten.unsqueeze_copy.default,
    torch.ops.aten.select.int: torch.ops.aten.select_copy.int,
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_copy.Tensor,
    torch.ops.aten.permute.default: torch.ops.aten.permute_copy.default,
    torch.ops.aten.expand.default: torch.ops.aten.expand_copy.default,
    torch.ops.aten.squeeze.dims: torch.ops.aten.squeeze_copy.dims,
    torch.ops.aten.view.default: torch.ops.aten.view_copy.default,
}
_INHERITED = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def call_before(anchor: Node, op: Any, *args: Any, **kwargs: Any) -> Node:
    """Inserts ``op(*args, **kwargs)`` before ``anchor`` and computes its metadata.

    Args:
        anchor: the node to insert before; also decides the dialect and gives the new node its provenance.
        op: an ATen or ``flashpte`` operator overload.
        args, kwargs: nodes and constants.

    Returns:
        The new node, with ``meta["val"]`` set by running ``op`` on fake tensors.
    """
    fake_args = pytree.tree_map_only(Node, lambda n: n.meta["val"], args)
    # Without a tensor among the arguments, the anchor's mode.
    fake_mode = detect_fake_mode([*fake_args, anchor.meta.get("val")])
    if fake_mode is None:
        raise ValueError(f"the arguments of {op} carry no fake tensors; run the pass on an exported program")
    with fake_mode:
        value = op(*fake_args, **kwargs)
    return insert_before(anchor, _in_dialect(anchor, op), args, value, kwargs)


def insert_before(
    anchor: Node, target: Callable[..., Any], args: tuple[Any, ...], value: Any, kwargs: dict[str, Any] | None = None
) -> Node:
    """Inserts a call of ``target`` as it is before ``anchor``; ``value`` describes its result."""
    with anchor.graph.inserting_before(anchor):
        node = anchor.graph.call_function(target, args, kwargs)
    node.meta.update({key: anchor.meta[key] for key in _INHERITED if key in anchor.meta})
    node.meta["val"] = value
    return node


def _in_dialect(anchor: Node, op: Any) -> Any:
    """The operator overload as the dialect of ``anchor`` spells it."""
    if not is_edge(anchor):
        return op
    from executorch.exir.dialects._ops import ops as exir_ops

    op = _EDGE_NAMES.get(op, op)
    namespace, name = op._schema.name.split("::")
    return getattr(getattr(getattr(exir_ops.edge, namespace), name), op._overloadname)


def keep_names(before: Graph, after: Graph) -> None:
    """Gives the nodes of a copied graph the names that they had, which signatures go by.

    Copying renames what is called like a builtin: ``input`` becomes ``input_1``.
    """
    for old, new in zip(before.nodes, after.nodes, strict=True):
        new.name = old.name


def size_argument(anchor: Node, tensor: Node, dim: int) -> int | Node:
    """A size of ``tensor`` as an argument: the number itself, or a node that reads it where it is dynamic."""
    size = tensor.meta["val"].shape[dim]
    dim %= tensor.meta["val"].dim()
    if isinstance(size, int):
        return size
    return insert_before(anchor, torch.ops.aten.sym_size.int, (tensor, dim), size)
