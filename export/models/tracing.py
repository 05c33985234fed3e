"""Traces a method for a whole range of lengths, past conditions that hold in the range but that PyTorch cannot prove.

Llama 4's experts reshape a tensor of T rows such that its stride is ``T min(48, 48 T)``. The trace asks whether that is
``48 T``. It is, but sympy does not see it, so ``torch.export`` rejects the range of T. The method is then traced again
with such conditions as assertions in the program, and each is evaluated for every T.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import nn
from torch._dynamo.exc import UserError, UserErrorType
from torch.export import Dim, ExportedProgram
from torch.fx import Node

aten = torch.ops.aten


def export_for_lengths(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], name: str, lengths: range, dims: dict[str, dict[int, Any]]
) -> ExportedProgram:
    """Exports a module whose inputs share one dynamic size.

    Args:
        module: the module.
        inputs: examples of its inputs.
        name: the size's name, for messages.
        lengths: the sizes that the program shall take.
        dims: for each input by name, the dimensions that have this size (``{1: None}``), or an empty table.

    Raises:
        UserError: the module does not take every size.
    """
    size = Dim(name, min=lengths[0], max=lengths[-1])
    shapes = {argument: dict.fromkeys(found, size) or None for argument, found in dims.items()}
    try:
        return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    except UserError as error:
        if error.error_type is not UserErrorType.CONSTRAINT_VIOLATION:
            raise
        program = torch.export.export(
            module, inputs, dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
        )
        if not _drop_assertions(program, lengths):
            raise
        return program


def _drop_assertions(program: ExportedProgram, lengths: range) -> bool:
    """Drops the program's assertions on sizes if all hold for every length; returns whether they do."""
    found = program.graph.find_nodes(op="call_function", target=aten._assert_scalar.default)
    shapes = (node.meta.get("val") for node in program.graph.find_nodes(op="placeholder"))
    sizes: list[Any] = [size for value in shapes if isinstance(value, torch.Tensor) for size in value.shape]
    # The sizes of inputs are the one that they share; any other symbol depends on data.
    known = {symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}
    if not all(_holds(node.args[0], lengths, known) for node in found):
        return False
    for node in found:
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return True


def _holds(condition: Any, lengths: range, known: set[Any]) -> bool:
    value = condition.meta.get("val") if isinstance(condition, Node) else condition
    if not isinstance(value, torch.SymBool):
        return value is True
    expression = value.node.expr
    symbols = expression.free_symbols
    return symbols <= known and all(expression.subs(dict.fromkeys(symbols, length)) is sympy.true for length in lengths)
