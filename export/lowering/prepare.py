"""Copies programs for a lowering, in a form that the package can hold."""

from __future__ import annotations

import dataclasses

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind, TensorArgument
from torch.fx import Node

from flashpte.export.lowering.complex_numbers import real_if_known
from flashpte.export.lowering.cross_compile.host_weights import deepcopy_sharing_tensors
from flashpte.export.lowering.top_k import replace_top_k
from flashpte.passes.graph.subclasses import unwrap_weights


def plain_program(program: ExportedProgram, package: str) -> ExportedProgram:
    """A caller's program with plain tensors for torchao's and, for a ``.pte``, real numbers for complex ones.

    All that follows, from the first check to that of the written files, takes this program.
    """
    program = unwrap_weights(program)
    return real_if_known(program) if package == "pte" else program


def prepare_pte(program: ExportedProgram) -> ExportedProgram:
    """Returns a copy of ``program`` for ExecuTorch: it shares the caller's tensors and computes all its outputs.

    ExecuTorch's passes move constants out of their input program, so they get a copy with its own tables.
    """
    program = deepcopy_sharing_tensors(program, {})
    replace_top_k(program.graph_module)
    _clone_returned_placeholders(program)
    return program


def _clone_returned_placeholders(program: ExportedProgram) -> None:
    """Replaces each output that is an input, a weight or a buffer by a clone of it.

    One delegate does all of a method's work, so no tensor may bypass it; the partitioner refuses a weight that is an
    output.
    """
    output = program.graph.output_node()
    results = list(output.args[0])
    specs = program.graph_signature.output_specs
    clones: dict[Node, Node] = {}
    for index, (result, spec) in enumerate(zip(results, specs, strict=True)):
        if spec.kind != OutputKind.USER_OUTPUT or isinstance(spec.arg, ConstantArgument):
            continue
        if not isinstance(result, Node) or result.op != "placeholder" or not _is_tensor(result):
            continue
        if result not in clones:
            with program.graph.inserting_before(output):
                clones[result] = program.graph.call_function(torch.ops.aten.clone.default, (result,))
            clones[result].meta = {**result.meta, "val": torch.empty_like(result.meta["val"])}
        results[index] = clones[result]
        specs[index] = dataclasses.replace(spec, arg=TensorArgument(name=clones[result].name))
    if clones:
        output.args = (tuple(results),)
        program.graph_module.recompile()


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
