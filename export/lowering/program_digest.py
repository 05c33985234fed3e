"""Tells whether two processes would compile the same method: a digest of all that compiling reads of a program."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram
from torch.fx import GraphModule


def program_digest(program: ExportedProgram, *settings: str) -> str:
    """The SHA-256, as hex, of a program's graph, signature and ranges, and of the shapes and sharing of its tensors.

    Values of parameters and buffers do not count, because the compiled code does not depend on them. Values of lifted
    constants do: ExecuTorch names them by value.

    Args:
        program: a method as :func:`flashpte.export.lowering.lower` takes it.
        settings: what else decides how it is compiled.
    """
    digest = hashlib.sha256()
    for fact in _facts(program, settings):
        digest.update(fact.encode() + b"\0")
    lifted = set(program.graph_signature.inputs_to_lifted_tensor_constants.values())
    for name in sorted(lifted & program.constants.keys()):
        value = program.constants[name]
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _facts(program: ExportedProgram, settings: tuple[str, ...]) -> Iterator[str]:
    yield repr((settings, torch.get_float32_matmul_precision()))
    for name, module in program.graph_module.named_modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            values = [_described(value) for value in pytree.tree_leaves(node.meta.get("val"))]
            yield repr((name, node.op, node.name, str(node.target), str(node.args), str(node.kwargs), values))
    yield str(program.graph_signature)
    yield repr([(str(symbol), str(bounds)) for symbol, bounds in program.range_constraints.items()])
    first: dict[int, str] = {}
    for name, tensor in (*program.state_dict.items(), *program.constants.items()):
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            shared = first.setdefault(storage.data_ptr(), name) if storage.nbytes() else name
            yield repr((name, _described(tensor), tensor.storage_offset(), shared))


def _described(value: Any) -> tuple[str, ...]:
    if not isinstance(value, torch.Tensor):
        return (type(value).__name__, str(value))
    return (str(value.dtype), str(tuple(value.shape)), str(value.stride()))
