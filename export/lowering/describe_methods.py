"""Describes a method for the manifest: its inputs, its outputs and the buffers that it writes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from flashpte.export.files.dtypes import dtype_name
from flashpte.export.lowering.mutated_buffers import mutated_buffers


def describe_method(program: ExportedProgram) -> dict[str, Any]:
    """Describes a method's inputs and outputs, in calling order, with dtypes and shapes.

    A static size is a number. A dynamic size is ``[smallest, largest]``, with ``null`` for no upper bound; ``dynamic``
    holds its expression by dimension, and equal expressions are equal sizes. ``buffers`` has the dtype and shape of
    each mutable buffer, and ``starts_as_zeros: false`` for a buffer that does not start as zeros.
    """
    mutable = mutated_buffers([program])
    by_name = {node.name: node.meta.get("val") for node in program.graph.nodes}
    buffers = {fqn: by_name[name] for name, fqn in program.graph_signature.inputs_to_buffers.items()}
    initial = {**program.constants, **program.state_dict}
    inputs = [
        _describe_value(spec.arg, by_name, program)
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.USER_INPUT
    ]
    outputs = [
        _describe_value(spec.arg, by_name, program)
        for spec in program.graph_signature.output_specs
        if spec.kind == OutputKind.USER_OUTPUT
    ]
    return {
        "inputs": inputs,
        "outputs": outputs,
        "mutable_buffers": list(mutable),
        "buffers": {fqn: _describe_buffer(buffers[fqn], initial.get(fqn)) for fqn in mutable},
    }


def _describe_buffer(value: torch.Tensor, initial: Any) -> dict[str, Any]:
    described = {"dtype": dtype_name(value.dtype), "shape": list(value.shape)}
    zeros = not isinstance(initial, torch.Tensor) or not bool(initial.any())
    return described if zeros else {**described, "starts_as_zeros": False}


def _describe_value(argument: Any, by_name: Mapping[str, Any], program: ExportedProgram) -> dict[str, Any]:
    name = str(argument.name)
    if isinstance(argument, ConstantArgument):
        return {"name": name, "constant": argument.value}
    value = by_name.get(name)
    if not isinstance(value, torch.Tensor):
        return {"name": name, "type": type(value).__name__}
    described = {
        "name": name,
        "dtype": dtype_name(value.dtype),
        "shape": [_describe_size(size, program) for size in value.shape],
    }
    dynamic = {str(axis): str(size) for axis, size in enumerate(value.shape) if not isinstance(size, int)}
    return {**described, "dynamic": dynamic} if dynamic else described


def _describe_size(size: int | torch.SymInt, program: ExportedProgram) -> int | list[int | None]:
    if isinstance(size, int):
        return size
    # Use the declared range: tracing assumes that every dynamic size is at least 2, also where 1 is declared and works.
    bounds = program.range_constraints.get(size.node.expr)
    if bounds is None:
        bounds = size.node.shape_env.bound_sympy(size.node.expr)
    limits: list[int | None] = []
    for bound in (bounds.lower, bounds.upper):
        # "No bound" is sympy's infinity or ``int_oo``, which claims to be finite.
        limits.append(int(bound) if bound.is_Integer and int(bound) < 2**62 else None)
    return limits
