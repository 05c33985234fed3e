"""Changes how Inductor lays out tensors in memory: arguments of Triton kernels and a program's outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashpte.export.lowering.cross_compile.toolchain import CrossCompileError
from flashpte.passes.graph.views import Kind, kind_of

_VIEWS = (Kind.RESHAPE, Kind.EXPAND, Kind.PERMUTE, Kind.TRANSPOSE, Kind.SLICE, Kind.SELECT)


def realise_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """Writes a computed argument to memory once, not as a new copy for each kernel.

    Inductor holds a pointwise result as a formula until something needs it in memory. A kernel needs its argument in
    memory with given strides, so Inductor writes the formula's values to a new buffer, but the next kernel sees the
    formula again. If the value is realized under its own name, all kernels find it.
    """

    def constrain_to_fake_tensor(arg: Any, fake_arg: Any) -> Any:
        from torch._inductor.ir import StorageBox, TensorBox

        if isinstance(arg, TensorBox) and isinstance(arg.data, StorageBox) and fake_arg is not None:
            arg.realize()
        return original(arg, fake_arg)

    return constrain_to_fake_tensor


def pin_cond_operands(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gives the operands of a ``torch.cond`` the memory layout that they had when its branches were traced."""

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


def keep_old_values(original: Callable[..., None]) -> Callable[..., None]:
    """Keeps copies of a buffer that the program writes later.

    Inductor removes a copy if its source is neither an input nor an output. It knows a lowered program's buffers as
    constants, so it would return the new value of a buffer for ``before = buffer.clone()``.
    """
    clone = torch.ops.aten.clone.default

    def remove_copies(graph: torch.fx.Graph) -> None:
        written = {_held(node.args[0]) for node in graph.nodes if node.target is torch.ops.aten.copy_.default}
        kept = [node for node in graph.nodes if node.target is clone and _held(node.args[0]) in written]
        for node in kept:
            node.target = _kept_copy
        try:
            original(graph)
        finally:
            for node in kept:
                node.target = clone

    return remove_copies


def _held(node: Any) -> Any:
    """The tensor that a node is a view of."""
    while kind_of(node) in _VIEWS:
        node = node.args[0]
    return node


def _kept_copy(source: torch.Tensor, **options: Any) -> torch.Tensor:
    """Stands for ``clone`` while Inductor removes copies."""
    return torch.clone(source, **options)


def whole_outputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Writes every output of a program contiguously to memory of its own, at offset 0.

    ExecuTorch's CUDA delegate refuses an output with a storage offset or gaps (``_check_tensor_metadata`` in
    ``backends/cuda/runtime/utils.h``), and frees memory twice that two outputs share. Inductor returns views of its
    buffers and drops a ``clone`` before an output. An output that is a whole buffer is not copied.
    """

    def output(graph: Any, target: Any, args: Any, kwargs: Any) -> Any:
        if not _is_program(graph):
            return original(graph, target, args, kwargs)
        taken: set[str] = set(graph.graph_input_names)
        results = [_whole(graph, result, taken) for result in args[0]]
        return original(graph, target, (type(args[0])(results), *args[1:]), kwargs)

    return output


def _whole(graph: Any, result: Any, taken: set[str]) -> Any:
    from torch._inductor.ir import BaseView, ExternKernel, TensorBox, is_storage_and_layout

    if not isinstance(result, TensorBox | BaseView):
        return result  # a number or None
    realised = ExternKernel.realize_input(result)
    if not is_storage_and_layout(realised):
        return result
    contiguous = _contiguous(realised)
    name = contiguous.get_name()
    # The runtime would copy a stored tensor on the default stream, which fails while a CUDA graph is recorded.
    if name in taken or name in graph.constants or partial_output(contiguous) is not None:
        contiguous = _contiguous(ExternKernel.copy_input(contiguous))
        name = contiguous.get_name()
    taken.add(name)
    return contiguous if isinstance(contiguous, TensorBox) else TensorBox(contiguous)


def _contiguous(tensor: Any) -> Any:
    from torch._inductor.ir import ExternKernel

    # Inductor mistakes an empty tensor's strides for an expanded tensor's. The runtime does not look at them.
    return tensor if _is_empty(tensor) else ExternKernel.require_contiguous_strides(tensor)


def _is_empty(tensor: Any) -> bool:
    """Whether one of a tensor's sizes is known to be 0."""
    from torch._inductor.virtualized import V

    return any(V.graph.sizevars.statically_known_equals(size, 0) for size in tensor.get_size())


def partial_output(output: Any) -> str | None:
    """Why ExecuTorch's runtime would refuse an output of a compiled program; ``None`` if it would not."""
    from torch._inductor.ir import FlexibleLayout
    from torch._inductor.virtualized import V

    layout = output.get_output_spec()
    size, stride = list(layout.size), list(layout.stride)
    same = V.graph.sizevars.statically_known_equals
    if not same(layout.offset, 0):
        return f"begins at element {layout.offset} of its memory"
    if not _is_empty(output) and not all(
        same(have, want) or same(length, 1)
        for have, want, length in zip(stride, FlexibleLayout.contiguous_strides(size), size, strict=True)
    ):
        return f"has strides {stride} for sizes {size}, which are not contiguous"
    return None


def check_outputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses a compiled program with an output that ExecuTorch's runtime would refuse at the first call.

    The replacement raises :class:`CrossCompileError` with the output's index and the reason.
    """

    def codegen(graph: Any) -> Any:
        result = original(graph)
        seen: set[str] = set()
        for index, output in enumerate(graph.graph_outputs if _is_program(graph) else ()):
            if not hasattr(output, "get_output_spec") or output.maybe_get_layout() is None:
                continue
            problem = partial_output(output)
            name = output.get_name()
            if problem is None and name in seen:
                problem = "shares its memory with another output"
            if problem is not None:
                raise CrossCompileError(f"output {index} {problem}: ExecuTorch's runtime would refuse it")
            seen.add(name)
        return result

    return codegen


def _is_program(graph: Any) -> bool:
    """Whether a graph that Inductor lowers is the program itself, not a subgraph or a graph that computes constants."""
    from torch._inductor.graph import GraphLowering

    return type(graph) is GraphLowering and not graph.is_const_graph
