"""Finds which nodes write to which memory, in a graph that may still hold in-place operators.

A program straight from ``torch.export`` is not functional. A cache or a mask may change in place between two nodes that
read it, so a node's name does not identify a value. ``run_decompositions`` makes the program functional, but a pass
must also be correct before that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from flashpte.passes.graph.values import aten_target, is_edge

# Its schema says in-place, but it changes only autograd state, not the numbers.
_WRITE_NOTHING = {torch.ops.aten.detach_.default}


def storage_base(node: Node) -> Node:
    """The node that made the memory that ``node`` may be a view of. Follows everything that may alias."""
    while (parent := _aliased_argument(node)) is not None:
        node = parent
    return node


def whole(node: Node) -> Node:
    """The node whose entire tensor ``node`` is. Follows in-place writes, but not views."""
    while (parent := _same_tensor(node)) is not None:
        node = parent
    return node


def written_placeholders(module: GraphModule) -> set[Node]:
    """The placeholders whose memory a graph may write to, directly or in one of its branches or regions."""
    return {base for _, bases in written_by(module.graph) for base in bases if base.op == "placeholder"}


def written_by(graph: Graph) -> list[tuple[Node, set[Node]]]:
    """The nodes of a graph that may write to memory, each with the nodes that made that memory."""
    writes = [(node, {storage_base(written) for written in _written(node)}) for node in graph.nodes]
    return [(node, bases) for node, bases in writes if bases]


class Writes:
    """The nodes of one graph that may write to memory, found once and queried many times.

    Assumes that nodes inserted later write to nothing.
    """

    def __init__(self, graph: Graph) -> None:
        self._writes = written_by(graph)

    def to(self, node: Node) -> bool:
        """Whether the memory of ``node`` may be written to anywhere in the graph."""
        base = storage_base(node)
        return any(base in written for _, written in self._writes)

    def between(self, start: Node, end: Node, readers: Iterable[Node]) -> bool:
        """Same as :func:`written_between`."""
        if not self._writes:
            return False
        bases = {storage_base(reader) for reader in readers}
        return any(start < node < end and bases & written for node, written in self._writes)


def written_between(start: Node, end: Node, readers: Iterable[Node]) -> bool:
    """Whether the memory of any of ``readers`` may be written after ``start`` and before ``end``, in the same graph."""
    bases = {storage_base(reader) for reader in readers}
    node = start.next
    while node is not end:
        if any(storage_base(written) in bases for written in _written(node)):
            return True
        node = node.next
    return False


def computed_from(nodes: Iterable[Node], followed: Callable[[Node], bool] = lambda node: True) -> set[Node]:
    """The nodes and everything they are computed from. Stops at nodes that are not ``followed``, and includes them."""
    found: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if followed(node):
                pending += node.all_input_nodes
    return found


def is_in_place(target: torch._ops.OpOverload) -> bool:
    """Whether the operator writes to one of its arguments."""
    return target._schema.is_mutable and target not in _WRITE_NOTHING


def _schema(node: Node) -> torch.FunctionSchema | None:
    target: Any = node.target
    if is_edge(node):
        target = target._op
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def _given(node: Node, schema: torch.FunctionSchema) -> Iterator[tuple[torch._C.Argument, Any]]:
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            yield argument, node.args[position]
        elif argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]


def _aliased_argument(node: Node) -> Node | None:
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        given = node.args[0]
        return _given_to_body(node, storage_base) or (given if isinstance(given, Node) else None)
    schema = _schema(node)
    if schema is None:
        return None
    returned = {name for result in schema.returns if result.alias_info for name in result.alias_info.before_set}
    for argument, value in _given(node, schema):
        alias = argument.alias_info
        # An operator that returns a list of views (split, unbind) says so at the argument: "Tensor(a -> *)".
        if alias and (alias.before_set & returned or "*" in alias.after_set) and isinstance(value, Node):
            return value
    return None


def _same_tensor(node: Node) -> Node | None:
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return _given_to_body(node, whole)
    schema = _schema(node)
    written = [] if schema is None or not schema.returns else list(_written(node))
    return written[0] if len(written) == 1 else None


def _given_to_body(item: Node, follow: Callable[[Node], Node]) -> Node | None:
    """The operand that a region returns as this result, found by ``follow`` inside the region; ``None`` if none."""
    caller, place = item.args[0], item.args[1]
    bodies = _bodies(caller) if isinstance(caller, Node) else []
    if len(bodies) != 1 or not isinstance(place, int):
        return None
    body, operands = bodies[0]
    results = pytree.tree_leaves(body.graph.output_node().args[0])
    inside = follow(results[place]) if place < len(results) and isinstance(results[place], Node) else None
    outside = operands.get(inside) if inside is not None else None
    return outside if isinstance(outside, Node) else None


def _written(node: Node) -> Iterator[Node]:
    """The nodes whose memory ``node`` may write to."""
    if node.op != "call_function" or node.target is operator.getitem or aten_target(node) in _WRITE_NOTHING:
        return
    schema = _schema(node)
    if schema is not None:
        for argument, value in _given(node, schema):
            if argument.alias_info and argument.alias_info.is_write:
                values = value if isinstance(value, (list, tuple)) else [value]
                yield from (v for v in values if isinstance(v, Node))
    elif isinstance(node.target, torch._ops.HigherOrderOperator):
        bodies = _bodies(node)
        for body, operands in bodies:
            inside = written_placeholders(body)
            yield from (n for p, n in operands.items() if isinstance(n, Node) and p in inside)
        if not bodies:
            # The graph that it runs is not visible, so it may write to any of its inputs.
            yield from (n for n in node.all_input_nodes if n.op != "get_attr")


def _bodies(caller: Node) -> list[tuple[GraphModule, dict[Node, Any]]]:
    """The graphs that a higher-order operator runs, with the operand of each placeholder; empty if not visible.

    All such operators take the operands after the graphs, in the order of the graphs' placeholders.
    """
    parent = caller.graph.owning_module
    if not isinstance(caller.target, torch._ops.HigherOrderOperator) or parent is None:
        return []
    leaves = pytree.tree_leaves((list(caller.args), dict(caller.kwargs)))
    graphs = [
        (place, body)
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, Node)
        and leaf.op == "get_attr"
        and isinstance(body := _attribute(parent, str(leaf.target)), GraphModule)
    ]
    if not graphs:
        return []
    operands = leaves[graphs[-1][0] + 1 :]
    found = []
    for _, body in graphs:
        inputs = body.graph.find_nodes(op="placeholder")
        if len(inputs) != len(operands):
            return []
        found.append((body, dict(zip(inputs, operands, strict=True))))
    return found


def _attribute(module: torch.nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
    return module
