"""Loads the code of a program's methods: a shared library for each method of a ``.pte``, one package for a ``.pt2``.

Both run under libtorch. The library inside a ``.pte`` is linked only with CUDA's driver, because ExecuTorch provides
the functions that it calls. libtorch provides the same functions once its symbols are global.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flashpte.export.common.errors import ProgramError
from flashpte.export.files.dtypes import read_dtype
from flashpte.export.files.model_folder import ModelFolder
from flashpte.export.files.names import COPY_OPERATORS
from flashpte.export.files.pte_contents import Method, PteContents, inspect_pte
from flashpte.export.runtime.machine import check_arch

Call = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
"""Runs a method on the current stream; takes and returns tensors in calling order."""


def check_methods(folder: ModelFolder, contents: PteContents) -> None:
    """Checks that every method is one call of compiled code, with only host/device copies around it.

    Raises:
        ProgramError: a method has anything else; the text names both.
    """
    if set(contents.methods) != set(folder.signatures):
        raise ProgramError(
            f"{folder.model_file} has methods {sorted(contents.methods)}, its manifest {sorted(folder.signatures)}"
        )
    for name, method in contents.methods.items():
        if method.delegates != ("CudaBackend",):
            raise ProgramError(f"method {name} calls {', '.join(method.delegates)}; only one CudaBackend can be run")
        others = [operator for operator in method.operators if operator.partition(".")[0] not in COPY_OPERATORS]
        if others:
            raise ProgramError(f"method {name} has operators outside of its compiled code: {', '.join(others)}")
        inputs = len(folder.signatures[name].inputs)
        if sorted(method.argument_order) != list(range(inputs)):
            raise ProgramError(f"method {name}: its compiled code does not take each of the {inputs} inputs once")


def open_pte(folder: ModelFolder) -> PteContents:
    """Opens a ``.pte``, maps its weights and checks its methods; runs nothing.

    Raises:
        ExportError: it cannot be read, or its methods do more than call compiled code.
    """
    contents = inspect_pte(folder.model_file)
    check_methods(folder, contents)
    return contents


def check_cubins(contents: PteContents, capability: tuple[int, int], name: str) -> None:
    """Checks the architecture of the kernels themselves, whatever the manifest says.

    Raises:
        ProgramError: a kernel does not run on the GPU ``name`` with compute capability ``capability``.
    """
    for method in contents.methods.values():
        for arch in sorted({cubin.arch for cubin in method.library.cubins}):
            check_arch(arch, capability, name)


def make_torch_symbols_global() -> None:
    """Lets libraries that are not linked with libtorch find its functions.

    Raises:
        ProgramError: libtorch cannot be loaded.
    """
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cuda.so"):
        try:
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise ProgramError(f"cannot load {name} of this PyTorch: {error}") from error


def load_weights(contents: PteContents, device: torch.device) -> dict[str, torch.Tensor]:
    """Copies every named tensor of a program to a device, once for all methods.

    A ``.ptd`` stores equal bytes once (two empty caches share a segment), but here each name gets its own memory.

    Raises:
        ProgramError: two methods hold different tensors of one name.
    """
    tensors: dict[str, torch.Tensor] = {}
    first: dict[str, tuple] = {}
    for name, method in contents.methods.items():
        for entry in method.weights:
            layout = (entry.dtype, entry.shape, entry.strides, entry.storage_offset, entry.key)
            if first.setdefault(entry.fqn, layout) != layout:
                raise ProgramError(f"methods of the program hold different tensors named {entry.fqn}")
            if entry.fqn not in tensors:
                tensors[entry.fqn] = _to_device(contents.weight(name, entry.fqn), device)
    return tensors


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device with the same strides, which the library was compiled for."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def load_method(method: Method, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Call:
    """Loads a method's library and binds the tensors to it, without copying them.

    Raises:
        ProgramError: the library cannot be loaded, or needs a tensor that the file does not hold.
    """
    with tempfile.TemporaryDirectory(prefix="flashpte-") as scratch:
        library = Path(scratch) / f"{method.name}.so"
        library.write_bytes(method.library.data)
        try:
            # Single-threaded: otherwise events record the end of each call, which a CUDA graph cannot capture.
            open_library: Any = torch._C._aoti.AOTIModelContainerRunnerCuda
            runner = open_library(str(library), 1, str(device), "", True)
        except RuntimeError as error:
            raise ProgramError(f"cannot load the library of method {method.name}: {_first_line(error)}") from error
    fqns = runner.get_constant_names_to_original_fqns()
    absent = sorted(set(fqns.values()) - set(tensors))
    if absent:
        raise ProgramError(f"method {method.name} uses {absent[0]}, which the program's files do not hold")
    bound = {constant: tensors[fqn] for constant, fqn in fqns.items()}
    runner.update_constant_buffer(bound, False, False, True)
    order = method.argument_order
    results = method.result_order

    def call(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        outputs = runner.run([inputs[i] for i in order])
        return [outputs[i] for i in results]

    # The library keeps pointers to the tensors, not the tensors.
    call.bound = bound  # type: ignore[attr-defined]
    return call


def load_package(folder: ModelFolder, device: torch.device) -> tuple[Call, dict[str, torch.Tensor]]:
    """Loads a ``.pt2`` of one method; returns its call and the buffers that it writes to, filled with zeros.

    Raises:
        ProgramError: the package cannot be loaded, or a buffer does not start as zeros; a package does not tell the
            initial values.
    """
    for fqn, entry in folder.buffers.items():
        if not entry.get("starts_as_zeros", True):
            raise ProgramError(
                f"{folder.model_file} writes to {fqn}, which does not start as zeros: export a .pte, or run the "
                "package with torch._inductor.aoti_load_package"
            )
    try:
        loader = torch._C._aoti.AOTIModelPackageLoader(
            str(folder.model_file), "model", True, 1, device.index if device.index is not None else -1
        )
    except RuntimeError as error:
        raise ProgramError(f"cannot load {folder.model_file}: {_first_line(error)}") from error
    buffers = {
        fqn: torch.zeros(entry["shape"], dtype=read_dtype(entry["dtype"]), device=device)
        for fqn, entry in folder.buffers.items()
    }
    known = set(loader.get_constant_fqns())
    absent = sorted(set(buffers) - known)
    if absent:
        raise ProgramError(f"{folder.model_file} does not hold {absent[0]}, which its manifest says it writes to")
    if buffers:
        loader.load_constants(buffers, False, False, True)

    def call(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return loader.run(list(inputs))

    call.bound = buffers  # type: ignore[attr-defined]
    return call, buffers


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
