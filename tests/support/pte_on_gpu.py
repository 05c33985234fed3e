"""Runs the methods of a ``.pte`` under libtorch: no ExecuTorch runtime, the same shared libraries.

ExecuTorch's runtime binds tensors by FQN and shares mutable buffers between methods; so does this. Inputs reach a
library in the delegate's order, which is read from the program.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from flashpte.export.lowering import inspect_pte


class PteOnGpu:
    """``program.run("decode", tokens, input_pos)`` with CUDA tensors; returns the method's outputs."""

    def __init__(self, folder: Path, scratch: Path):
        libraries = Path(torch.__file__).parent / "lib"
        for name in ("libtorch_cpu.so", "libtorch_cuda.so"):
            ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
        contents = inspect_pte(folder / "model.pte")
        self.order = {name: method.argument_order for name, method in contents.methods.items()}
        self.tensors: dict[str, torch.Tensor] = {}
        self.runners = {}
        for name, method in contents.methods.items():
            library = scratch / f"{name}.so"
            library.write_bytes(method.library.data)
            runner = torch._C._aoti.AOTIModelContainerRunnerCuda(str(library), 1, "cuda", "")
            for entry in method.weights:
                if entry.fqn not in self.tensors:
                    self.tensors[entry.fqn] = _on_gpu(contents.weight(name, entry.fqn))
            fqns = runner.get_constant_names_to_original_fqns()
            bound = {constant: self.tensors[fqn] for constant, fqn in fqns.items() if fqn in self.tensors}
            assert len(bound) == len(fqns), f"{name}: no value for {set(fqns.values()) - set(self.tensors)}"
            runner.update_constant_buffer(bound, False, False, True)
            self.runners[name] = runner

    def run(self, method: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Runs one method on the current device."""
        return self.runners[method].run([inputs[i] for i in self.order[method]])


def _on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A CUDA copy with the same strides."""
    out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    return out.copy_(tensor)
