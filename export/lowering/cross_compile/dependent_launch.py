"""Launches kernels of a lowered program before the previous kernel ends (programmatic dependent launch).

On sm_90 and newer some kernels wait for their predecessors themselves; see
:func:`flashpte.kernels.launch.dependent_launch`. Their facts name the constant that a launch sets for this
(:attr:`flashpte.kernels.facts.KernelFacts.early_start`). Inductor's own kernels get the wait here, as their first
instruction. So the end of a kernel always implies the end of all kernels before it.

Inductor (2.11, 2.13) has an option for this, ``triton.enable_pdl``, which is not used. Its kernels wait only if they
read what the kernel right before them wrote. One that does not wait can end before an earlier kernel does, and the next
kernel then reads too early. Its matrix products never wait, and its C++ launches each kernel after the end of the
previous one.

The functions here replace Inductor's writers of kernels and launches and its analysis of which arguments a kernel
writes to.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from flashpte.kernels.facts import facts_named, facts_of

_LAUNCH = """
            static inline void launchDependentKernel(
                    CUfunction func,
                    uint32_t gridX,
                    uint32_t gridY,
                    uint32_t gridZ,
                    uint32_t numWarps,
                    uint32_t sharedMemBytes,
                    void* args[],
                    cudaStream_t stream) {
                CUlaunchAttribute attribute = {};
                attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
                attribute.value.programmaticStreamSerializationAllowed = 1;
                CUlaunchConfig config = {};
                config.gridDimX = gridX;
                config.gridDimY = gridY;
                config.gridDimZ = gridZ;
                config.blockDimX = 32 * numWarps;
                config.blockDimY = 1;
                config.blockDimZ = 1;
                config.sharedMemBytes = sharedMemBytes;
                config.hStream = stream;
                config.attrs = &attribute;
                config.numAttrs = 1;
                CUDA_DRIVER_CHECK(cuLaunchKernelEx(&config, func, args, nullptr));
            }
"""


def kernel_driver(original: Callable[..., str]) -> Callable[..., str]:
    """Adds ``launchDependentKernel`` to the helpers at the top of a program's C++."""
    return functools.wraps(original)(lambda self: original(self) + _LAUNCH)


class _Renaming:
    """A code buffer that replaces ``launchKernel`` by ``launchDependentKernel``."""

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffer, name)

    def writeline(self, line: Any) -> None:
        """Writes one line."""
        self._buffer.writeline(
            line.replace("launchKernel(", "launchDependentKernel(") if isinstance(line, str) else line
        )


def generate_launch_kernel(original: Callable[..., None]) -> Callable[..., None]:
    """Writes the launch of a kernel: a dependent launch if the kernel itself waits for its predecessors."""

    @functools.wraps(original)
    def generate(self: Any, prefix: Any, wrapper: Any, kernel_var_name: str, params: dict[str, Any]) -> None:
        facts = facts_named(params["inductor_meta"]["kernel_name"])
        early_start = None if facts is None else facts.early_start
        dependent = early_start is not None and params["triton_meta"]["constants"].get(early_start)
        dependent = dependent or params["triton_meta"].get(_WAITS)
        original(self, _Renaming(prefix) if dependent else prefix, wrapper, kernel_var_name, params)

    return generate


_WAITS = "launch_pdl"
"""The entry of a kernel's description that says that the kernel waits. Triton has an option of this name."""

_HEAD = re.compile(r"^def [\w.]+\([^\n]*\):\n", re.M)

# A kernel whose programs all run lets the next kernel's start. They wait, because each begins like this one.
_FIRST = "    tl.extra.cuda.gdc_wait()\n    tl.extra.cuda.gdc_launch_dependents()\n"


def define_kernel(original: Callable[..., str], capability: tuple[int, int]) -> Callable[..., str]:
    """Makes every kernel that Inductor generates wait for its predecessors, on archs that can launch it before."""

    @functools.wraps(original)
    def define(self: Any, source: str, *args: Any, **kwargs: Any) -> str:
        return original(self, waiting(source) if capability >= (9, 0) else source, *args, **kwargs)

    return define


def waiting(source: str) -> str:
    """The source of a module with one kernel, which now waits, and says so in its description.

    Raises:
        ValueError: the source looks different from Inductor's.
    """
    source = source.replace(f"'{_WAITS}': False", f"'{_WAITS}': True")
    if f"'{_WAITS}': True" not in source:
        source = source.replace("triton_meta={", f"triton_meta={{'{_WAITS}': True, ", 1)
    marked = source.rpartition("@triton.jit\n")
    source, heads = _HEAD.subn(lambda head: head[0] + _FIRST, marked[2], count=1)
    if not marked[1] or heads != 1 or f"'{_WAITS}': True" not in marked[0]:
        raise ValueError(f"Inductor writes kernels in another form than expected:\n{marked[2][:500]}")
    return "".join((*marked[:2], source))


def generate_ttir(original: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves the wait out of the intermediate code from which Inductor learns what a kernel writes.

    The wait is assembly. Inductor assumes that assembly writes to all arguments, and would copy the caches.
    """

    @functools.wraps(original)
    def without_waiting(kernel: Any, kwargs: dict[str, Any], *args: Any) -> Any:
        facts = facts_of(kernel)
        if facts is not None and facts.early_start is not None:
            kwargs = {**kwargs, facts.early_start: False}
        return original(kernel, kwargs, *args)

    return without_waiting
