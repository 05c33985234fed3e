"""Compiles the Triton kernels of a program in parallel and saves them; launches none.

Inductor's own worker processes import PyTorch anew and would not see the overrides. The workers here are forked once
all kernels of a program are known, and only fill Triton's cache. The parent process then takes every kernel from that
cache. It compiles the kernels that a worker failed on or did not get to itself, and raises their errors.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from flashpte.export.lowering.cross_compile import forked
from flashpte.export.lowering.cross_compile.override_table import Target

_FEW = 2  # fewest kernels per process: a process costs 0.1 s, a kernel 0.5 s and more


def hold_back(target: Target, original: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``CachingAutotuner.precompile``: compiles no kernel while kernels are being defined."""

    def precompile(self: Any, *args: Any, **kwargs: Any) -> Any:
        return None if target.defining else original(self, *args, **kwargs)

    return precompile


def compile_and_save(target: Target, original: Any) -> Callable[..., None]:
    """Replaces Inductor's compile-time tuning: compiles every kernel and saves it, launches none."""

    def generate_and_run_autotune_block(wrapper: Any) -> None:
        from torch._inductor.codecache import CudaKernelParamCache
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        # A kernel of the same name in an earlier program would keep its place, and libraries embed kernels in order.
        CudaKernelParamCache.cache.clear()
        scope: dict[str, Any] = {}
        wait = "\nasync_compile.wait(globals())\ndel async_compile\n"
        target.defining = True
        try:
            exec(wrapper.kernel_autotune_defs.getvalue() + wait, scope)
        finally:
            target.defining = False
        kernels = [value for value in scope.values() if isinstance(value, CachingAutotuner)]
        finished = fill_cache(kernels, target.processes, on_kernels=target.on_kernels)
        for number, kernel in enumerate(kernels, 1):
            if not kernel.launchers:
                kernel.precompile()
            launcher = _pick_launcher(kernel.launchers)
            kernel.launchers = [launcher]
            kernel.save_gpu_kernel("stream", launcher)
            target.on_kernels(max(number, finished), len(kernels))

    return generate_and_run_autotune_block


def _pick_launcher(launchers: Sequence[Any]) -> Any:
    """The first configuration, in the author's order, that spills no registers, or else the one that spills least."""
    return min(launchers, key=lambda launcher: launcher.n_spills or 0)


def fill_cache(
    kernels: Sequence[Any],
    processes: int,
    patience: float = 300.0,
    on_kernels: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Compiles ``kernels`` in worker processes, only to fill Triton's cache.

    Args:
        kernels: Inductor's ``CachingAutotuner`` objects that have not been compiled.
        processes: most processes to start.
        patience: seconds without a finished kernel after which the processes are killed.
        on_kernels: called with the number of finished kernels and of all.

    Returns:
        How many kernels the processes finished.
    """
    finished = 0
    processes = min(processes, len(kernels) // _FEW)
    if processes < 2 or not forked.can_fork():
        return finished
    with contextlib.ExitStack() as stack:
        # A pipe gives each number to one reader, even if other readers die. It buffers 64 KiB.
        numbers, write_numbers = os.pipe()
        stack.callback(os.close, numbers)
        with open(write_numbers, "wb") as file:
            for number in range(min(len(kernels), 16_000)):
                file.write(number.to_bytes(2, "big"))
        done, write_done = os.pipe()
        stack.callback(os.close, done)
        try:
            stack.enter_context(_forked(processes, (kernels, numbers, done, write_done)))
        finally:
            os.close(write_done)
        # An empty read means that the last process, which held the other end open, has ended.
        poll = select.poll()
        poll.register(done)
        while poll.poll(1000 * patience) and (dots := os.read(done, 4096)):
            finished += len(dots)
            on_kernels(finished, len(kernels))
    return finished


@contextlib.contextmanager
def _forked(count: int, arguments: tuple[Any, ...]) -> Iterator[None]:
    """Runs :func:`_work` in up to ``count`` processes; the end of the block kills them all."""
    workers: list[BaseProcess] = []
    try:
        while len(workers) < count and forked.start(workers, _work, arguments, daemon=True):
            pass
        yield
    finally:
        forked.end(workers)


def _work(kernels: Sequence[Any], numbers: int, done: int, write_done: int) -> None:
    forked.become_worker()
    os.close(done)  # if the parent died, no reader is left and the next write ends this process
    while taken := os.read(numbers, 2):
        with contextlib.suppress(Exception):
            kernels[int.from_bytes(taken, "big")].precompile(warm_cache_only=True)
        os.write(write_done, b".")
