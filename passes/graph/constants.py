"""Finds tensors of a program that are the same in every call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.export import ExportedProgram

from flashpte.passes.graph.aliasing import Writes


class Constant(NamedTuple):
    """The tensor that a placeholder holds.

    ``buffer`` marks a buffer of the module, which the module's other methods may still write to.
    """

    tensor: torch.Tensor
    buffer: bool


def constant_tensors(program: ExportedProgram) -> dict[str, Constant]:
    """Maps placeholder names to tensors that are the same in every call: constants, and buffers that are never written.

    Parameters are excluded. Buffers are included, persistent or not, so a value that is loaded later, or written by
    another method that shares the buffer, must equal the exported value.
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
