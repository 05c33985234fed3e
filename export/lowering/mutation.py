"""Finds the buffers and inputs a program writes to.

A program fresh from ``torch.export.export`` keeps in-place operators, and its signature names no mutated buffer
before it is functionalised; one that was decomposed has them in its signature only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.export import ExportedProgram
from torch.fx import Node


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

    Attributes:
        written: nodes (placeholders among them) whose memory is written to.
        whole: the result of writing in place, and the node it is; views are left out.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.written: set[Node] = set()
        self.whole: dict[Node, Node] = {}
        base: dict[Node, Node] = {}  # a view, or the result of writing in place, and the tensor whose memory it is
        for node in program.graph.nodes:
            schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
            if not isinstance(schema, torch.FunctionSchema):
                continue
            for argument, value in zip(schema.arguments, _positional(node, schema), strict=True):
                if argument.alias_info is None:
                    continue
                for tensor in value if isinstance(value, list | tuple) else (value,):
                    if isinstance(tensor, Node):
                        owner = base.get(tensor, tensor)
                        base.setdefault(node, owner)
                        if argument.alias_info.is_write:
                            self.written.add(owner)
                            self.whole.setdefault(node, self.whole.get(tensor, tensor))


def _positional(node: Node, schema: torch.FunctionSchema) -> Iterator[object]:
    for index, argument in enumerate(schema.arguments):
        yield node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
