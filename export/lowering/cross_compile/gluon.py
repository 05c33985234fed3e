"""Teaches Inductor to accept kernels written in Gluon.

Inductor (2.11 to 2.15) writes out a user's kernel as source and compiles that source as Triton. It learns what the
kernel writes from its intermediate code, which it cannot make for Gluon: it would assume that all arguments are written
and copy the caches. Each of the three functions here replaces one of these steps. What a kernel reads and writes is
registered beside the kernel (:mod:`flashpte.kernels.facts`).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction

from flashpte.kernels.facts import facts_of


def source_code(original: Callable[..., str]) -> Callable[..., str]:
    """Returns the source of a kernel and of all functions that it calls, which Inductor writes after ``@triton.jit``.

    Raises:
        ValueError: a Gluon kernel has no registered facts.
    """

    @functools.wraps(original)
    def transitive_closure(kernel: Any, *args: Any, **kwargs: Any) -> str:
        if not isinstance(kernel, GluonJITFunction):
            return original(kernel, *args, **kwargs)
        if facts_of(kernel) is None:
            name = kernel.fn.__name__
            raise ValueError(f"{name} is written in Gluon: flashpte.kernels.facts.register has to say what it writes")
        imports = ["from triton.experimental import gluon\n"]
        functions: list[str] = []
        _add_dependencies(kernel, imports, functions, {kernel.fn.__name__})
        return "\n".join([kernel.src, *imports, *functions])

    return transitive_closure


def _add_dependencies(function: JITFunction[Any], imports: list[str], functions: list[str], seen: set[str]) -> None:
    """Appends imports and definitions of the global names that ``function`` uses."""
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
            functions.append(f"{name} = tl.constexpr({value.value!r})")
        elif isinstance(value, types.ModuleType):
            imports.append(f"import {value.__name__} as {name}\n")
        else:
            imports.append(f"from {value.__module__} import {value.__name__} as {name}\n")


def ast_source(original: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a kernel as Gluon if its module has the import that :func:`source_code` writes first.

    Inductor decorates every kernel with ``@triton.jit``, so the decorator does not tell them apart.
    """

    @functools.wraps(original, updated=())
    def make(fn: JITFunction[Any], *args: Any, **kwargs: Any) -> Any:
        if fn.fn.__globals__.get("gluon") is gluon:
            return GluonASTSource(GluonJITFunction(fn.fn), *args, **kwargs)
        return original(fn, *args, **kwargs)

    return make


def generate_ttir(original: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the intermediate code from which Inductor learns a kernel's writes, from its Triton twin if it has one."""

    @functools.wraps(original)
    def of_twin(kernel: Any, kwargs: dict[str, Any], *args: Any) -> Any:
        facts = facts_of(kernel)
        if facts is None or facts.twin is None:
            return original(kernel, kwargs, *args)
        names = set(facts.twin.arg_names)
        return original(facts.twin, {name: kwargs[name] for name in kwargs if name in names}, *args)

    return of_twin
