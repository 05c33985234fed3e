"""Writes ``topk`` with operators that Inductor compiles: it leaves it to libtorch, which ExecuTorch does not have.

The rank of an element is how many are before it: those that are larger, and equal ones with a lower index. So the
result is sorted, and the indices differ even if values are equal or infinite. NaN, which ``topk`` puts first, has no
rank here. The comparisons of all pairs are never in memory, because Inductor fuses them with their sums. They suit the
routing of experts, not a vocabulary.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from flashpte.passes.graph.planned import Inserted, Value, planned

aten = torch.ops.aten

MOST_ELEMENTS = 1024


def replace_top_k(module: GraphModule) -> None:
    """Replaces every ``topk`` of a graph, and of the branches in it, whose dimension has at most 1,024 elements."""
    for graph_module in module.modules():
        if isinstance(graph_module, GraphModule):
            nodes = graph_module.graph.find_nodes(op="call_function", target=aten.topk.default)
            for node in nodes:
                _replace(node)
            if nodes:
                graph_module.graph.eliminate_dead_code()
                graph_module.recompile()


def _replace(node: Node) -> None:
    given = {**dict(zip(("self", "k", "dim", "largest"), node.args, strict=False)), **node.kwargs}
    x, k, dim = given["self"], given["k"], given.get("dim", -1)
    assert isinstance(x, Node)
    assert isinstance(dim, int)
    value = x.meta["val"]
    count = value.shape[dim] if value.dim() else None
    if not isinstance(k, int) or not isinstance(count, int) or count > MOST_ELEMENTS:
        return
    results = _sorted(x, count, k, dim % value.dim(), bool(given.get("largest", True)))
    inserted = Inserted().insert(results, before=node)
    for user in list(node.users):
        assert user.target is operator.getitem
        place = user.args[1]
        assert isinstance(place, int)
        user.replace_all_uses_with(inserted[place])
        user.graph.erase_node(user)
        inserted[place].name = user.name  # signatures refer to outputs by name
    node.graph.erase_node(node)


def _sorted(x: Node, count: int, k: int, dim: int, largest: bool) -> tuple[Value, Value]:
    """Plans of the first ``k`` of ``count`` elements along a dimension, and of their indices."""
    last = x.meta["val"].dim() - 1
    device = x.meta["val"].device
    moved: Value = x if dim == last else planned(aten.transpose.int, x, dim, last, near=x)
    every = planned(aten.arange.default, count, dtype=torch.int64, device=device, near=x)
    places = planned(aten.arange.default, k, dtype=torch.int64, device=device, near=x)
    this, other = (planned(aten.unsqueeze.default, moved, at, near=x) for at in (-1, -2))
    earlier = planned(aten.lt.Tensor, every, planned(aten.unsqueeze.default, every, -1, near=x), near=x)
    better = planned(aten.gt.Tensor if largest else aten.lt.Tensor, other, this, near=x)
    tie = planned(aten.logical_and.default, planned(aten.eq.Tensor, other, this, near=x), earlier, near=x)
    before = planned(aten.logical_or.default, better, tie, near=x)
    rank = planned(aten.sum.dim_IntList, before, [-1], near=x)
    at = planned(aten.eq.Tensor, planned(aten.unsqueeze.default, rank, -2, near=x),
                 planned(aten.unsqueeze.default, places, -1, near=x), near=x)  # fmt: skip
    index: Value = planned(aten.sum.dim_IntList, planned(aten.mul.Tensor, at, every, near=x), [-1], near=x)
    values: Value = planned(aten.gather.default, moved, -1, index, near=x)
    if dim != last:
        values, index = (planned(aten.transpose.int, result, dim, last, near=x) for result in (values, index))
    return values, index
