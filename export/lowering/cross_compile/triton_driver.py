"""A Triton driver that compiles for one architecture and refuses to launch anything."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any, NoReturn

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from flashpte.export.lowering.cross_compile.toolchain import CrossCompileError, find_triton_tool
from flashpte.kernels.tuning import GpuArch


def kernel_resources(cubin: bytes, name: str) -> tuple[int, int]:
    """Registers per thread, and bytes of stack and local memory (spills) per thread, of a kernel in a cubin.

    Raises:
        CrossCompileError: cuobjdump does not list the kernel.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(find_triton_tool("cuobjdump")), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(rf"Function {re.escape(name)}:\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise CrossCompileError(f"cuobjdump does not list the resources of kernel {name}")
    registers, stack, local = (int(number) for number in found.groups())
    return registers, stack + local


def make_driver(arch: GpuArch) -> type[DriverBase]:
    """The driver class for ``arch``, with the interface of Triton's own ``CudaDriver``."""

    class Utils:
        """Replaces the C extension that calls libcuda."""

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {
                "max_shared_mem": arch.shared_memory_per_block,
                "max_num_regs": arch.registers_per_sm,
                "multiprocessor_count": arch.sm_count,
                "warpSize": 32,
                "sm_clock_rate": 1_700_000,
                "mem_clock_rate": 2_600_000,
                "mem_bus_width": 5120,
            }

        @staticmethod
        def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[None, int, int, int, int]:
            # (module, function, registers, spilled registers, largest block). The module is None, so the kernel object
            # unloads nothing when it is freed, which may be after the real driver is restored.
            registers, spilled_bytes = kernel_resources(kernel, name)
            largest_block = min(1024, arch.registers_per_sm // max(registers, 1) // 32 * 32)
            return None, 0, registers, spilled_bytes // 4, largest_block

    class Launcher:
        def __init__(self, src: Any, metadata: Any) -> None:
            pass

        def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
            raise CrossCompileError("a Triton kernel was launched while cross-compiling")

    class CrossDriver(DriverBase):
        def __init__(self) -> None:
            super().__init__()
            self.utils = Utils()
            self.launcher_cls = Launcher

        def get_device_capability(self, *args: Any) -> tuple[int, int]:
            return arch.capability

        def get_current_stream(self, *args: Any) -> int:
            return 0

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, *args: Any) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            from triton.backends.nvidia.driver import ty_to_cpp

            return ty_to_cpp(ty)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch.number, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_device_interface(self) -> Any:
            return torch.cuda

        def get_benchmarker(self) -> Any:
            # Called when a kernel is decorated with @triton.autotune; the result is called to time the kernel.
            def refuse(*args: Any, **kwargs: Any) -> NoReturn:
                raise CrossCompileError("a kernel was benchmarked while cross-compiling")

            return refuse

        def get_empty_cache_for_benchmark(self) -> NoReturn:
            raise CrossCompileError("a kernel was benchmarked while cross-compiling")

    return CrossDriver
