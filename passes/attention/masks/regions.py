"""Handles masks that are computed outside a region and read inside it.

``torch.export`` puts code that runs under ``torch.no_grad()`` or under another autocast into a submodule, which a
higher-order operator calls. A proof sees only one graph. To show it the whole mask, the nodes that compute the mask are
copied into the region before masks are analyzed. Copies that turn out to be unnecessary are removed afterwards.

The trap: two operands of a region may share memory. A mask is copied only if the region writes to none of the memory
that the mask is computed from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch
from torch.fx import GraphModule, Node

from flashpte.passes.attention.call import SdpaCall, find_sdpa
from flashpte.passes.graph.aliasing import Writes, computed_from, is_in_place, storage_base
from flashpte.passes.graph.constants import Constant
from flashpte.passes.graph.dead_code import eliminate_dead_code
from flashpte.passes.graph.values import aten_target

# Operators that run a submodule once, under another grad mode or autocast, with the position of the submodule among the
# arguments. The operands follow it.
REGION_BODY = {
    torch.ops.higher_order.wrap_with_set_grad_enabled: 1,
    torch.ops.higher_order.wrap_with_autocast: 4,
}


@dataclasses.dataclass
class Region:
    """A submodule that a node of ``parent`` calls once.

    Attributes:
        caller, parent, body: the calling node, the graph that contains it, and the submodule.
        first: index of the first operand among the caller's arguments.
        copies: the copied masks inside the region, by the placeholder that they replace.
        brought: placeholders that were added.
    """

    caller: Node
    parent: GraphModule
    body: GraphModule
    first: int
    copies: dict[Node, Node] = dataclasses.field(default_factory=dict)
    brought: list[Node] = dataclasses.field(default_factory=list)

    @property
    def operands(self) -> dict[Node, Node | None]:
        """The caller's operands by the body's placeholders; ``None`` for an operand that is not a node."""
        inside = self.body.graph.find_nodes(op="placeholder")
        given = self.caller.args[self.first :]
        return {p: n if isinstance(n, Node) else None for p, n in zip(inside, given, strict=True)}

    def bring(self, node: Node) -> Node:
        """The placeholder for ``node`` of the parent's graph. Adds one if the node is not an operand yet."""
        for placeholder, given in self.operands.items():
            if given is node:
                return placeholder
        last = list(self.operands)[-1]
        with self.body.graph.inserting_after(last):
            placeholder = self.body.graph.placeholder(node.name)
        placeholder.meta.update(node.meta)
        self.caller.args = (*self.caller.args, node)
        self.brought.append(placeholder)
        return placeholder

    def remove(self, placeholder: Node) -> None:
        """Removes an operand that nothing reads."""
        place = self.first + list(self.operands).index(placeholder)
        self.caller.args = (*self.caller.args[:place], *self.caller.args[place + 1 :])
        self.body.graph.erase_node(placeholder)


def copy_masks_into_regions(graph_module: GraphModule) -> list[Region]:
    """Copies into each region the nodes that compute the masks it reads. Returns the regions, outer ones first."""
    if not find_sdpa(graph_module):
        return []
    regions = _regions(graph_module)
    for region in regions:
        _copy_masks(region)
    return regions


def tidy_regions(regions: list[Region], kept: Collection[str] = ()) -> None:
    """Removes copies that no region needs. A mask that is still read as a tensor is read from outside again.

    Args:
        regions: the result of :func:`copy_masks_into_regions`.
        kept: names of nodes that stay even if nothing uses them any more.
    """
    for region in reversed(regions):
        for placeholder, copy in region.copies.items():
            if copy.graph is region.body.graph and copy in set(region.body.graph.nodes):
                copy.replace_all_uses_with(placeholder)
        eliminate_dead_code(region.body.graph)
        for placeholder in [*region.copies, *region.brought]:
            if not placeholder.users:
                region.remove(placeholder)
        region.body.graph.lint()
        region.body.recompile()
        eliminate_dead_code(region.parent.graph, kept)
        region.parent.recompile()


def _regions(graph_module: GraphModule) -> list[Region]:
    found = []
    modules = [module for module in graph_module.modules() if isinstance(module, GraphModule)]
    for parent in modules:
        for node in parent.graph.nodes:
            if node.target not in REGION_BODY or node.op != "call_function":
                continue
            place = REGION_BODY[node.target]
            body = parent.get_submodule(str(node.args[place].target))
            assert isinstance(body, GraphModule)
            found.append(Region(node, parent, body, place + 1))
    called = [id(region.body) for region in found]
    return [region for region in found if called.count(id(region.body)) == 1]


def _copy_masks(region: Region) -> None:
    body, caller = region.body, region.caller
    masks = _masks_read_in(body)
    read = computed_from(masks)
    inside, outside = Writes(body.graph), Writes(region.parent.graph)
    operands = region.operands
    written = {storage_base(given) for p, given in operands.items() if given is not None and inside.to(p)}
    for placeholder, outer in operands.items():
        if placeholder not in read or outer is None or not _is_pure(outer, caller):
            continue
        nodes = sorted(computed_from([outer], lambda node: _is_pure(node, caller)))
        if written & {storage_base(node) for node in nodes} or outside.between(nodes[0], caller, nodes):
            continue
        copies: dict[Node, Node] = {}
        for node in nodes:
            if not _is_pure(node, caller):
                copies[node] = region.bring(node)
                continue
            first = next(n for n in body.graph.nodes if n.op != "placeholder" and n not in copies.values())
            with body.graph.inserting_before(first):
                copies[node] = body.graph.node_copy(node, copies.__getitem__)
        region.copies[placeholder] = copies[outer]
        for user in list(placeholder.users):
            if user in read or user.target in REGION_BODY or any(placeholder is m for m in _masks_of(user)):
                user.replace_input_with(placeholder, copies[outer])


def _masks_read_in(module: GraphModule) -> list[Node]:
    """The nodes of a graph that serve as a mask of attention in the graph or in its regions."""
    masks = [mask for node in module.graph.nodes for mask in _masks_of(node)]
    for region in _regions(module):
        if region.parent is module:
            read = computed_from(_masks_read_in(region.body))
            masks += [given for placeholder, given in region.operands.items() if placeholder in read and given]
    return masks


def _masks_of(node: Node) -> list[Node]:
    if aten_target(node) is not torch.ops.aten.scaled_dot_product_attention.default:
        return []
    mask = SdpaCall.from_node(node).mask
    return [mask] if isinstance(mask, Node) else []


def _is_pure(node: Node, caller: Node) -> bool:
    """Whether a copy of the node inside the region computes the same."""
    target = aten_target(node)
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(target, torch._ops.OpOverload):
        return False
    # Autocast may change the dtype of a floating-point result.
    changed = caller.target is torch.ops.higher_order.wrap_with_autocast and value.dtype.is_floating_point
    return not changed and not is_in_place(target) and torch.Tag.nondeterministic_seeded not in target.tags


def region_constants(region: Region, outer: Mapping[str, Constant]) -> dict[str, Constant]:
    """Constants of the parent's graph, by the names of the placeholders that hold them inside the region."""
    return {
        placeholder.name: outer[given.name]
        for placeholder, given in region.operands.items()
        if given is not None and given.op == "placeholder" and given.name in outer
    }
