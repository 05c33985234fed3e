"""Replaces weights that are tensor subclasses, such as torchao's, by the plain tensors that they hold."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def unwrap_weights(program: ExportedProgram) -> ExportedProgram:
    """Returns a program whose weights are plain tensors: quantized ones (torchao's) become the tensors that they hold.

    A program without quantized weights is returned unchanged.
    """
    if not any(map(is_traceable_wrapper_subclass, program.state_dict.values())):
        return program
    return program.run_decompositions({})  # unwraps them and names their parts
