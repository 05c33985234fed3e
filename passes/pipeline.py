"""The front door: ``replace_sdpa`` for programs, ``ReplaceSdpaPass`` for ExecuTorch's ``transform_passes=``."""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

import flashpte.kernels  # noqa: F401  (registers the operators)
from flashpte.kernels.dispatch import shares_map
from flashpte.passes.attention.call import SdpaCall, find_sdpa
from flashpte.passes.attention.copies import copied_bytes
from flashpte.passes.attention.find import Found, find_attention
from flashpte.passes.attention.forms import (
    MaskForms,
    broadcast,
    require_equal,
    restored,
    to_four_dims,
    with_unit_strides,
)
from flashpte.passes.attention.masks.constants import Constant, Constants, constant_tensors
from flashpte.passes.attention.masks.regions import copy_masks_into_regions, region_constants, tidy_regions
from flashpte.passes.attention.masks.terms import Structure
from flashpte.passes.attention.masks.tile_maps import TileMaps
from flashpte.passes.attention.other_operators import is_other_attention, other_call
from flashpte.passes.attention.recover_gqa import recover_gqa
from flashpte.passes.attention.route import DISPATCH, PREFILL, VERIFY, Route, route
from flashpte.passes.attention.savings import mask_bytes, repeated_bytes
from flashpte.passes.attention.written import Unserved, Written
from flashpte.passes.attention.written_call import Masks, call_of
from flashpte.passes.graph.dead_code import eliminate_dead_code
from flashpte.passes.graph.insert import call_before, keep_names
from flashpte.passes.graph.values import Ranges, module_path, printable, size_range, val
from flashpte.passes.graph.vmap import without_vmap
from flashpte.passes.report import NodeRoute, RoutingReport


def replace_sdpa(exported_program: ExportedProgram) -> tuple[ExportedProgram, RoutingReport]:
    """Swaps every attention call of a program for the kernel that fits its shape.

    Args:
        exported_program: a program from ``torch.export.export``, before or after ``run_decompositions``, before
            ``to_edge``. It is left untouched; weights are shared with the result, not copied. Buffers that it does not
            write are taken as constants: masks kept in them may be compiled away.

    Returns:
        The rewritten program and a report with one entry for every attention, however it is written: the operator it
        was given and why, or why it was left as it was. The rewritten program also runs on a CPU, where the
        operators are their references.

    Raises:
        TypeError: the argument is not an exported program.
        ValueError: the graph carries no tensor metadata.
    """
    if not isinstance(exported_program, ExportedProgram):
        raise TypeError(
            f"replace_sdpa takes a torch.export.ExportedProgram, got {type(exported_program).__name__}; "
            "call torch.export.export(model, example_inputs) first"
        )
    # Masks are proven of plain operators. A program without attention that is one node stays as it is.
    has_calls = bool(find_sdpa(exported_program.graph_module))
    program = _copy(without_vmap(exported_program) if has_calls else exported_program)
    # What a preserved module's signature names has to exist.
    signatures = [entry.signature for entry in program.module_call_graph if entry.signature is not None]
    kept = {argument.name for signature in signatures for argument in (*signature.inputs, *signature.outputs)}
    report = replace_sdpa_in_graph(program.graph_module, program.range_constraints, kept, constant_tensors(program))
    program.validate()
    return program, report


class ReplaceSdpaPass(PassBase):
    """The same rewrite as a pass over a graph module.

    Give it to ``to_edge_transform_and_lower(..., transform_passes=[ReplaceSdpaPass()])``; the partitioner must keep
    ``scaled_dot_product_attention`` whole, as ExecuTorch's ``CudaPartitioner`` does. After a run, :attr:`report` holds
    what happened to each node.
    """

    def __init__(self) -> None:
        super().__init__()
        self.report = RoutingReport(())

    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrites ``graph_module`` in place."""
        self.report = replace_sdpa_in_graph(graph_module)
        return PassResult(graph_module, bool(self.report.replaced))


def replace_sdpa_in_graph(
    graph_module: GraphModule,
    ranges: Ranges | None = None,
    kept: Collection[str] = (),
    constants: Mapping[str, Constant] | None = None,
) -> RoutingReport:
    """Rewrites a graph (and the branches of control flow in it) in place; returns what happened to each node.

    Args:
        graph_module: a graph whose nodes carry fake tensors.
        ranges: the range constraints of its program. Without them a dynamic size starts at 2 even where 1 is allowed.
        kept: names of nodes that stay even if nothing uses them any more.
        constants: tensors by the name of the placeholder that always holds them.
    """
    routes: list[NodeRoute] = []
    users: list[Node | None] = []
    state: dict[GraphModule, _Graph] = {}
    copies: set[Node] = set()
    constant_in = {graph_module: dict(constants or {})}
    regions = copy_masks_into_regions(graph_module)
    for region in regions:
        constant_in[region.body] = region_constants(region, constant_in.get(region.parent, {}))
    for module, found in find_attention(graph_module):
        if module not in state:
            state[module] = _Graph.of(module, constant_in.get(module, {}))
        known = state[module]
        before = set(module.graph.nodes)
        written = _written_call(found, known)
        formed = written if isinstance(written, str) else to_four_dims(written, known.forms, ranges)
        if isinstance(formed, str):
            _undo(module, before, known)
            call_or_none = written if isinstance(written, SdpaCall) else None
            routes.append(_entry(found.node, call_or_none, Route(None, formed), ranges))
            users.append(None)
            continue
        assert isinstance(written, SdpaCall)
        call, decision = _decide(formed, recover_gqa(formed, known.tensors), ranges)
        if decision.op is None:
            _undo(module, before, known)
        entry = _entry(call.node, written if decision.op is None else call, decision, ranges)
        tiles = None
        if decision.op is not None:
            known.changed = True
            structure = known.maps.structure_of(call)
            moved = copied_bytes(call, copies, ranges)
            tiles = _replace(call, decision, known.maps)
            known.dropped.update(found.dropped if isinstance(found, Written) else (found.node,))
            saved = repeated_bytes(formed, call, ranges) + _mask_savings(call, structure, tiles not in users, ranges)
            entry = dataclasses.replace(entry, bytes_saved=saved, bytes_copied=moved, **_mask_entry(call, structure))
        routes.append(entry)
        users.append(tiles)
    for module, known in state.items():
        if not known.changed:
            continue
        eliminate_dead_code(module.graph, kept, known.dropped)
        module.graph.lint()
        module.recompile()
    tidy_regions(regions, kept)
    counts = collections.Counter(tiles for tiles in users if tiles is not None)
    return RoutingReport(
        tuple(
            entry if tiles is None else dataclasses.replace(entry, map_users=counts[tiles])
            for entry, tiles in zip(routes, users, strict=True)
        )
    )


@dataclasses.dataclass
class _Graph:
    """What calls of one graph share.

    Attributes:
        maps: tile maps.
        tensors: values that were written into the program as they are, by the names of their placeholders.
        forms: masks brought to four dimensions.
        masks: masks that were put together.
        dropped: nodes that are gone with the attention that they are part of, though they count as impure.
        changed: whether a call was replaced.
    """

    maps: TileMaps
    tensors: Mapping[str, torch.Tensor]
    forms: MaskForms = dataclasses.field(default_factory=dict)
    masks: Masks = dataclasses.field(default_factory=dict)
    dropped: set[Node] = dataclasses.field(default_factory=set)
    changed: bool = False

    @classmethod
    def of(cls, module: GraphModule, constants: Mapping[str, Constant]) -> _Graph:
        """Of a graph none of whose calls was looked at."""
        written_in = {
            name: constant.tensor
            for name, constant in constants.items()
            if not constant.buffer and type(constant.tensor) is torch.Tensor
        }
        return cls(TileMaps(module.graph, Constants(constants)), written_in)


def _written_call(found: Found, known: _Graph) -> SdpaCall | str:
    """The call as the program writes it, or in one sentence why it is none."""
    if isinstance(found, Unserved):
        return found.reason
    if isinstance(found, Written):
        return call_of(found, known.masks, known.tensors)
    if is_other_attention(found.node):
        return other_call(found.node, known.masks)
    return SdpaCall.from_node(found.node)


def _decide(formed: SdpaCall, grouped: SdpaCall, ranges: Ranges | None) -> tuple[SdpaCall, Route]:
    """The call that the kernels get, of the two that are the same, and the decision about it."""
    call = with_unit_strides(broadcast(grouped), ranges)
    decision = route(call, ranges)
    if decision.op is None and grouped is not formed:
        # The repetition may be what made a layout fit: it is a copy.
        call = with_unit_strides(broadcast(formed), ranges)
        decision = route(call, ranges)
    return call, decision


def _undo(module: GraphModule, before: set[Node], known: _Graph) -> None:
    """Erases what was inserted for a call that is declined."""
    for node in reversed([node for node in module.graph.nodes if node not in before]):
        for shared in (known.forms, known.masks):
            for form in [form for form, made in shared.items() if made is node]:
                del shared[form]
        module.graph.erase_node(node)


def _replace(call: SdpaCall, decision: Route, tile_maps: TileMaps) -> Node | None:
    """Rewrites one call; returns the node of its tile map, if it has one."""
    assert decision.op is not None
    namespace, name = decision.op.split("::")
    for pair in decision.equal:
        require_equal(call.node, *pair, (call.query, call.key, call.value, call.mask))
    mask = tile_maps.arguments_for(call, PREFILL if decision.op == DISPATCH else decision.op)
    arguments: list[Any] = [mask.query_of(call), call.key, call.value, mask.attn_mask, mask.tiles, mask.tile_counts]
    arguments += [bool(call.is_causal), decision.scale, list(decision.dim_order), mask.key_bounds, mask.key_values]
    group = val(call.query).shape[1] // val(call.key).shape[1]
    if decision.op == DISPATCH and mask.attn_mask is not None and not shares_map(val(mask.attn_mask), group):
        few = tile_maps.arguments_for(call, VERIFY)
        arguments += [few.tiles, few.tile_counts]
    new = call_before(call.node, getattr(getattr(torch.ops, namespace), name).default, *arguments)
    new = restored(call, new)
    call.node.replace_all_uses_with(new)
    call.node.graph.erase_node(call.node)
    # Signatures of a program and of its modules refer to outputs by name.
    new.name = call.node.name
    return mask.tiles


def _mask_entry(call: SdpaCall, structure: Structure | str | None) -> dict[str, Any]:
    """The report's words on how a replaced call's mask is passed on."""
    if isinstance(structure, Structure):
        note = "the mask is computed from positions where it is needed, attention reads no tensor of it"
        return {"mask": structure.kind, "mask_form": "positions", "mask_note": note}
    if structure is not None:
        return {"mask_form": "tensor", "mask_note": f"the mask is read through a tile map: {structure}"}
    return {"mask_form": "is_causal"} if call.is_causal else {}


def _mask_savings(call: SdpaCall, structure: Structure | str | None, first: bool, ranges: Ranges | None) -> int:
    """Bytes of mask that a call no longer moves; ``first``: no call before it has the same map."""
    if isinstance(structure, Structure):
        return mask_bytes(call, ranges) * (2 if first else 1)
    return 0 if first else mask_bytes(call, ranges)


def _entry(node: Node, call: SdpaCall | None, decision: Route, ranges: Ranges | None) -> NodeRoute:
    """The report on one attention: of one that is no call, what its node shows."""
    given = node.args[:3] if call is None else (call.query, call.key, call.value)
    if call is None and not isinstance(node.target, torch._ops.HigherOrderOperator):
        given = ()
    tensors = [val(n) for n in given if isinstance(n, Node) and isinstance(n.meta.get("val"), torch.Tensor)]
    query, key, value = tensors if len(tensors) == 3 else (None, None, None)
    seen = query if query is not None else node.meta.get("val")
    return NodeRoute(
        node=node.name,
        module_path=module_path(node),
        op=decision.op,
        reason=decision.reason,
        query=_sizes(query),
        key=_sizes(key),
        value=_sizes(value),
        lq_range=(0, None) if query is None else size_range(query.shape[-2], ranges),
        dtype=str(seen.dtype).removeprefix("torch.") if isinstance(seen, torch.Tensor) else "",
        mask="none" if call is None else call.mask_kind,
        branches=decision.branches,
    )


def _sizes(tensor: torch.Tensor | None) -> tuple[int | str, ...]:
    return () if tensor is None else tuple(printable(size) for size in tensor.shape)


def _copy(program: ExportedProgram) -> ExportedProgram:
    """A program with its own graph and signature; parameters, buffers and constants are the same tensors."""
    graph_module = copy.deepcopy(program.graph_module)
    keep_names(program.graph, graph_module.graph)
    return ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict=dict(program.state_dict),
        range_constraints=dict(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=dict(program.constants),
        verifiers=program.verifiers,
    )
