"""Compiles kernels for a named arch on a machine without a GPU: launchers run, kernels compile, nothing is launched."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import triton
from triton.compiler import compiler as triton_compiler
from triton.runtime import driver

from flashpte.export.lowering.cross_compile.triton_driver import make_driver
from flashpte.kernels import combine, intervals, split_k, tile_map, tiled, tuning
from flashpte.kernels.delta import prepare as delta_prepare
from flashpte.kernels.delta import recurrent as delta_recurrent
from flashpte.kernels.delta import scan as delta_scan
from flashpte.kernels.dense import few_rows as dense_few_rows
from flashpte.kernels.hopper import launch as hopper_launch
from flashpte.kernels.linear import embedding as linear_embedding
from flashpte.kernels.linear import few_rows_hopper, many_rows_hopper
from flashpte.kernels.linear import plain as linear_plain
from flashpte.kernels.linear import shares as linear_shares
from flashpte.kernels.linear import splits as linear_splits

# The modules that launch kernels.
LAUNCHING = (
    *(combine, dense_few_rows, hopper_launch, split_k, tiled, tile_map, intervals),
    *(delta_prepare, delta_recurrent, delta_scan),
    *(linear_embedding, few_rows_hopper, many_rows_hopper, linear_plain, linear_shares, linear_splits),
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled kernel: its name, shared memory in bytes, registers per thread, and PTX."""

    name: str
    shared_memory: int
    registers: int
    spilled: int
    ptx: str


class ReachedLlvmError(Exception):
    """Carries the last intermediate code of Triton itself (TTGIR), to end compiling there."""


def _end_at_llvm(*stage: Any) -> tuple[str, str] | None:
    """A Triton hook: returns a cache key without arguments, or else changes the stages of compiling."""
    if not stage:
        return "end at llvm", "end at llvm"

    def stop(module: Any, metadata: Any) -> None:
        raise ReachedLlvmError(str(module))

    stage[1]["llir"] = stop
    return None


@contextlib.contextmanager
def compiling_for(arch: str, to_the_end: bool = True) -> Iterator[list[Any]]:
    """Inside, launchers given CPU tensors compile their kernels for ``arch`` and append them to the list.

    The list holds :class:`Compiled`. Without ``to_the_end`` it holds pairs of a kernel's name and its TTGIR, which
    takes a fraction of the time.
    """
    compiled: list[Any] = []

    class CompileOnly:
        def __init__(self, kernel):
            self.kernel = kernel
            # It remembers the first arch that it was compiled for.
            kernel.device_caches.clear()

        def __getitem__(self, grid):
            def compile_(*args, **kwargs):
                try:
                    result = self.kernel.warmup(*args, grid=tuple(int(g) for g in grid), **kwargs)
                except ReachedLlvmError as reached:
                    compiled.append((self.kernel.fn.__name__, str(reached)))
                    return
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
        if not to_the_end:
            stack.callback(setattr, triton.knobs.runtime, "add_stages_inspection_hook", None)
            triton.knobs.runtime.add_stages_inspection_hook = _end_at_llvm
        for module in LAUNCHING:
            stack.callback(setattr, module, "wrap_triton", module.wrap_triton)
            module.wrap_triton = CompileOnly
        for module in (split_k.tuning,):
            stack.callback(setattr, module, "current_arch", module.current_arch)
            module.current_arch = lambda device: tuning.limits(arch)
        # It remembers the first arch's limit and would check later archs against it.
        stack.callback(triton_compiler.max_shared_mem.cache_clear)
        triton_compiler.max_shared_mem.cache_clear()
        backend = triton.backends.backends["nvidia"]
        driver_class = make_driver(tuning.ARCHES[arch])
        stack.callback(triton.backends.backends.__setitem__, "nvidia", backend)
        triton.backends.backends["nvidia"] = type(backend)(compiler=backend.compiler, driver=driver_class)
        stack.callback(driver.reset_active)
        driver.set_active(driver_class())
        yield compiled
