"""The tensors that a program's placeholders hold, and the ones that a rewrite puts in their place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Graph, Node

from flashpte.passes.graph.aliasing import Writes

_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class Weights:
    """The weights of a program during a rewrite.

    Unlike :func:`~flashpte.passes.graph.constants.constant_tensors`, they include the parameters. A rewrite that reads
    one computes something from it at compile time, so a weight that is loaded later must equal the exported one.

    Args:
        program: the program; :meth:`finish` changes it.

    Attributes:
        held: tensors by the name of the placeholder that holds them. Placeholders that the program writes are missing.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self._added: dict[str, tuple[Node, torch.Tensor]] = {}
        self.held: Mapping[str, torch.Tensor] = _held(program)

    def name_of(self, node: Node) -> str:
        """The qualified name of the weight that a placeholder holds."""
        (spec,) = (s for s in self._program.graph_signature.input_specs if s.arg.name == node.name)
        assert spec.target is not None
        return spec.target

    def add(self, graph: Graph, name: str, tensor: torch.Tensor, fake: torch.Tensor) -> Node:
        """The placeholder of a new weight, or of the one that was added under this name before.

        Args:
            graph: the program's own graph, not that of a branch.
            name: the qualified name; ``name`` must not be taken.
            tensor: the value.
            fake: its description.

        Raises:
            ValueError: the program has another tensor of this name.
        """
        if name in self._added:
            return self._added[name][0]
        if name in self._program.state_dict or name in self._program.constants:
            raise ValueError(f"the program already has a tensor named {name}")
        with graph.inserting_before(next(iter(graph.nodes))):
            node = graph.placeholder("b_" + name.replace(".", "_"))
        node.meta["val"] = fake
        self._added[name] = node, tensor
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
            if spec.kind in _HELD and not nodes[spec.arg.name].users and spec.arg.name in self.held:
                program.graph.erase_node(nodes[spec.arg.name])
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
    tensors = {}
    for spec in signature.input_specs:
        if spec.kind not in _HELD or spec.target in mutated or writes.to(nodes[spec.arg.name]):
            continue
        value = program.state_dict.get(spec.target, program.constants.get(spec.target))
        if isinstance(value, torch.Tensor):
            tensors[spec.arg.name] = value
    return tensors
