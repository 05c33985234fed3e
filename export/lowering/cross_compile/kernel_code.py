"""Caches the intermediate code from which Inductor learns what a kernel writes.

PyTorch makes it anew at every launch that it visits, and it visits each launch four or five times between a program and
its C++. The layers of a model launch the same kernels with arguments of the same kinds. A program with two layers that
each choose between two kernels asks 48 times for 11 different codes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
import triton.language as tl
from torch._subclasses import FakeTensor
from triton.runtime.autotuner import Autotuner

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool, sympy.Expr)
_PLAIN = (bool, int, float, str, type(None), torch.dtype, tl.dtype)


def remember(original: Callable[..., Any]) -> Callable[..., Any]:
    """A ``generate_ttir`` that answers from a cache when everything that the code depends on is the same."""
    # Keeps the kernels alive, so that no other kernel gets their address.
    known: dict[Any, tuple[Any, Any, tuple[str, ...]]] = {}

    @functools.wraps(original)
    def generate_ttir(kernel: Any, kwargs: dict[str, Any], metadata: Any, *args: Any) -> tuple[Any, list[str]]:
        described = None if metadata or args else _describe(kernel, kwargs)
        if described is None:
            return original(kernel, kwargs, metadata, *args)
        if described not in known:
            module, names = original(kernel, kwargs, metadata)
            known[described] = (kernel, module, tuple(names))
        _, module, names = known[described]
        return module, list(names)

    return generate_ttir


def _describe(kernel: Any, kwargs: Mapping[str, Any]) -> Any:
    """The kernel, and the part of each argument that its code depends on; ``None`` if that is not known."""
    if isinstance(kernel, Autotuner):
        # A launch that sets the number of warps arrives as an Autotuner with one configuration, made for this launch.
        kwargs = {**kwargs, **(kernel.configs[0].kwargs if kernel.configs else {})}
        kernel = kernel.fn
    arguments = [(name, _kind(value)) for name, value in kwargs.items()]
    return None if any(kind is None for _, kind in arguments) else (id(kernel), frozenset(arguments))


def _kind(value: Any) -> Any:
    from torch._inductor.ir import TensorBox

    if isinstance(value, (FakeTensor, TensorBox)):
        return "tensor", value.dtype
    if isinstance(value, _SYMBOLIC):
        return ("symbolic",)
    # 1, 1.0 and True are equal but give different code, and so do 0.0 and -0.0.
    return (type(value), repr(value)) if isinstance(value, _PLAIN) else None
