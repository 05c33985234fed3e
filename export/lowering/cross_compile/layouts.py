"""Replacements in Inductor that are about where and how the arguments of Triton kernels lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def realise_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """Has a computed argument written to memory as itself, not as a copy made for one kernel alone.

    Inductor holds a pointwise result as a formula until something needs it in memory. A kernel's argument is needed
    there in given strides, and Inductor then writes the formula's values to a new buffer, while the next kernel finds a
    formula again. Written under its own name, it is found by all.
    """

    def constrain_to_fake_tensor(arg: Any, fake_arg: Any) -> Any:
        from torch._inductor.ir import StorageBox, TensorBox

        if isinstance(arg, TensorBox) and isinstance(arg.data, StorageBox) and fake_arg is not None:
            arg.realize()
        return original(arg, fake_arg)

    return constrain_to_fake_tensor


def pin_cond_operands(original: Callable[..., Any]) -> Callable[..., Any]:
    """Has the operands of a ``torch.cond`` laid out in memory as they were when its branches were traced."""

    def call_function(graph: Any, fn: Any, args: Any, kwargs: Any) -> Any:
        if fn is torch.ops.higher_order.cond:
            from torch._inductor.ir import ExternKernel

            *front, operands = args
            traced = [n.meta["val"] if isinstance(n, torch.fx.Node) else n for n in graph.current_node.args[-1]]
            pinned = [
                ExternKernel.require_exact_strides(ExternKernel.realize_input(operand), value.stride())
                if isinstance(value, torch.Tensor)
                else operand
                for operand, value in zip(operands, traced, strict=True)
            ]
            args = (*front, pinned)
        return original(graph, fn, args, kwargs)

    return call_function
