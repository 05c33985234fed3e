"""Handles programs that still contain ``torch.vmap``.

``torch.export`` records a ``vmap`` as it runs: nodes that open a level, nodes that close it, and nodes in between that
compute on batched tensors. The metadata of those has neither the batch dimension nor a fake tensor. Nothing reads the
result of a node that opens or closes a level, but without it the nodes in between raise. Dead-code elimination must
therefore keep it. ``run_decompositions`` replaces all of this with plain operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch import predispatch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from flashpte.passes.graph.values import aten_target

# Decompositions would take this operator apart.
_WHOLE = torch.ops.aten.scaled_dot_product_attention.default


def _present(*names: str) -> frozenset[Callable[..., Any]]:
    """The functions with these names that this PyTorch has. PyTorch 2.11 records only ``vmap``."""
    return frozenset(getattr(predispatch, name) for name in names if hasattr(predispatch, name))


_OPEN = _present("_vmap_increment_nesting", "_jvp_increment_nesting", "_enter_dual_level")
_CLOSE = _present("_vmap_decrement_nesting", "_jvp_decrement_nesting", "_exit_dual_level")


def changes_level(node: Node) -> bool:
    """Whether the node opens or closes a level of ``vmap`` (or of ``jvp``)."""
    return node.op == "call_function" and node.target in _OPEN | _CLOSE


def is_batched(node: Node) -> bool:
    """Whether the node computes inside a ``vmap``."""
    if not any(node.graph.find_nodes(op="call_function", target=target, sort=False) for target in _OPEN):
        return False
    level = 0
    for other in node.graph.nodes:
        if other is node or other.op == "output":
            break
        if changes_level(other):
            level += 1 if other.target in _OPEN else -1
    return level > 0


def without_vmap(program: ExportedProgram) -> ExportedProgram:
    """The program with each ``vmap`` written as plain operators; the program itself if it has none.

    A program with SDPA inside a ``vmap`` stays as it is, because this would take the SDPA apart.
    """
    modules = [module for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    nodes = [node for module in modules for node in module.graph.nodes]
    if not any(changes_level(node) for node in nodes):
        return program
    if any(node.op == "call_function" and aten_target(node) is _WHOLE and is_batched(node) for node in nodes):
        return program
    return program.run_decompositions({})
