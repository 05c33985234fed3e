"""Writes complex arithmetic as real arithmetic: Inductor leaves it to libtorch, which ExecuTorch does not have.

Llama 4, Meta's own Llama and DeepSeek rotate queries and keys by complex products. Each complex tensor of a program
becomes two real ones, and so does a complex weight or buffer. Views act on both parts alike. Products are
``(a + b i) (c + d i) = (a c - b d) + (a d + b c) i``, in the dtype of the parts, as PyTorch computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

from flashpte.export.lowering.cross_compile.host_weights import deepcopy_sharing_tensors
from flashpte.export.lowering.plain_errors import LoweringError
from flashpte.passes.graph.planned import Inserted, Value, planned
from flashpte.passes.graph.values import all_nodes

aten = torch.ops.aten

Parts = tuple[Value, Value]
"""The real and the imaginary part of a complex tensor."""

_EACH_PART = frozenset({
    aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.expand.default,
    aten.index.Tensor, aten.index_select.default, aten.neg.default, aten.permute.default, aten.repeat.default,
    aten.reshape.default, aten.select.int, aten.slice.Tensor, aten.squeeze.dim, aten.transpose.int,
    aten.unsqueeze.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints,
})  # fmt: skip
"""Operators that do the same to both parts of their first argument, the only complex one."""

_CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default})
_CONJUGATES = (aten._conj.default, aten.conj.default, aten.conj_physical.default)


def with_real_numbers(program: ExportedProgram) -> ExportedProgram:
    """Rewrites a program so that no tensor in it is complex.

    Args:
        program: a program; it stays as it is.

    Returns:
        A functional program with the same weights, or ``program`` itself if nothing in it is complex.

    Raises:
        LoweringError: a complex tensor is an input or an output, is written, or is in a branch, or an operator on one
            is not known here.
    """
    if not has_complex(program.graph_module):
        return program
    # Without writes in place, the parts of a tensor may be computed where they are used.
    program = deepcopy_sharing_tensors(program, {}).run_decompositions({})
    rewrite = _Rewrite(program)
    for node in list(program.graph.nodes):
        rewrite.visit(node)
    for node in reversed(list(program.graph.nodes)):
        if node.op == "call_function" and not node.users and rewrite.is_done(node):
            program.graph.erase_node(node)
    program.graph_module.recompile()
    if has_complex(program.graph_module):
        raise LoweringError("an input, a buffer that is written, or a branch has complex numbers")
    return program


def real_if_known(program: ExportedProgram) -> ExportedProgram:
    """The result of :func:`with_real_numbers`; a program that it refuses stays as it is."""
    try:
        return with_real_numbers(program)
    except LoweringError:
        return program


def why_not_real(program: ExportedProgram) -> str | None:
    """Why :func:`with_real_numbers` would refuse a program; ``None`` if it would not."""
    try:
        with_real_numbers(program)
    except LoweringError as error:
        return str(error)
    return None


class _Rewrite:
    """The parts of every complex node that was visited."""

    def __init__(self, program: ExportedProgram) -> None:
        self._parts: dict[Node, Parts] = {}
        self._done: set[Node] = set()
        self._inserted = Inserted()
        self._program = program
        self._weights = set(_unwritten_weights(program))

    def is_done(self, node: Node) -> bool:
        """Whether a node was replaced, so that it can go once nothing uses it."""
        return node in self._done

    def visit(self, node: Node) -> None:
        """Finds the parts of a complex node, and replaces a real one that is computed from complex ones."""
        if node.op == "placeholder":
            if _is_complex(node) and node.name in self._weights:
                self._split_weight(node)
        elif _is_complex(node):
            self._parts[node] = parts = self._compute(node)
            value = node.meta["val"]
            for part in parts:  # a broadcast or a promotion that only complex tensors have
                if part.meta["val"].shape != value.shape or part.meta["val"].dtype != value.dtype.to_real():
                    raise _unknown(node)
            self._done.add(node)
        elif any(map(self._is_complex, node.all_input_nodes)):
            self._replace(node)

    def _is_complex(self, given: Any) -> bool:
        return _is_complex(given) or (isinstance(given, Node) and given in self._parts)

    def _split_weight(self, node: Node) -> None:
        """Keeps a complex weight as a real one [..., 2]."""
        spec = next(spec for spec in self._program.graph_signature.input_specs if spec.arg.name == node.name)
        held: Any = self._program.constants
        if spec.target in self._program.state_dict:
            held = self._program.state_dict
        tensor = torch.view_as_real(held[spec.target].detach().resolve_conj()).contiguous()
        held[spec.target] = torch.nn.Parameter(tensor, False) if spec.kind == InputKind.PARAMETER else tensor
        value = node.meta["val"]
        node.meta["val"] = value.new_empty((*value.shape, 2), dtype=value.dtype.to_real())
        self._parts[node] = _halves(node)

    def _replace(self, node: Node) -> None:
        if node.target is aten._assert_tensor_metadata.default:
            self._done.add(node)
            return
        parts = self._of(node, node.args[0])
        if node.target is aten.view_as_real.default:
            result: Value = planned(aten.stack.default, list(parts), -1, near=node)
        elif node.target in (aten.real.default, aten.imag.default):
            result = parts[node.target is aten.imag.default]
        else:
            raise _unknown(node)
        [made] = self._inserted.insert([result], before=node)
        node.replace_all_uses_with(made)
        self._done.add(node)

    def _compute(self, node: Node) -> Parts:
        op, args = node.target, node.args
        if op is aten.view_as_complex.default:
            return _halves(self._real(node, args[0]))
        if op is aten.complex.default:
            return self._real(node, args[0]), self._real(node, args[1])
        if op is aten.polar.default:
            size, angle = self._real(node, args[0]), self._real(node, args[1])
            waves = (planned(function, angle, near=node) for function in (aten.cos.default, aten.sin.default))
            real, imag = (planned(aten.mul.Tensor, size, wave, near=node) for wave in waves)
            return real, imag
        if op in _CASTS:
            return self._cast(node)
        parts = self._of(node, args[0]) if self._is_complex(args[0]) else None
        if parts is not None and op in _EACH_PART and not any(map(self._is_complex, node.all_input_nodes[1:])):
            return _both(parts, lambda part: planned(op, part, *args[1:], near=node, **node.kwargs))
        if parts is not None and op in _CONJUGATES:
            return parts[0], planned(aten.neg.default, parts[1], near=node)
        if parts is not None and op in (aten.resolve_conj.default, aten.resolve_neg.default):
            return parts
        if op in (aten.mul.Tensor, aten.mul.Scalar):
            return self._product(node)
        if op in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
            return self._sum(node)
        if op is aten.div.Tensor and parts is not None and self._is_real(args[1]):
            return _both(parts, lambda part: planned(op, part, args[1], near=node))
        raise _unknown(node)

    def _of(self, node: Node, given: Any) -> Parts:
        if given not in self._parts:
            raise _unknown(node)
        return self._parts[given]

    def _cast(self, node: Node) -> Parts:
        """A cast to the same complex dtype, such as a move between devices, or to another one."""
        given = node.args[0]
        if not self._is_complex(given):
            raise _unknown(node)
        dtype = node.meta["val"].dtype.to_real()
        device = node.meta["val"].device
        return _both(
            self._of(node, given),
            lambda part: planned(aten._to_copy.default, part, dtype=dtype, device=device, near=node),
        )

    def _product(self, node: Node) -> Parts:
        first, second = node.args[:2]
        if self._is_real(first):
            first, second = second, first
        a, b = self._of(node, first)
        if self._is_real(second):
            return _both((a, b), lambda part: planned(node.target, part, second, near=node))
        if isinstance(second, complex):
            c: Any = second.real
            d: Any = second.imag
        else:
            c, d = self._of(node, second)

        def times(x: Value, y: Any) -> Value:
            return planned(aten.mul.Tensor, x, y, near=node)

        return (
            planned(aten.sub.Tensor, times(a, c), times(b, d), near=node),
            planned(aten.add.Tensor, times(a, d), times(b, c), near=node),
        )

    def _sum(self, node: Node) -> Parts:
        pairs = [self._of(node, given) for given in node.args[:2]]
        real, imag = (planned(node.target, x, y, near=node) for x, y in zip(*pairs, strict=True))
        return real, imag

    def _is_real(self, argument: Any) -> bool:
        return not isinstance(argument, complex) and not self._is_complex(argument)

    def _real(self, node: Node, argument: Any) -> Node:
        if not isinstance(argument, Node) or self._is_complex(argument):
            raise _unknown(node)
        return argument


def _unwritten_weights(program: ExportedProgram) -> Iterator[str]:
    """Names of the placeholders of weights and buffers that nothing writes."""
    written = set(program.graph_signature.buffers_to_mutate.values())
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and (
            spec.target not in written
        ):
            yield spec.arg.name


def _halves(tensor: Value) -> Parts:
    real, imag = (planned(aten.select.int, tensor, -1, place, near=tensor) for place in (0, 1))
    return real, imag


def _both(parts: Parts, function: Callable[[Value], Value]) -> Parts:
    return function(parts[0]), function(parts[1])


def _is_complex(value: Any) -> bool:
    held = value.meta.get("val") if isinstance(value, Node) else value
    return isinstance(held, torch.Tensor) and held.is_complex()


def _unknown(node: Node) -> LoweringError:
    return LoweringError(
        f"{node.name} ({node.target}) computes with complex numbers, which ExecuTorch's CUDA backend does not have; "
        "flashpte writes only RoPE's operators as real ones"
    )


def has_complex(module: GraphModule) -> bool:
    """Whether some tensor in a graph, or in the branches in it, is complex."""
    return any(map(_is_complex, all_nodes(module)))
