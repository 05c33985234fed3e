"""Finds the buffers and inputs a program writes to.

A program fresh from ``torch.export.export`` keeps in-place operators, and its signature names no mutated buffer
before it is functionalised; one that was decomposed has them in its signature only.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node


def mutated_buffers(programs: Iterable[ExportedProgram]) -> tuple[str, ...]:
    """FQNs of the buffers that any of the programs writes to, sorted."""
    names: set[str] = set()
    for program in programs:
        signature = program.graph_signature
        names.update(signature.buffers_to_mutate.values())
        written = {node.name for node in _Memory(program).written}
        names.update(fqn for name, fqn in signature.inputs_to_buffers.items() if name in written)
    return tuple(sorted(names))


def mutated_inputs(program: ExportedProgram) -> tuple[str, ...]:
    """Names of the user's inputs that a program writes to, sorted."""
    signature = program.graph_signature
    written = {node.name for node in _Memory(program).written}
    return tuple(sorted({*signature.user_inputs_to_mutate.values(), *(written & set(signature.user_inputs))}))


def returned_buffers(program: ExportedProgram) -> tuple[str, ...]:
    """FQNs of the buffers that a program writes to and also returns as they are (not a view of them), sorted."""
    signature = program.graph_signature
    mutated = {*mutated_buffers([program])}
    memory = _Memory(program)
    found = {
        signature.buffers_to_mutate[name] for name in signature.user_outputs if name in signature.buffers_to_mutate
    }
    for node in program.graph.output_node().args[0]:
        if isinstance(node, Node) and node.name in signature.user_outputs:
            fqn = signature.inputs_to_buffers.get(memory.whole.get(node, node).name)
            if fqn in mutated:
                found.add(fqn)
    return tuple(sorted(found))


class _Memory:
    """Which placeholder's memory each node of a program that is not functionalised stands for.

    Regions of a program are graphs of their own (``torch.no_grad()``, ``torch.autocast``, branches of ``torch.cond``):
    what they write to is written in the program.

    Attributes:
        written: placeholders whose memory is written to.
        whole: the result of writing in place, and the node it is; views are left out.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.whole: dict[Node, Node] = {}
        # A view, the result of writing in place or a region's input, and the tensor whose memory it is.
        self._base: dict[Node, Node] = {}
        self._written: set[Node] = set()
        self._walk(program.graph_module)
        self.written = self._written & set(program.graph.find_nodes(op="placeholder"))

    def _walk(self, module: GraphModule) -> None:
        results: dict[Node, list[Any]] = {}  # of the regions: their outputs
        for node in module.graph.nodes:
            if node.op != "call_function":
                continue
            if isinstance(node.target, HigherOrderOperator):
                results[node] = self._walk_regions(module, node)
            elif node.target is operator.getitem:
                self._pick(node, results)
            elif isinstance(schema := getattr(node.target, "_schema", None), torch.FunctionSchema):
                self._apply(node, schema)

    def _walk_regions(self, module: GraphModule, node: Node) -> list[Any]:
        arguments = pytree.tree_leaves((node.args, node.kwargs))
        regions = [
            (index, getattr(module, str(argument.target)))
            for index, argument in enumerate(arguments)
            if isinstance(argument, Node) and argument.op == "get_attr"
        ]
        regions = [(index, region) for index, region in regions if isinstance(region, GraphModule)]
        if not regions:
            return []
        # All such operators take the operands after the regions, in the order of the regions' inputs.
        operands = arguments[regions[-1][0] + 1 :]
        for _, region in regions:
            inputs = region.graph.find_nodes(op="placeholder")
            if len(inputs) == len(operands):
                for inner, outer in zip(inputs, operands, strict=True):
                    if isinstance(outer, Node):
                        self._base[inner] = self._base.get(outer, outer)
                        self.whole[inner] = self.whole.get(outer, outer)
            self._walk(region)
        return pytree.tree_leaves(regions[0][1].graph.output_node().args[0]) if len(regions) == 1 else []

    def _pick(self, node: Node, results: dict[Node, list[Any]]) -> None:
        """One of the views that ``split`` returns, or one result of a region."""
        source: Any = node.args[0]
        index: Any = node.args[1]
        if source in results:
            source = results[source][index] if index < len(results[source]) else None
            if isinstance(source, Node) and source in self.whole:
                self.whole[node] = self.whole[source]
        if isinstance(source, Node) and source in self._base:
            self._base[node] = self._base[source]

    def _apply(self, node: Node, schema: torch.FunctionSchema) -> None:
        for argument, value in zip(schema.arguments, _positional(node, schema), strict=True):
            if argument.alias_info is None:
                continue
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Node):
                    owner = self._base.get(tensor, tensor)
                    self._base.setdefault(node, owner)
                    if argument.alias_info.is_write:
                        self._written.add(owner)
                        self.whole.setdefault(node, self.whole.get(tensor, tensor))


def _positional(node: Node, schema: torch.FunctionSchema) -> Iterator[object]:
    for index, argument in enumerate(schema.arguments):
        yield node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
