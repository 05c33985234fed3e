"""Names the constants that ExecuTorch lifts out of a method's graph after their values.

ExecuTorch numbers them from the method's count of buffers. Methods of one program share tensors by name, and methods of
different modules, such as a target's and its draft's, can give the same number to different values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch.export import ExportedProgram


def lift_by_value(original: Callable[[ExportedProgram], ExportedProgram], program: ExportedProgram) -> ExportedProgram:
    """ExecuTorch's ``lift_constant_tensor_pass``, with a hash of its value in the name of each lifted constant.

    Args:
        original: ExecuTorch's pass, which works in place.
        program: a method.
    """
    before = set(program.state_dict)
    program = original(program)
    for spec in program.graph_signature.input_specs:
        name = spec.target
        if name is None or name in before or name not in program.state_dict:
            continue
        value = program.state_dict.pop(name)
        told = f"{value.dtype} {list(value.shape)}".encode() + _bytes(value)
        spec.target = f"{name}_{hashlib.sha256(told).hexdigest()[:16]}"
        program.state_dict[spec.target] = value
    return program


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
