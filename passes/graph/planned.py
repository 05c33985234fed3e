"""Planned calls, which are not in a graph yet. A rewrite decides on plans first and inserts them afterwards.

A plan has the attributes of a node (``op``, ``target``, ``args``, ``kwargs``, ``meta["val"]``), so code that reads a
graph also reads plans. Two plans are equal if they are the same call with equal arguments, or the same size. Layers
that plan the same mask therefore share the inserted nodes. The graph does not change until :meth:`Inserted.insert`.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Node
from torch.utils import _pytree as pytree

from flashpte.passes.graph.aliasing import Writes
from flashpte.passes.graph.insert import in_dialect, insert_before

aten = torch.ops.aten

_ORDER = itertools.count()


class Planned:
    """A call of ``target`` that is not in a graph yet.

    Attributes:
        target: an operator overload, or a Python operator on sizes.
        args, kwargs: nodes, plans and constants.
        meta: ``{"val": ...}`` with the fake result, like a node's.
        order: plans are inserted in the order of their creation.
    """

    op = "call_function"

    def __init__(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> None:
        self.target = target
        self.args = args
        self.kwargs = MappingProxyType(kwargs)
        self.meta = MappingProxyType({"val": value})
        self.order = next(_ORDER)
        # A size is the same number whichever tensor it is read from.
        self._key = (
            ("size", str(value.node.expr)) if self.is_size else (target, frozen(args), frozen(sorted(kwargs.items())))
        )
        self._hash = hash(self._key)

    @property
    def is_size(self) -> bool:
        """Whether it is a dynamic size, which reads no memory."""
        return isinstance(self.meta["val"], torch.SymInt)

    @property
    def name(self) -> str:
        """The operator's name, for messages."""
        return getattr(self.target, "__name__", str(self.target)).partition(".")[0]

    @property
    def all_input_nodes(self) -> list[Value]:
        """Nodes and plans among the arguments, like the attribute of :class:`torch.fx.Node`."""
        leaves = pytree.tree_leaves((list(self.args), dict(self.kwargs)))
        return list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, Value)))

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Planned) and self._hash == other._hash and self._key == other._key)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"{self.name}{self.args}"


Value = Node | Planned
"""A node of the graph, or a plan."""


def frozen(argument: Any) -> Any:
    """An argument as a key. Keys are equal for arguments that mean the same.

    The trap: True, 1 and 1.0 compare equal but are different arguments, and so are 0.0 and -0.0.
    """
    if isinstance(argument, Value):
        return argument
    if isinstance(argument, (list, tuple)):
        return tuple(frozen(item) for item in argument)
    return type(argument), str(argument)


def planned(op: Any, *args: Any, near: Value, **kwargs: Any) -> Planned:
    """Plans ``op(*args, **kwargs)``.

    Args:
        op: an ATen or ``flashpte`` operator overload.
        args, kwargs: nodes, plans and constants.
        near: a value of the same program. It provides the fake tensor mode if no argument is a tensor.
    """
    return Planned(op, args, kwargs, _fake_result(op, args, kwargs, near))


def _fake_result(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], near: Value) -> Any:
    fake_args, kwargs = pytree.tree_map_only((Node, Planned), lambda value: value.meta["val"], (list(args), kwargs))
    fake_mode = detect_fake_mode([*fake_args, near.meta.get("val")])
    if fake_mode is None:
        raise ValueError(f"the arguments of {op} carry no fake tensors; run the pass on an exported program")
    with fake_mode:
        return op(*fake_args, **kwargs)


def planned_item(pair: Planned, place: int) -> Planned:
    """One result of a plan that has several."""
    return Planned(operator.getitem, (pair, place), {}, pair.meta["val"][place])


def planned_size(tensor: Value, dim: int) -> int | Planned:
    """A size of ``tensor`` as an argument: a number if static, or a plan that reads it if dynamic."""
    size = tensor.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    return Planned(aten.sym_size.int, (tensor, dim % tensor.meta["val"].dim()), {}, size)


def nodes_of(value: Any) -> Iterator[Node]:
    """The nodes whose memory is read to compute a value, or any value in a structure. A node yields itself."""
    pending = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Value)]
    seen: set[Value] = set()
    while pending:
        found = pending.pop()
        if found in seen:
            continue
        seen.add(found)
        if isinstance(found, Node):
            yield found
        elif not found.is_size:
            pending += found.all_input_nodes


def with_nodes(value: Value, of: Any) -> Value:
    """The value with each node replaced by ``of(node)``."""
    if isinstance(value, Node):
        return of(value)
    args = pytree.tree_map_only((Node, Planned), lambda inner: with_nodes(inner, of), list(value.args))
    kwargs = {name: with_nodes(v, of) if isinstance(v, Value) else v for name, v in value.kwargs.items()}
    return Planned(value.target, tuple(args), kwargs, value.meta["val"])


class Inserted:
    """The plans that were inserted in one graph, each once.

    A plan that was inserted for an earlier anchor is reused for a later one, unless memory that it reads is written in
    between.

    Args:
        writes: what the graph writes to. May be ``None`` if there is a single anchor.
    """

    def __init__(self, writes: Writes | None = None) -> None:
        self._writes = writes
        self._made: dict[Planned, Node] = {}

    def insert(self, values: Iterable[Any], before: Node) -> list[Any]:
        """Inserts the plans among ``values`` before a node. Returns the values with plans replaced by nodes."""
        values = list(values)
        plans: dict[int, Planned] = {}
        pending = [value for value in values if isinstance(value, Planned)]
        while pending:
            plan = pending.pop()
            if plan.order not in plans:
                plans[plan.order] = plan
                pending += [given for given in plan.all_input_nodes if isinstance(given, Planned)]
        nodes: dict[Planned, Node] = {}
        for _, plan in sorted(plans.items()):
            args = tuple(pytree.tree_map_only(Planned, nodes.__getitem__, list(plan.args)))
            kwargs = {name: nodes[v] if isinstance(v, Planned) else v for name, v in plan.kwargs.items()}
            result = plan.meta["val"]
            on_nodes = Planned(plan.target, args, kwargs, result)
            earlier = self._made.get(on_nodes)
            if earlier is not None and self._serves(earlier, on_nodes, before):
                nodes[plan] = earlier
                continue
            # Sizes and checks are the same in every dialect.
            target = in_dialect(before, plan.target) if _holds_tensors(result) else plan.target
            nodes[plan] = self._made[on_nodes] = insert_before(before, target, args, result, kwargs)
        return [nodes[value] if isinstance(value, Planned) else value for value in values]

    def _serves(self, earlier: Node, value: Planned, before: Node) -> bool:
        return self._writes is None or not self._writes.between(earlier, before, set(nodes_of(value)))


def _holds_tensors(result: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(result))


def insert(value: Value, before: Node) -> Node:
    """Inserts one value before a node. If the value is already a node, it stays where it is."""
    (node,) = Inserted().insert([value], before)
    return node
