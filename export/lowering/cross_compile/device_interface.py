"""Answers the PyTorch compiler's questions about the CUDA device from the architecture table."""

from __future__ import annotations

import types
from typing import Any

from flashpte.kernels.tuning import GpuArch


def device_properties(arch: GpuArch) -> types.SimpleNamespace:
    """Returns what ``torch.cuda.get_device_properties`` would return on the target."""
    return types.SimpleNamespace(
        name=arch.product,
        major=arch.capability[0],
        minor=arch.capability[1],
        multi_processor_count=arch.sm_count,
        total_memory=arch.memory_bytes,
        regs_per_multiprocessor=arch.registers_per_sm,
        max_threads_per_multi_processor=arch.threads_per_sm,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=arch.shared_memory_per_block,
        shared_memory_per_multiprocessor=arch.shared_memory_per_sm,
        L2_cache_size=arch.l2_bytes,
        clock_rate=1_700_000,
        memory_clock_rate=2_600_000,
        memory_bus_width=5120,
        is_integrated=0,
        is_multi_gpu_board=0,
        gcnArchName="",
        uuid="cross-compile",
    )


def make_interface(arch: GpuArch) -> type:
    """A Dynamo device interface for the target; Inductor uses it instead of ``torch.cuda``."""
    from torch._dynamo.device_interface import CudaInterface

    properties = device_properties(arch)

    class CrossCudaInterface(CudaInterface):
        class Worker:
            @staticmethod
            def set_device(device: int) -> None:
                pass

            @staticmethod
            def current_device() -> int:
                return 0

            @staticmethod
            def get_device_properties(device: Any = None) -> Any:
                return properties

        @staticmethod
        def is_available() -> bool:
            return True

        @staticmethod
        def device_count() -> int:
            return 1

        @staticmethod
        def current_device() -> int:
            return 0

        @staticmethod
        def set_device(device: Any) -> None:
            pass

        @staticmethod
        def exchange_device(device: int) -> int:
            return 0

        @staticmethod
        def maybe_exchange_device(device: int) -> int:
            return 0

        @staticmethod
        def synchronize(device: Any = None) -> None:
            pass

        @staticmethod
        def get_device_properties(device: Any = None) -> Any:
            return properties

        @staticmethod
        def get_compute_capability(device: Any = None) -> int:
            return arch.number

        @staticmethod
        def get_raw_stream(device: Any = None) -> int:
            return 0

        @staticmethod
        def memory_allocated(device: Any = None) -> int:
            return 0

        @staticmethod
        def is_bf16_supported(including_emulation: bool = False) -> bool:
            return True  # every architecture in the table supports it

        @staticmethod
        def is_triton_capable(device: Any = None) -> bool:
            return True

        @staticmethod
        def raise_if_triton_unavailable(device: Any = None) -> None:
            pass

    return CrossCudaInterface
