"""Clears what Inductor and Triton remember about a device.

Both cache facts about "the" GPU (shared-memory limits, SM count, whether Triton works) with ``functools`` for the life
of the process, so a second lowering, for another architecture, would use the first one's limits. Only the modules that
hold such facts are cleared: elsewhere the same decorator guards initialization that must run once, such as the
registration of pattern-matcher passes.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator

_MODULES = (
    "torch._inductor.autows_utils",
    "torch._inductor.codecache",
    "torch._inductor.codegen.cuda.cuda_env",
    "torch._inductor.comm_analysis",
    "torch._inductor.runtime.hints",
    "torch._inductor.utils",
    "torch.cuda",
    "torch.utils._triton",
    "triton.compiler.compiler",
)
_PACKAGES = ("flashpte.kernels.", "flashpte.passes.")
_FUNCTIONS = (("torch._inductor.kernel.mm", "_is_sm7x_or_older_gpu"),)


def memoised_functions() -> Iterator[functools._lru_cache_wrapper]:
    """Yields every function, method and local function with a ``functools`` cache that may hold device facts."""
    for thing in gc.get_objects():
        if type(thing) is functools._lru_cache_wrapper:
            module, name = getattr(thing, "__module__", None) or "", getattr(thing, "__qualname__", "")
            if module in _MODULES or module.startswith(_PACKAGES) or (module, name) in _FUNCTIONS:
                yield thing


def forget_device() -> None:
    """Clears all caches that may hold facts about the device."""
    for function in list(memoised_functions()):
        function.cache_clear()
