"""Choosing between two operators at run time: ``torch.cond`` on a dynamic L_q.

It becomes a host ``if`` on a size that the caller knows, so nothing waits for the device. The traps, all of lowering:

* A Python scalar in an ATen operator of a branch becomes a constant that ExecuTorch does not lift. The branches hold
  one attention operator each; masks, views and tile maps are made in front of the ``cond``.
* torch.export takes a dynamic size to be at least 2, so that ``L_q == 1`` would be False before anything runs. There is
  one branch for all short L_q, 1 among them.
* Both branches must return the same memory layout: both get the ``dim_order`` of the node that they replace.
* ``torch.cond`` takes no two operands that are views of one tensor; :func:`obstacle` finds them beforehand.
* Inductor does not keep the operands in the layout they were traced with, but branches rely on it.
  :mod:`flashpte.export.lowering` makes it; other ways to compile must do without ``torch.cond``.
* Tracing a program again copies a branch for every ``cond`` that uses it, so sharing branches would save nothing.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from flashpte.passes.insert import fake_result, in_dialect, inherit, insert_before, size_argument
from flashpte.passes.mutation import storage_base
from flashpte.passes.sdpa_node import SdpaCall, val


def obstacle(call: SdpaCall) -> str | None:
    """Why an attention with a dynamic L_q cannot be given a ``torch.cond``; ``None`` when it can."""
    if free_unbacked_symbols(val(call.query).shape[2]):
        return "L_q depends on data"
    owners: dict[Node, tuple[str, Node]] = {}
    for name in ("query", "key", "value", "mask"):
        node = getattr(call, name)
        if node is not None:
            other, seen = owners.setdefault(storage_base(node), (name, node))
            if seen is not node:
                return f"{other} and {name} are views of one tensor"
    return None


@dataclasses.dataclass(frozen=True)
class Call:
    """An operator overload and what it is called with: nodes and constants."""

    op: Any
    args: tuple[Any, ...]

    @property
    def label(self) -> str:
        """What the branch's submodule is named after: ``flashpte_prefill`` for ``flashpte::sdpa_prefill``."""
        return self.op._schema.name.replace("::sdpa_", "_")


def cond_before(anchor: Node, query: Node, most_rows: int, few: Call, many: Call) -> Node:
    """Inserts ``torch.cond(L_q <= most_rows, few, many)`` before ``anchor``.

    The branches become submodules of the module that owns the graph.

    Args:
        anchor: the node to insert before; also decides the dialect and gives the new nodes their provenance.
        query: ``[B, H_q, L_q, D]``, L_q dynamic.
        most_rows: the largest L_q that ``few`` is for.
        few, many: two calls that return one tensor each, of the same shape and memory layout.

    Returns:
        The node of the result.
    """
    rows = size_argument(anchor, query, 2)
    short = insert_before(anchor, operator.le, (rows, most_rows), query.meta["val"].shape[2] <= most_rows)
    operands = tuple(dict.fromkeys(a for call in (few, many) for a in call.args if isinstance(a, Node)))
    results = tuple(fake_result(call.op, call.args) for call in (few, many))
    branches = [_branch(anchor, call, operands, result) for call, result in zip((few, many), results, strict=True)]
    owner = anchor.graph.owning_module
    assert owner is not None
    number = 0
    while any(hasattr(owner, f"{call.label}_{number}") for call in (few, many)):
        number += 1
    getters = []
    for call, branch in zip((few, many), branches, strict=True):
        name = f"{call.label}_{number}"
        owner.add_submodule(name, branch)
        with anchor.graph.inserting_before(anchor):
            getters.append(anchor.graph.get_attr(name))
        inherit(getters[-1], anchor)
    chosen = insert_before(anchor, torch.ops.higher_order.cond, (short, *getters, operands), results[:1])
    return insert_before(anchor, operator.getitem, (chosen, 0), results[0])


def _branch(anchor: Node, call: Call, operands: tuple[Node, ...], result: torch.Tensor) -> GraphModule:
    """A module that makes one call on its inputs, which stand for ``operands``, and returns ``(result,)``."""
    graph = Graph()
    inputs = {}
    for operand in operands:
        inputs[operand] = graph.placeholder(operand.name)
        inputs[operand].meta["val"] = operand.meta["val"]
    args = tuple(inputs[a] if isinstance(a, Node) else a for a in call.args)
    node = graph.call_function(in_dialect(anchor, call.op), args)
    inherit(node, anchor)
    node.meta["val"] = result
    graph.output((node,))
    return GraphModule({}, graph)
