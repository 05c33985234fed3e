"""Compiles the Triton kernels of a program in parallel and saves them; launches none.

Inductor's own worker processes import PyTorch anew and would not see the overrides. The workers here are forked once
all kernels of a program are known, and only fill Triton's cache. The parent process then takes every kernel from that
cache. It compiles the kernels that a worker failed on or did not get to itself, and raises their errors.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import select
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flashpte.export.common.signals import ENDING, deferred_signals
from flashpte.export.lowering.cross_compile.override_table import Target

_FEW = 2  # fewest kernels per process: a process costs 0.1 s, a kernel 0.5 s and more
_MOST = 8  # processes: a container may have fewer cores and less memory than it reports


def hold_back(target: Target, original: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``CachingAutotuner.precompile``: compiles no kernel while kernels are being defined."""

    def precompile(self: Any, *args: Any, **kwargs: Any) -> Any:
        return None if target.defining else original(self, *args, **kwargs)

    return precompile


def compile_and_save(target: Target, original: Any) -> Callable[..., None]:
    """Replaces Inductor's compile-time tuning: compiles every kernel and saves it, launches none."""

    def generate_and_run_autotune_block(wrapper: Any) -> None:
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        scope: dict[str, Any] = {}
        wait = "\nasync_compile.wait(globals())\ndel async_compile\n"
        target.defining = True
        try:
            exec(wrapper.kernel_autotune_defs.getvalue() + wait, scope)
        finally:
            target.defining = False
        kernels = [value for value in scope.values() if isinstance(value, CachingAutotuner)]
        fill_cache(kernels, min(_MOST, len(os.sched_getaffinity(0))))
        for kernel in kernels:
            if not kernel.launchers:
                kernel.precompile()
            launcher = _pick_launcher(kernel.launchers)
            kernel.launchers = [launcher]
            kernel.save_gpu_kernel("stream", launcher)

    return generate_and_run_autotune_block


def _pick_launcher(launchers: Sequence[Any]) -> Any:
    """The first configuration, in the author's order, that spills no registers, or else the one that spills least."""
    return min(launchers, key=lambda launcher: launcher.n_spills or 0)


def fill_cache(kernels: Sequence[Any], processes: int, patience: float = 300.0) -> None:
    """Compiles ``kernels`` in worker processes, only to fill Triton's cache.

    Args:
        kernels: Inductor's ``CachingAutotuner`` objects that have not been compiled.
        processes: most processes to start.
        patience: seconds without a finished kernel after which the processes are killed.
    """
    processes = min(processes, len(kernels) // _FEW)
    if processes < 2 or multiprocessing.current_process().daemon:  # a daemon cannot start processes
        return
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
            stack.enter_context(_forked(processes, _work, (kernels, numbers, done, write_done)))
        finally:
            os.close(write_done)
        # An empty read means that the last process, which held the other end open, has ended.
        poll = select.poll()
        poll.register(done)
        while poll.poll(1000 * patience) and os.read(done, 4096):
            pass


@contextlib.contextmanager
def _forked(count: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> Iterator[None]:
    """Runs ``work`` in up to ``count`` processes, each in its own group; the end of the block kills them all."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=arguments, daemon=True) for _ in range(count)]
    try:
        for worker in workers:
            # No signal may arrive between starting a process and recording it.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
            try:
                worker.start()
            except OSError:  # no memory for another process
                break
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield
    finally:
        with deferred_signals():
            started = {worker.pid: worker for worker in workers if worker.pid is not None}
            for group, worker in started.items():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)  # also kills an assembler that it started
                worker.kill()  # it may not have joined its group yet
            for worker in started.values():
                worker.join()


def _work(kernels: Sequence[Any], numbers: int, done: int, write_done: int) -> None:
    os.setpgid(0, 0)
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    # If the parent died, no reader is left and the next write ends this process.
    os.close(done)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # Never free the parent's objects: a compiler context waits for its threads when freed, and a fork has none.
    gc.freeze()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # the parent meets the same errors and reports them
        os.dup2(nowhere, stream)
    while taken := os.read(numbers, 2):
        with contextlib.suppress(Exception):
            kernels[int.from_bytes(taken, "big")].precompile(warm_cache_only=True)
        os.write(write_done, b".")
