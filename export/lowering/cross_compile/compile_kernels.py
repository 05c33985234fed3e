"""Compiling the Triton kernels of a program beside each other, and saving them; none is launched.

Inductor compiles with worker processes that import PyTorch anew, and would not see what is replaced here. These are
forked when all kernels of a program are known, and only fill Triton's cache, from which the process itself then takes
what they compiled: what one fails to compile, or does not live to, is compiled there, with the error that it raises.
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

_FEW = 2  # a process costs a tenth of a second, a kernel half a second and more
_MOST = 8  # a container may have fewer cores and less memory than it sees


def hold_back(target: Target, original: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``CachingAutotuner.precompile``: while kernels are being defined, none is compiled."""

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
    """The first configuration, in its author's order, that spills no registers; else the one that spills least."""
    return min(launchers, key=lambda launcher: launcher.n_spills or 0)


def fill_cache(kernels: Sequence[Any], processes: int, patience: float = 300.0) -> None:
    """Compiles ``kernels`` in processes of their own, for what they leave in Triton's cache alone.

    Args:
        kernels: Inductor's ``CachingAutotuner`` objects that have not been compiled.
        processes: how many at most.
        patience: seconds that may go by without a kernel being done; then the processes are ended.
    """
    processes = min(processes, len(kernels) // _FEW)
    if processes < 2 or multiprocessing.current_process().daemon:  # which may have no processes of its own
        return
    with contextlib.ExitStack() as stack:
        # A pipe gives every number to one reader, whatever becomes of the others. It holds 64 KiB that nobody reads.
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
        # Nothing to read is the end of the last process, which had the other end open.
        poll = select.poll()
        poll.register(done)
        while poll.poll(1000 * patience) and os.read(done, 4096):
            pass


@contextlib.contextmanager
def _forked(count: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> Iterator[None]:
    """Up to ``count`` processes at work, each in a group of its own, of which none is left when the block ends."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=arguments, daemon=True) for _ in range(count)]
    try:
        for worker in workers:
            # No signal comes between a process and the note of it.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
            try:
                worker.start()
            except OSError:  # no memory for another
                break
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield
    finally:
        with deferred_signals():
            started = {worker.pid: worker for worker in workers if worker.pid is not None}
            for group, worker in started.items():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)  # with the assembler that it may have started
                worker.kill()  # which may not have come to its group yet
            for worker in started.values():
                worker.join()


def _work(kernels: Sequence[Any], numbers: int, done: int, write_done: int) -> None:
    os.setpgid(0, 0)
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    # With no reader left, because the parent died, writing ends this process.
    os.close(done)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # What the parent made stays as it is: compilers' contexts wait for threads when they are freed, and have none here.
    gc.freeze()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # the parent meets the same errors, and says them
        os.dup2(nowhere, stream)
    while taken := os.read(numbers, 2):
        with contextlib.suppress(Exception):
            kernels[int.from_bytes(taken, "big")].precompile(warm_cache_only=True)
        os.write(write_done, b".")
