"""Saves work that PyTorch does anew at every launch of a kernel that it visits.

It visits each launch four or five times between a program and its C++, and the layers of a model launch the same
kernels with arguments of the same kinds. A program with two layers that each choose between two kernels asks 48 times
for 11 different intermediate codes, from which it learns what a kernel writes. In SmolLM2 (30 layers, 4 bits, three
methods, 250 s in Inductor) it spent 54 s in reading these codes, and 37 s in tracing each launch once more to turn a
functional call into one that writes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
import triton.language as tl
from torch._subclasses import FakeTensor
from torch.fx import Graph
from triton.runtime.autotuner import Autotuner

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool, sympy.Expr)
_OF_RESULTS = ("val", "tensor_meta", "eager_input_vals", "only_clone_these_tensors")
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


def remember_functions(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A ``ttir_to_functions`` that reads each intermediate code once; its callers only read the answer."""
    known: dict[int, tuple[Any, Any]] = {}

    @functools.wraps(original)
    def ttir_to_functions(module: Any) -> Any:
        if id(module) not in known:
            # Keeps the module alive, so that no other module gets its address.
            known[id(module)] = (module, original(module))
        return known[id(module)][1]

    return ttir_to_functions


def write_in_place(original: Callable[[Graph], None]) -> Callable[[Graph], None]:
    """A ``decompose_triton_kernel_wrapper_functional`` that does not trace the launches whose result is known.

    A functional launch copies what it writes, unless an earlier pass found that it may write in place. For a launch
    that copies nothing, the result is one node: the launch that writes, with the same arguments.
    """

    @functools.wraps(original)
    def decompose(graph: Graph) -> None:
        higher_order = torch.ops.higher_order
        for node in graph.find_nodes(op="call_function", target=higher_order.triton_kernel_wrapper_functional):
            if node.users or node.args or node.kwargs.get("tensors_to_clone") != []:
                continue
            arguments = {name: value for name, value in node.kwargs.items() if name != "tensors_to_clone"}
            with graph.inserting_before(node):
                writing = graph.call_function(higher_order.triton_kernel_wrapper_mutation, (), arguments)
            writing.meta.update({name: value for name, value in node.meta.items() if name not in _OF_RESULTS})
            writing.meta["val"] = None
            if "eager_input_vals" in node.meta:
                _, given = node.meta["eager_input_vals"]
                kept = {name: value for name, value in given.items() if name != "tensors_to_clone"}
                writing.meta["eager_input_vals"] = ((), kept)
            graph.erase_node(node)
        original(graph)

    return decompose


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
