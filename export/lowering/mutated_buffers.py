"""Finds the buffers and inputs that a program writes to.

A program fresh from ``torch.export.export`` still has in-place operators, and its signature names no mutated buffers. A
decomposed program names them in its signature only.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.export import ExportedProgram
from torch.fx import Node

from flashpte.passes.graph.aliasing import whole, written_placeholders


def mutated_buffers(programs: Iterable[ExportedProgram]) -> tuple[str, ...]:
    """FQNs of the buffers that any of the programs writes to, sorted."""
    names: set[str] = set()
    for program in programs:
        signature = program.graph_signature
        names.update(signature.buffers_to_mutate.values())
        written = {node.name for node in written_placeholders(program.graph_module)}
        names.update(fqn for name, fqn in signature.inputs_to_buffers.items() if name in written)
    return tuple(sorted(names))


def mutated_inputs(program: ExportedProgram) -> tuple[str, ...]:
    """Names of the user inputs that a program writes to, sorted."""
    signature = program.graph_signature
    written = {node.name for node in written_placeholders(program.graph_module)}
    return tuple(sorted({*signature.user_inputs_to_mutate.values(), *(written & set(signature.user_inputs))}))


def returned_buffers(program: ExportedProgram) -> tuple[str, ...]:
    """FQNs of the buffers that a program writes to and also returns whole (not as views), sorted."""
    signature = program.graph_signature
    mutated = {*mutated_buffers([program])}
    found = {
        signature.buffers_to_mutate[name] for name in signature.user_outputs if name in signature.buffers_to_mutate
    }
    for node in program.graph.output_node().args[0]:
        if isinstance(node, Node) and node.name in signature.user_outputs:
            fqn = signature.inputs_to_buffers.get(whole(node).name)
            if fqn in mutated:
                found.add(fqn)
    return tuple(sorted(found))
