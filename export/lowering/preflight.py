"""Refuses requests and programs before compiling, with one line that says what to change."""

from __future__ import annotations

import json
import keyword
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from flashpte.export.common.errors import ExportError, UsageError
from flashpte.export.common.options import Attention, Format
from flashpte.export.files.dtypes import dtype_name
from flashpte.export.files.names import OUTPUT_NAMES
from flashpte.export.files.output_folder import check_output_folder
from flashpte.export.lowering.complex_numbers import why_not_real
from flashpte.export.lowering.cross_compile.toolchain import CrossCompileError, find_cccl_include, find_compiler
from flashpte.export.lowering.executorch import MUTABLE_BUFFER_METADATA
from flashpte.export.lowering.mutated_buffers import mutated_inputs, returned_buffers
from flashpte.export.lowering.shims import has_dtype

# Matrix multiplies that become Triton templates, which do not support float64.
_MATMULS = frozenset({"mm", "bmm", "addmm", "baddbmm", "linear", "einsum", "scaled_dot_product_attention"})


def check_surroundings(output: Path, extra_files: Sequence[Path]) -> None:
    """Checks what does not depend on the programs: the output folder, the tools and the files to copy.

    Raises:
        UsageError: an extra file has the name of another output file.
        ExportError: a file or tool is missing, a file cannot be read, the output folder cannot be written, or
            ``TRITON_INTERPRET=1`` is set.
    """
    check_output_folder(output)
    taken = {*OUTPUT_NAMES}
    for file in map(Path, extra_files):
        try:
            if not file.is_file():
                raise ExportError(f"extra file {file} does not exist")
            file.open("rb").close()
        except OSError as error:
            raise ExportError(f"extra file {file} cannot be read: {error.strerror}") from error
        if file.name in taken:
            raise UsageError(f"extra file {file} would replace another file of that name in the output")
        taken.add(file.name)
    check_tools()


def check_tools() -> None:
    """Checks what compiling needs of this process and machine.

    Raises:
        CrossCompileError: a compiler or header is missing, or ``TRITON_INTERPRET=1`` is set.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise CrossCompileError("TRITON_INTERPRET=1 is set: kernels decorated under it cannot be compiled; unset it")
    find_compiler()
    find_cccl_include()


def check_request(
    programs: Mapping[str, ExportedProgram],
    package: str,
    attention: str,
    constants: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> None:
    """Checks that the arguments of :func:`flashpte.export.lowering.lower` fit together.

    Raises:
        UsageError: they do not.
    """
    if package not in get_args(Format):
        raise UsageError(f"unknown format {package!r} (known: {', '.join(get_args(Format))})")
    if attention not in get_args(Attention):
        raise UsageError(f"unknown attention {attention!r} (known: {', '.join(get_args(Attention))})")
    _check_names(programs, {*constants, *([MUTABLE_BUFFER_METADATA] if package == "pte" else [])})
    if package == "pt2":
        if len(programs) != 1:
            raise UsageError(
                f"a .pt2 holds one method, {len(programs)} were given ({', '.join(programs)}): methods of a package "
                "cannot share a KV cache; lower to .pte, or lower each method to its own .pt2"
            )
        if attention == "executorch":
            raise UsageError("attention 'executorch' needs format 'pte': the kernels belong to ExecuTorch's backend")
    for name, value in constants.items():
        _check_constant(name, value)
    try:
        json.dumps(manifest)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the manifest's extra entries cannot be written as JSON: {error}") from error


def _check_names(programs: Mapping[str, ExportedProgram], constants: Collection[str]) -> None:
    if not programs:
        raise UsageError("no programs to lower")
    for name, program in programs.items():
        if not name.isidentifier() or keyword.iskeyword(name):
            raise UsageError(f"method name {name!r} is not an identifier")
        if not isinstance(program, ExportedProgram):
            raise UsageError(f"method {name} is a {type(program).__name__}: pass what torch.export.export returns")
        if name in constants:
            raise UsageError(f"{name} is both a method and a constant method")


def _check_constant(name: str, value: Any) -> None:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UsageError(f"constant method name {name!r} is not an identifier")
    for item in value if isinstance(value, list | tuple) else (value,):
        if not isinstance(item, int | float | str):  # a bool is an int
            raise UsageError(
                f"constant method {name} has a value of type {type(item).__name__}; "
                "a number, a bool, a string or a list of them can be returned"
            )
        if isinstance(item, int) and not -(2**63) <= item < 2**63:
            raise UsageError(f"constant method {name} has the value {item}, which does not fit in 64 bits")


def check_programs(programs: Mapping[str, ExportedProgram], package: str) -> None:
    """Refuses programs that ExecuTorch or its CUDA backend would refuse minutes later with an obscure error.

    Raises:
        UsageError: two methods have different tensors of one name.
        ExportError: a method does something that no GPU kernel or no ``.pte`` supports.
    """
    for name, program in programs.items():
        for node in _unsigned_products(program):
            raise ExportError(
                f"method {name} multiplies uint8 by int8 ({node}), which no GPU kernel takes: torchao writes this "
                "product for int8 activations on a CPU; quantize only the weights"
            )
    if package != "pte":
        return
    for name, program in programs.items():
        for fqn in returned_buffers(program):
            raise ExportError(f"method {name} writes to buffer {fqn} and returns it: return {fqn}.clone()")
        for argument in mutated_inputs(program):
            raise ExportError(
                f"method {name} writes to its input {argument}, which a .pte cannot do: "
                "write to a clone, or keep the tensor as a buffer"
            )
        matmuls = list(_float64_matmuls(program))
        if matmuls:
            raise ExportError(
                f"method {name} multiplies float64 matrices ({matmuls[0]}, {len(matmuls)} in all), "
                "for which ExecuTorch's CUDA backend has no kernel: use float32"
            )
        for what, dtype in _foreign_dtypes(program):
            raise ExportError(
                f"method {name}: {what} is {dtype_name(dtype)}, which ExecuTorch's CUDA delegate does "
                "not have: convert it, or lower to .pt2"
            )
        if (reason := why_not_real(program)) is not None:
            raise ExportError(f"method {name}: {reason}")
    _check_shared_tensors(programs)


def _unsigned_products(program: ExportedProgram) -> Iterator[str]:
    """Yields integer products whose first operand is not int8."""
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten._int_mm.default):
        if node.args[0].meta["val"].dtype != torch.int8:
            yield node.name


def _foreign_dtypes(program: ExportedProgram) -> Iterator[tuple[str, torch.dtype]]:
    """Yields inputs, outputs, weights and buffers with a dtype that ExecuTorch's CUDA delegate does not have."""
    results = {node for node in program.graph.output_node().args[0] if isinstance(node, Node)}
    names = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and not has_dtype(value.dtype):
            if node.op == "placeholder" and (node.users or node.name not in names):
                yield names.get(node.name, f"input {node.name}"), value.dtype
            elif node in results:
                yield f"output {node.name}", value.dtype


def _float64_matmuls(program: ExportedProgram) -> Iterator[str]:
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            value = node.meta.get("val")
            called = getattr(getattr(node.target, "overloadpacket", None), "__name__", None)
            if called == "matmul":  # with a vector it does not become a matrix multiply
                called = "mm" if all(argument.meta["val"].ndim >= 2 for argument in node.args[:2]) else None
            if called in _MATMULS and isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                yield node.name


def _check_shared_tensors(programs: Mapping[str, ExportedProgram]) -> None:
    first: dict[str, tuple[str, torch.Tensor]] = {}
    for method, program in programs.items():
        signature = program.graph_signature
        for fqn in (*signature.inputs_to_parameters.values(), *signature.inputs_to_buffers.values()):
            tensor = program.state_dict.get(fqn, program.constants.get(fqn))
            if not isinstance(tensor, torch.Tensor):
                continue
            other, before = first.setdefault(fqn, (method, tensor))
            if not _is_same(before, tensor):
                raise UsageError(
                    f"methods {other} and {method} hold different tensors named {fqn}: "
                    "methods share weights and buffers by name; rename one"
                )


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    # compare bytes, so that a NaN equals itself
    left, right = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(left, right)
