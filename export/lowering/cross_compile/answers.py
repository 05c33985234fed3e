"""What AOTInductor returns for a method, in a form that another process can use: a library, and where its weights are.

A weight that the program holds is named, so an answer has no bytes of it. Only constants that the compiler makes, which
depend on no weight, are in the answer as bytes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from flashpte.export.lowering.cross_compile.host_weights import HostBackedCuda, host_backed
from flashpte.export.lowering.cross_compile.toolchain import CrossCompileError

_ADDRESSES = ("storage_ptr", "start", "end")  # properties that mean nothing in another process; ExecuTorch reads none


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of a compiled method.

    Attributes:
        storage: the name of the program's tensor whose copy for the GPU has this storage, or the storage's bytes.
        layout: size, strides and offset in the storage, in elements.
        dtype: element type.
        on_gpu: whether it is a :class:`HostBackedCuda`.
        properties: AOTInductor's ``TensorProperties`` without addresses.
    """

    storage: str | bytes
    layout: tuple[Sequence[int], Sequence[int], int]
    dtype: torch.dtype
    on_gpu: bool
    properties: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Answer:
    """A compiled method.

    Attributes:
        library: path of its shared library; :func:`paths_of` takes the file away.
        weights: its weights by FQN.
    """

    library: str
    weights: dict[str, Weight]


def describe_weight(tensor: torch.Tensor, properties: Any) -> Weight:
    """Describes an entry of AOTInductor's ``Weights``."""
    storage = tensor.untyped_storage()
    name = tensor.program_name if isinstance(tensor, HostBackedCuda) else None
    octets = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
    plain = {key: value for key, value in vars(properties).items() if key not in _ADDRESSES}
    return Weight(
        storage=octets.numpy().tobytes() if name is None else name,
        layout=(tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset())),
        dtype=tensor.dtype,
        on_gpu=isinstance(tensor, HostBackedCuda),
        properties={**plain, "shape": tuple(properties.shape), "stride": tuple(properties.stride)},
    )


def paths_of(answer: Answer, program: ExportedProgram) -> list[Any]:
    """What AOTInductor would have returned for a program: the library's path and the weights.

    Args:
        answer: from the compilation of the same program, in this process or another.
        program: the program; its tensors are the weights.

    Raises:
        CrossCompileError: the answer names a weight that the program does not hold.
    """
    from torch.export.pt2_archive._package_weights import Weights

    library = Path(answer.library).with_suffix(".wrapper.so")
    os.replace(answer.library, library)
    weights = {
        name: (_tensor(name, weight, program), _properties(weight.properties))
        for name, weight in answer.weights.items()
    }
    return [str(library), Weights(weights)]


def _tensor(name: str, weight: Weight, program: ExportedProgram) -> torch.Tensor:
    size, strides, offset = weight.layout
    if isinstance(weight.storage, str):
        held = program.state_dict.get(weight.storage, program.constants.get(weight.storage))
        if not isinstance(held, torch.Tensor):
            raise CrossCompileError(f"the compiled method reads {weight.storage}, which the program does not hold")
        storage = host_backed(held).untyped_storage()
    else:
        octets = bytearray(weight.storage)
        storage = torch.frombuffer(octets, dtype=torch.uint8).untyped_storage() if octets else torch.UntypedStorage()
    try:
        tensor = torch.empty(0, dtype=weight.dtype).set_(storage, offset, size, strides)
    except RuntimeError as error:
        raise CrossCompileError(f"the compiled method has another size of {name} than the program") from error
    return host_backed(tensor) if weight.on_gpu else tensor


def _properties(plain: dict[str, Any]) -> Any:
    from torch.export.pt2_archive._package_weights import TensorProperties

    properties = TensorProperties(torch.empty(0))
    vars(properties).update({**dict.fromkeys(_ADDRESSES), **plain})
    return properties
