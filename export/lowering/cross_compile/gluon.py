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
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from flashpte.kernels.hopper import _tiled_hopper_kernel
from flashpte.kernels.tiled import _tiled_kernel


def source_code(original: Callable[..., str]) -> Callable[..., str]:
    """The source of a kernel and of all it calls, as Inductor writes it behind ``@triton.jit``."""

    @functools.wraps(original)
    def transitive_closure(kernel: Any, *args: Any, **kwargs: Any) -> str:
        if not isinstance(kernel, GluonJITFunction):
            return original(kernel, *args, **kwargs)
        parts = [kernel.src, "from triton.experimental import gluon\n"]
        _add_dependencies(kernel, parts, {kernel.fn.__name__})
        return "\n".join(parts)

    return transitive_closure


def _add_dependencies(function: JITFunction[Any], parts: list[str], seen: set[str]) -> None:
    """Appends definitions of the global names that ``function`` uses."""
    for name in function.fn.__code__.co_names:
        if name in seen or name not in function.fn.__globals__:
            continue
        seen.add(name)
        value = function.fn.__globals__[name]
        if isinstance(value, JITFunction):
            parts.append(f"@gluon.jit\n{value.src}")
            _add_dependencies(value, parts, seen)
        elif isinstance(value, types.ModuleType):
            parts.append(f"import {value.__name__} as {name}\n")
        else:
            parts.append(f"from {value.__module__} import {value.__name__} as {name}\n")


def ast_source(original: Callable[..., Any]) -> Callable[..., Any]:
    """What Triton compiles: a kernel whose module knows Gluon's language as ``gl`` is Gluon, whatever decorates it."""

    @functools.wraps(original, updated=())
    def make(fn: JITFunction[Any], *args: Any, **kwargs: Any) -> Any:
        if fn.fn.__globals__.get("gl") is gl:
            return GluonASTSource(GluonJITFunction(fn.fn), *args, **kwargs)
        return original(fn, *args, **kwargs)

    return make


def generate_ttir(original: Callable[..., Any]) -> Callable[..., Any]:
    """The intermediate code from which Inductor learns what a kernel writes: for Hopper's, that of its Triton twin."""

    @functools.wraps(original)
    def of_twin(kernel: Any, kwargs: dict[str, Any], *args: Any) -> Any:
        # A launch that names the number of warps comes as a list of one configuration.
        inner = kernel.fn if isinstance(kernel, Autotuner) else kernel
        if inner is not _tiled_hopper_kernel:
            return original(kernel, kwargs, *args)
        given = dict(kwargs)
        del given["CONSUMER_REGISTERS"], given["PRODUCER_REGISTERS"]
        tile = {"BLOCK_M": 128, "EXACT": False, "EDGE_BLOCK_N": given["BLOCK_N"], "EDGE_STAGES": 1}
        return original(_twin(), {**given, **tile}, *args)

    return of_twin


@functools.cache
def _twin() -> JITFunction[Any]:
    """The tiled kernel under the name of Hopper's, which is how Inductor looks for it."""
    fn = _tiled_kernel.fn
    name = _tiled_hopper_kernel.fn.__name__
    renamed = types.FunctionType(fn.__code__, fn.__globals__, name, fn.__defaults__, fn.__closure__)
    renamed.__annotations__, renamed.__module__, renamed.__qualname__ = fn.__annotations__, fn.__module__, name
    return triton.jit(renamed)
