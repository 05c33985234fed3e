"""Tensors of a program that are the same in every call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.export import ExportedProgram

from flashpte.passes.graph.aliasing import Writes


class Constant(NamedTuple):
    """What a placeholder holds; ``buffer``: a buffer of the module, which other methods of it may still write to."""

    tensor: torch.Tensor
    buffer: bool


def constant_tensors(program: ExportedProgram) -> dict[str, Constant]:
    """Tensors of a program that are the same in every call, by placeholder: constants, and buffers it does not write.

    Parameters are not among them, and buffers are, persistent or not: what is loaded into a program later, or written
    by another method that shares the buffer, must be what it was exported with.
    """
    signature = program.graph_signature
    writes = Writes(program.graph)
    tensors: dict[str, Constant] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        name = signature.inputs_to_buffers.get(node.name) or signature.inputs_to_lifted_tensor_constants.get(node.name)
        if name is None or name in signature.buffers_to_mutate.values() or writes.to(node):
            continue
        tensor = program.state_dict.get(name, program.constants.get(name))
        if isinstance(tensor, torch.Tensor):
            tensors[node.name] = Constant(tensor, node.name in signature.inputs_to_buffers)
    return tensors
