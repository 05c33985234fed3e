"""Teaching Inductor to take kernels written in Gluon.

Inductor (2.11 to 2.15) writes a user's kernel out as source, compiles that source as Triton, and finds out what the
kernel writes by reading its intermediate code, which for Gluon it cannot make: it would assume that all arguments are
written and copy the caches. The three functions here stand in for the three places.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from flashpte.kernels import hopper


def source_code(original: Callable[..., str]) -> Callable[..., str]:
    """The source of a kernel and of all it calls, as Inductor writes it behind ``@triton.jit``."""

    @functools.wraps(original)
    def transitive_closure(kernel: Any, *args: Any, **kwargs: Any) -> str:
        if not isinstance(kernel, GluonJITFunction):
            return original(kernel, *args, **kwargs)
        imports = ["from triton.experimental import gluon\n"]
        functions: list[str] = []
        _add_dependencies(kernel, imports, functions, {kernel.fn.__name__})
        return "\n".join([kernel.src, *imports, *functions])

    return transitive_closure


def _add_dependencies(function: JITFunction[Any], imports: list[str], functions: list[str], seen: set[str]) -> None:
    """Appends definitions of the global names that ``function`` uses."""
    for name in function.fn.__code__.co_names:
        if name in seen or name not in function.fn.__globals__:
            continue
        seen.add(name)
        value = function.fn.__globals__[name]
        if isinstance(value, JITFunction):
            decorator = "@gluon.jit" if isinstance(value, GluonJITFunction) else "@triton.jit"
            functions.append(f"{decorator}\n{value.src}")
            _add_dependencies(value, imports, functions, seen)
        elif isinstance(value, tl.constexpr):
            functions.append(f"{name} = gl.constexpr({value.value!r})")
        elif isinstance(value, types.ModuleType):
            imports.append(f"import {value.__name__} as {name}\n")
        else:
            imports.append(f"from {value.__module__} import {value.__name__} as {name}\n")


def ast_source(original: Callable[..., Any]) -> Callable[..., Any]:
    """What Triton compiles: a kernel whose module knows Gluon's language as ``gl`` is Gluon, whatever decorates it."""

    @functools.wraps(original, updated=())
    def make(fn: JITFunction[Any], *args: Any, **kwargs: Any) -> Any:
        if fn.fn.__globals__.get("gl") is gl:
            return GluonASTSource(GluonJITFunction(fn.fn), *args, **kwargs)
        return original(fn, *args, **kwargs)

    return make


@triton.jit
def _hopper_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    interval_values_ptr,
    tiles_ptr,
    counts_ptr,
    out_ptr,
    acc_ptr,
    stats_ptr,
    SINGLE_SPLIT: tl.constexpr,
):
    """Reads and writes what the kernel of this name for Hopper does, which is how Inductor looks for it."""
    read = tl.load(q_ptr).to(tl.float32) + tl.load(k_ptr).to(tl.float32) + tl.load(v_ptr).to(tl.float32)
    read += tl.load(mask_ptr).to(tl.float32) + tl.load(interval_values_ptr).to(tl.float32)
    read += tl.load(tiles_ptr).to(tl.float32) + tl.load(counts_ptr).to(tl.float32)
    tl.store(out_ptr, read.to(out_ptr.dtype.element_ty))
    # With one split they are the result. With several, one that works alone writes the result all the same.
    if not SINGLE_SPLIT:
        tl.store(acc_ptr, read)
        tl.store(stats_ptr, read)


def generate_ttir(original: Callable[..., Any]) -> Callable[..., Any]:
    """The intermediate code from which Inductor learns what a kernel writes: for Hopper's, that of its Triton twin."""

    @functools.wraps(original)
    def of_twin(kernel: Any, kwargs: dict[str, Any], *args: Any) -> Any:
        # A launch that names the number of warps comes as a list of one configuration.
        inner = kernel.fn if isinstance(kernel, Autotuner) else kernel
        if inner is not hopper._hopper_kernel:
            return original(kernel, kwargs, *args)
        names = {parameter.name for parameter in _hopper_kernel.params}
        return original(_hopper_kernel, {name: kwargs[name] for name in kwargs if name in names}, *args)

    return of_twin
