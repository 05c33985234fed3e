"""GPU architectures as data, in the single table that tile choices and cross-compiling share. Never asks a driver.

Limits are from the table of compute capabilities in the CUDA programming guide. Product numbers are from NVIDIA's data
sheets. The limits decide what compiles (shared memory, registers). The product numbers only steer heuristics (how many
programs fill the GPU), so one product represents its architecture. They are used even if a GPU is present, so that a
build on a machine with a GPU equals a build without one.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class GpuArch:
    """One GPU architecture.

    Attributes:
        name: ``sm_90``, ...
        capability: compute capability, ``(major, minor)``.
        product: the GPU whose numbers are used.
        sm_count: streaming multiprocessors of the product.
        shared_memory_per_block: largest dynamic shared memory of a block (opt-in limit), in bytes.
        shared_memory_per_sm: shared memory of a multiprocessor, in bytes.
        threads_per_sm: resident threads of a multiprocessor.
        registers_per_sm: 32-bit registers of a multiprocessor.
        memory_bytes: device memory of the product, in bytes.
        l2_bytes: L2 cache of the product, in bytes.
        memory_gb_per_s: DRAM bandwidth of the product, in 1e9 bytes per second.
        bf16_tflops: dense bf16 tensor-core throughput of the product, in 1e12 operations per second.
    """

    name: str
    capability: tuple[int, int]
    product: str
    sm_count: int
    shared_memory_per_block: int
    shared_memory_per_sm: int
    threads_per_sm: int
    memory_bytes: int
    l2_bytes: int
    memory_gb_per_s: float
    bf16_tflops: float
    registers_per_sm: int = 65536

    @property
    def number(self) -> int:
        """The capability as one number: 90 for sm_90, 120 for sm_120."""
        return self.capability[0] * 10 + self.capability[1]


_KB, _MB, _GB = 1 << 10, 1 << 20, 1 << 30


def _arch(
    name: str,
    product: str,
    sm_count: int,
    shared_kb: tuple[int, int],
    threads_per_sm: int,
    memory_gb: int,
    l2_mb: int,
    gb_per_s: float,
    tflops: float,
) -> GpuArch:
    number = int(name.removeprefix("sm_"))
    return GpuArch(
        name=name,
        capability=divmod(number, 10),
        product=product,
        sm_count=sm_count,
        shared_memory_per_block=shared_kb[0] * _KB,
        shared_memory_per_sm=shared_kb[1] * _KB,
        threads_per_sm=threads_per_sm,
        memory_bytes=memory_gb * _GB,
        l2_bytes=l2_mb * _MB,
        memory_gb_per_s=gb_per_s,
        bf16_tflops=tflops,
    )


# name, product, SMs, KB shared per (block, SM), threads per SM, memory GB, L2 MB, GB/s, bf16 TFLOP/s
ARCHES: dict[str, GpuArch] = {
    arch.name: arch
    for arch in (
        _arch("sm_80", "NVIDIA A100-SXM4-80GB", 108, (163, 164), 2048, 80, 40, 2039, 312),
        _arch("sm_86", "NVIDIA RTX A6000", 84, (99, 100), 1536, 48, 6, 768, 155),
        _arch("sm_89", "NVIDIA GeForce RTX 4090", 128, (99, 100), 1536, 24, 72, 1008, 165),
        _arch("sm_90", "NVIDIA H100 80GB HBM3", 132, (227, 228), 2048, 80, 50, 3350, 989),
        _arch("sm_100", "NVIDIA B200", 148, (227, 228), 2048, 180, 126, 8000, 2250),
        _arch("sm_120", "NVIDIA GeForce RTX 5090", 170, (99, 100), 1536, 32, 96, 1792, 210),
    )
}


def limits(arch: str) -> GpuArch:
    """The numbers of ``arch``. An architecture that is not in the table gets those of the nearest older one.

    Raises:
        ValueError: ``arch`` is not of the form ``sm_NN`` or older than every entry.
    """
    if arch in ARCHES:
        return ARCHES[arch]
    number = arch.removeprefix("sm_")
    if not number.isdigit():
        raise ValueError(f"not an architecture: {arch!r} (expected sm_NN)")
    older = [known for known in ARCHES.values() if known.number <= int(number)]
    if not older:
        raise ValueError(f"{arch} is older than every supported architecture ({', '.join(ARCHES)})")
    return max(older, key=lambda known: known.number)


def current_arch(device: torch.device) -> GpuArch:
    """The architecture that code for ``device`` is compiled for.

    On CUDA it is the one that ``torch.cuda`` reports, which cross-compiling sets to its target. On a CPU (the
    interpreter) it is sm_90.
    """
    if device.type != "cuda":
        return ARCHES["sm_90"]
    major, minor = torch.cuda.get_device_capability(device)
    return limits(f"sm_{major}{minor}")
