"""Weights that the compiler sees as CUDA tensors while their bytes stay on the host.

AOTInductor needs a program's parameters and buffers on the target device. Here the program holds fake CUDA tensors that
each carry a host tensor. When AOTInductor reads a value to write it into the package, it gets the host bytes in a
tensor whose ``device`` is cuda.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram

from flashpte.export.files.mapped_tensors import mapped_file
from flashpte.export.lowering.cross_compile.toolchain import CrossCompileError
from flashpte.passes.graph.insert import keep_names
from flashpte.passes.graph.values import all_nodes

_HOST = "_flashpte_host"  # attribute of a fake CUDA tensor: its value, as a HostBackedCuda


class HostBackedCuda(torch.Tensor):
    """A host tensor whose ``device`` is cuda:0, which the package records.

    ``is_cuda`` stays False because the writers use it to decide how to read the storage, which is on the host.

    Attributes:
        program_name: name of the program's tensor that it was made from; ``None`` for any other.
    """

    program_name: str | None = None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device where the runtime will put it."""
        return torch.device("cuda", 0)


def host_backed(tensor: torch.Tensor) -> HostBackedCuda:
    """Wraps a tensor; its host storage holds nothing else, as if ``tensor.to("cuda")`` had made it."""
    tensor = tensor.detach().cpu()
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    needed = (last + 1) * tensor.element_size() if tensor.numel() else 0
    if tensor.storage_offset() != 0 or tensor.untyped_storage().nbytes() != needed:
        tensor = tensor.clone(memory_format=torch.preserve_format)
    return torch.Tensor._make_subclass(HostBackedCuda, tensor)


def _fake_cuda(mode: FakeTensorMode, name: str, host: torch.Tensor) -> torch.Tensor:
    backed = host_backed(host)
    backed.program_name = name
    with mode:
        # ``host_backed`` made a tensor with gaps dense: use the new strides, not the original's.
        fake = torch.empty_strided(backed.size(), backed.stride(), dtype=backed.dtype, device="cuda:0")
    setattr(fake, _HOST, backed)
    return fake


def move_program(
    stock_pass: Callable[..., ExportedProgram], program: ExportedProgram, location: Any
) -> ExportedProgram:
    """``torch.export.passes.move_to_device_pass`` for a device that may be absent.

    Parameters, buffers and constants become fake CUDA tensors that carry their host values; the stock pass moves the
    graph's metadata. Like the stock pass, this changes ``program`` in place; it does not change the tensors.
    """
    if not str(location).startswith("cuda"):
        return stock_pass(program, location)
    metadata = [
        value
        for node in program.graph.nodes
        for value in pytree.tree_leaves(node.meta.get("val"))
        if isinstance(value, FakeTensor)
    ]
    mode = detect_fake_mode(metadata) or FakeTensorMode(allow_non_fake_inputs=True)
    hosts: dict[str, HostBackedCuda] = {}
    for name, tensor in list(program.state_dict.items()):
        fake = _fake_cuda(mode, name, tensor)
        hosts[name] = getattr(fake, _HOST)
        if isinstance(tensor, torch.nn.Parameter):
            fake = torch.nn.Parameter(fake, requires_grad=False)
        program._state_dict[name] = fake
    for name, tensor in list(program.constants.items()):
        if isinstance(tensor, torch.Tensor):
            fake = _fake_cuda(mode, name, tensor)
            hosts[name] = getattr(fake, _HOST)
            program._constants[name] = fake
    if program.example_inputs is not None:
        program._example_inputs = pytree.tree_map_only(
            torch.Tensor,
            lambda t: t if isinstance(t, FakeTensor) else mode.from_tensor(t),
            program.example_inputs,
        )
    # Nothing may require a gradient: autograd metadata of a CUDA tensor asks the device guard for a stream.
    for node in all_nodes(program.graph_module):
        node.meta["val"] = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, node.meta.get("val"))
    # Moving a tensor sorts its strides. Comparing a dynamic size with a number would add a guard on which is larger,
    # and the code would be compiled for only a part of the range.
    guards = mode.shape_env.suppress_guards() if mode.shape_env is not None else contextlib.nullcontext()
    with torch.no_grad(), mode, guards:
        program = stock_pass(program, "cuda:0")
    for pool in (program.state_dict, program.constants):
        for name, tensor in pool.items():
            if isinstance(tensor, torch.Tensor):  # the stock pass made new fake tensors
                setattr(tensor, _HOST, hosts[name])
    return program


def host_value(name: str, value: torch.Tensor) -> torch.Tensor:
    """The value of a constant for the package: the host value of a fake tensor, any other tensor as it is.

    Raises:
        CrossCompileError: a fake tensor carries no host value.
    """
    if not isinstance(value, FakeTensor):
        return value
    host = getattr(value, _HOST, None)
    if host is None:
        raise CrossCompileError(f"constant {name} has no value: it was made on the device while compiling")
    return host


def is_same_weight(stock: Callable[[torch.Tensor, torch.Tensor], bool], a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two constants are the same; the stock test finds all fake tensors equal, as they have no address."""
    host_a, host_b = getattr(a, _HOST, None), getattr(b, _HOST, None)
    if host_a is None and host_b is None:
        return stock(a, b)
    return host_a is host_b


def clone_with_host(stock: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """Clones a fake tensor; the clone carries the same host value."""
    clone = stock(tensor)
    host = getattr(tensor, _HOST, None)
    if host is not None:
        setattr(clone, _HOST, host)
    return clone


class StorageFiles:
    """Writes each tensor's storage to disk once, no matter how many methods use it.

    ExecuTorch writes all weights of every method to files before it drops duplicates. For a storage that was already
    written, or is mapped from a file, this makes a hard link to that file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Keeps the tensors alive, so that no other tensor gets their address.
        self._written: dict[tuple[int, int], tuple[torch.Tensor, Path, bytes]] = {}

    def write(self, stock: Callable[[torch.Tensor, str], bytes], tensor: torch.Tensor, path: str) -> bytes:
        """``_write_tensor_storage``: writes the storage to ``path``, returns its SHA-256."""
        storage = tensor.untyped_storage()
        if (mapped := mapped_file(storage)) is not None:
            first, digest = mapped
            with contextlib.suppress(OSError):  # another file system, or one without hard links
                os.unlink(path)
                os.link(first, path)
                return digest
        key = (storage.data_ptr(), storage.nbytes())
        if key in self._written:
            _, first, digest = self._written[key]
            os.unlink(path)
            os.link(first, path)
            return digest
        digest = stock(tensor, path)
        first = self._folder / f"storage-{len(self._written)}"
        with contextlib.suppress(OSError):  # a file system without hard links: the next method writes it again
            os.link(path, first)
            self._written[key] = (tensor, first, digest)
        return digest


def deepcopy_sharing_tensors(program: ExportedProgram, memo: dict[int, Any]) -> ExportedProgram:
    """Copies a program's graph and tables but not its weights, because lowering never writes to them."""
    for pool in (program.state_dict, program.constants):
        for tensor in pool.values():
            if isinstance(tensor, torch.Tensor):
                memo[id(tensor)] = tensor
    new = type(program).__new__(type(program))
    memo[id(program)] = new
    for name, value in vars(program).items():
        setattr(new, name, copy.deepcopy(value, memo))
    keep_names(program.graph, new.graph)
    return new
