"""The tensors that a program's placeholders hold, and the ones that a rewrite puts in their place."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Graph, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flashpte.passes.graph.aliasing import Writes
from flashpte.passes.graph.dead_code import readers

_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class Weights:
    """The weights of a program during a rewrite.

    Unlike :func:`~flashpte.passes.graph.constants.constant_tensors`, they include the parameters. A rewrite that reads
    one computes something from it at compile time, so a weight that is loaded later must equal the exported one.

    Args:
        program: the program; :meth:`finish` changes it.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self._added: dict[str, tuple[Node, torch.Tensor]] = {}
        self._used = {node.name for node in program.graph.find_nodes(op="placeholder") if readers(node)}

    @functools.cached_property
    def held(self) -> Mapping[str, torch.Tensor]:
        """Tensors by the name of the placeholder that holds them, without those that the program writes.

        First read before the graph changes; a rewrite that reads no weights never pays for it.
        """
        return _held(self._program)

    def name_of(self, node: Node) -> str:
        """The qualified name of what a placeholder holds, or the name of an input."""
        for name, (added, _) in self._added.items():
            if added is node:
                return name
        (spec,) = (s for s in self._program.graph_signature.input_specs if s.arg.name == node.name)
        return spec.target or node.name

    def add(self, graph: Graph, name: str, tensor: torch.Tensor, fake: torch.Tensor) -> Node:
        """The placeholder of a new weight, or of an equal one that was added before under the same name.

        Args:
            graph: the program's own graph, not that of a branch.
            name: the qualified name; a number is appended if another tensor has it.
            tensor: the value.
            fake: its description.
        """
        free = name
        for number in itertools.count(1):
            if free in self._added:
                node, other = self._added[free]
                if other.dtype == tensor.dtype and torch.equal(other, tensor):
                    return node
            elif free not in self._program.state_dict and free not in self._program.constants:
                break
            free = f"{name}_{number}"
        with graph.inserting_before(next(iter(graph.nodes))):
            node = graph.placeholder("b_" + re.sub(r"\W", "_", free))
        node.target = node.name  # unique, unlike the name that it was given
        node.meta["val"] = fake
        self._added[free] = node, tensor
        return node

    def finish(self) -> None:
        """Enters the new weights into the program and removes the weights that nothing uses any more."""
        if not self._added:
            return
        program, signature = self._program, self._program.graph_signature
        new = [
            InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), name, persistent=True)
            for name, (node, _) in reversed(self._added.items())  # each was inserted in front of the one before
        ]
        nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
        before, kept = {spec.target for spec in signature.input_specs}, []
        for spec in signature.input_specs:
            node = nodes[spec.arg.name]
            if spec.kind in _HELD and node.name in self.held and node.name in self._used and not readers(node):
                for check in list(node.users):
                    program.graph.erase_node(check)
                program.graph.erase_node(node)
            else:
                kept.append(spec)
        signature.input_specs[:] = [*new, *kept]
        program.graph_module.recompile()
        used = {spec.target for spec in kept}
        for name in before - used:
            program.state_dict.pop(name, None)
            program.constants.pop(name, None)
        for name, (_, tensor) in self._added.items():
            program.state_dict[name] = tensor


def _held(program: ExportedProgram) -> dict[str, torch.Tensor]:
    signature = program.graph_signature
    writes, mutated = Writes(program.graph), set(signature.buffers_to_mutate.values())
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    tensors, written = {}, set()
    for spec in signature.input_specs:
        value = program.state_dict.get(spec.target, program.constants.get(spec.target))
        if spec.kind not in _HELD or not isinstance(value, torch.Tensor) or _has_no_numbers(value):
            continue
        if spec.target in mutated or writes.to(nodes[spec.arg.name]):
            written.add(value.untyped_storage().data_ptr())
        else:
            tensors[spec.arg.name] = value
    return {name: value for name, value in tensors.items() if value.untyped_storage().data_ptr() not in written}


def _has_no_numbers(tensor: torch.Tensor) -> bool:
    """Whether a tensor is only a description, or one of a subclass whose memory is elsewhere."""
    return tensor.is_meta or isinstance(tensor, FakeTensor) or is_traceable_wrapper_subclass(tensor)
