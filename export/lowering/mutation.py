"""Finds the buffers a program writes to.

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
        names.update(program.graph_signature.buffers_to_mutate.values())
        names.update(_written_in_place(program))
    return tuple(sorted(names))


def _written_in_place(program: ExportedProgram) -> Iterator[str]:
    buffers = program.graph_signature.inputs_to_buffers
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
                    if argument.alias_info.is_write and owner.name in buffers:
                        yield buffers[owner.name]


def _positional(node: Node, schema: torch.FunctionSchema) -> Iterator[object]:
    for index, argument in enumerate(schema.arguments):
        yield node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
