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

from flashpte.kernels.hopper import _hopper_kernel
from flashpte.kernels.split_k import _split_k_kernel


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


def generate_ttir(original: Callable[..., Any]) -> Callable[..., Any]:
    """The intermediate code from which Inductor learns what a kernel writes: for Hopper's, that of its Triton twin."""

    @functools.wraps(original)
    def of_twin(kernel: Any, kwargs: dict[str, Any], *args: Any) -> Any:
        # A launch that names the number of warps comes as a list of one configuration.
        inner = kernel.fn if isinstance(kernel, Autotuner) else kernel
        if inner is not _hopper_kernel:
            return original(kernel, kwargs, *args)
        twin = _twin()
        names = {parameter.name for parameter in twin.params}
        given = {name: value for name, value in kwargs.items() if name in names}
        own = {"heads_kv": kwargs["heads"], "BLOCK_R": 16, "SEPARATE_FULL": True, "EXACT": False}
        return original(twin, {**given, **own}, *args)

    return of_twin


@functools.cache
def _twin() -> JITFunction[Any]:
    """The split-K kernel, which writes the same arguments, under the name of Hopper's: Inductor looks for that."""
    fn = _split_k_kernel.fn
    name = _hopper_kernel.fn.__name__
    renamed = types.FunctionType(fn.__code__, fn.__globals__, name, fn.__defaults__, fn.__closure__)
    renamed.__annotations__, renamed.__module__, renamed.__qualname__ = fn.__annotations__, fn.__module__, name
    return triton.jit(renamed)
