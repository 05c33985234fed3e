"""Reads what an exported program says about a node: shape, range of each size, operator, dialect and module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

# An exported program's ranges of its dynamic sizes. The graph's own symbols start at 2 even where a size may be 1.
Ranges = Mapping[sympy.Symbol, ValueRanges]


class Described(Protocol):
    """A node or a plan: a call and its result."""

    @property
    def op(self) -> str:
        """``"call_function"`` for a call."""

    @property
    def target(self) -> Any:
        """The operator or function that is called."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """``meta["val"]`` is the fake result."""

    @property
    def name(self) -> str:
        """The node's name."""


def all_nodes(graph_module: GraphModule) -> Iterator[Node]:
    """The nodes of a graph, and of the regions and branches in it."""
    for module in graph_module.modules():
        if isinstance(module, GraphModule):
            yield from module.graph.nodes


def is_edge(node: Described) -> bool:
    """Whether the node is in ExecuTorch's edge dialect, which wraps every operator."""
    return node.op == "call_function" and type(node.target).__name__ == "EdgeOpOverload"


def aten_target(node: Described) -> Any:
    """The ATen operator that a node calls. An ExecuTorch edge operator is unwrapped."""
    target: Any = node.target
    return target._op if is_edge(node) else target


def size_range(size: int | torch.SymInt, ranges: Ranges | None = None) -> tuple[int, int | None]:
    """Smallest and largest value of ``size``; the largest is ``None`` if there is no upper bound. Adds no guard."""
    if isinstance(size, int):
        return size, size
    expr = size.node.expr
    if ranges is not None and expr.free_symbols <= ranges.keys():
        bounds = bound_sympy(expr, dict(ranges))
    else:
        bounds = size.node.shape_env.bound_sympy(expr)
    # PyTorch has its own sympy objects for integer infinities, so test for a number, not for infinity.
    lower = int(bounds.lower) if bounds.lower.is_Integer else 0
    upper = int(bounds.upper) if isinstance(bounds.upper, sympy.Integer) else None
    # The range of an unbounded dimension ends at the largest integer that a size can be.
    return lower, None if upper is None or upper >= 2**62 else upper


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are known to be equal. Adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    expr = [s.node.expr if isinstance(s, torch.SymInt) else sympy.Integer(s) for s in (a, b)]
    return sympy.simplify(expr[0] - expr[1]) == 0


def may_be_same(a: int | torch.SymInt, b: int | torch.SymInt, ranges: Ranges | None = None) -> bool:
    """Whether two sizes may be equal, i.e. are not known to differ. Adds no guard."""
    if same_size(a, b):
        return True
    (a_least, a_most), (b_least, b_most) = size_range(a, ranges), size_range(b, ranges)
    if (a_most is not None and a_most < b_least) or (b_most is not None and b_most < a_least):
        return False
    expr = [s.node.expr if isinstance(s, torch.SymInt) else sympy.Integer(s) for s in (a, b)]
    return sympy.simplify(expr[0] - expr[1]).is_zero is not False


def hint(size: int | torch.SymInt) -> int:
    """A number for comparing the magnitudes of sizes or strides. A symbolic size uses its example value.

    A data-dependent size has no example. A large prime stands in for it, so that no other size is a multiple by chance.
    """
    if isinstance(size, int):
        return size
    if size.node.hint is not None:
        return int(size.node.hint)
    expr = size.node.expr
    primes = (10007, 20011, 30011, 40009)
    return int(expr.subs(dict(zip(sorted(expr.free_symbols, key=str), primes, strict=False))))


def printable(size: int | torch.SymInt) -> int | str:
    """A size in the form that the report uses."""
    return size if isinstance(size, int) else str(size.node.expr)


def module_path(node: Node) -> str:
    """Dotted path of the innermost module that made the call; empty if the graph does not say."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return path.removeprefix("L['self'].").removeprefix("L['self']").replace("slice(None, None, None)", "")


def val(node: Described) -> torch.Tensor:
    """The fake tensor that describes a node's result.

    Raises:
        ValueError: the node has none, because the graph was not traced with fake tensors.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"node {node.name} carries no tensor metadata; run the pass on a program from torch.export")
    return value
