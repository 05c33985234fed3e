"""Compiling kernels for a named arch on a machine with no GPU: launchers run, kernels compile, nothing is launched."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import triton
from triton.compiler import compiler as triton_compiler
from triton.runtime import driver

from flashpte.export.lowering.cross_compile.triton_driver import make_driver
from flashpte.kernels import combine, intervals, split_k, tile_map, tiled, tuning
from flashpte.kernels.hopper import launch as hopper_launch


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled kernel: its name, shared memory in bytes, registers per thread and PTX."""

    name: str
    shared_memory: int
    registers: int
    spilled: int
    ptx: str


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[list[Compiled]]:
    """Inside, launchers given CPU tensors compile their kernels for ``arch`` and append them to the list."""
    compiled: list[Compiled] = []

    class CompileOnly:
        def __init__(self, kernel):
            self.kernel = kernel
            # Remembers the arch that it was first compiled for, whatever it is compiled for later.
            kernel.device_caches.clear()

        def __getitem__(self, grid):
            def compile_(*args, **kwargs):
                result = self.kernel.warmup(*args, grid=tuple(int(g) for g in grid), **kwargs)
                result._init_handles()
                compiled.append(
                    Compiled(
                        self.kernel.fn.__name__,
                        result.metadata.shared,
                        result.n_regs,
                        result.n_spills,
                        result.asm["ptx"],
                    )
                )

            return compile_

    with contextlib.ExitStack() as stack:
        for module in (combine, hopper_launch, split_k, tiled, tile_map, intervals):
            stack.callback(setattr, module, "wrap_triton", module.wrap_triton)
            module.wrap_triton = CompileOnly
        for module in (split_k.tuning,):
            stack.callback(setattr, module, "current_arch", module.current_arch)
            module.current_arch = lambda device: tuning.limits(arch)
        # Remembers the first arch's limit, and would check later archs against it.
        stack.callback(triton_compiler.max_shared_mem.cache_clear)
        triton_compiler.max_shared_mem.cache_clear()
        backend = triton.backends.backends["nvidia"]
        driver_class = make_driver(tuning.ARCHES[arch])
        stack.callback(triton.backends.backends.__setitem__, "nvidia", backend)
        triton.backends.backends["nvidia"] = type(backend)(compiler=backend.compiler, driver=driver_class)
        stack.callback(driver.reset_active)
        driver.set_active(driver_class())
        yield compiled
