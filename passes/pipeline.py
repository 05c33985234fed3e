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
from flashpte.passes.dead_code import eliminate_dead_code
from flashpte.passes.insert import call_before
from flashpte.passes.mask_constants import Constant, Constants, constant_tensors
from flashpte.passes.mask_terms import Structure
from flashpte.passes.recover_gqa import recover_gqa
from flashpte.passes.regions import copy_masks_into_regions, region_constants, tidy_regions
from flashpte.passes.report import NodeRoute, RoutingReport
from flashpte.passes.route import DISPATCH, PREFILL, VERIFY, Route, route
from flashpte.passes.savings import mask_bytes, repeated_bytes
from flashpte.passes.sdpa_node import Ranges, SdpaCall, find_sdpa, printable, size_range, val
from flashpte.passes.tile_maps import TileMaps
from flashpte.passes.vmap_regions import without_vmap


def replace_sdpa(exported_program: ExportedProgram) -> tuple[ExportedProgram, RoutingReport]:
    """Swaps every attention call of a program for the kernel that fits its shape.

    Args:
        exported_program: a program from ``torch.export.export``, before or after ``run_decompositions``, before
            ``to_edge``. It is left untouched; weights are shared with the result, not copied. Buffers that it does not
            write are taken as constants: masks kept in them may be compiled away.

    Returns:
        The rewritten program and a report with one entry for every ``scaled_dot_product_attention`` node: the operator
        it was given and why, or why it was left as it was. The rewritten program also runs on a CPU, where the
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
    program = _copy(without_vmap(exported_program))
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
    maps: dict[GraphModule, TileMaps] = {}
    known = {graph_module: dict(constants or {})}
    regions = copy_masks_into_regions(graph_module)
    for region in regions:
        known[region.body] = region_constants(region, known.get(region.parent, {}))
    for module, node in find_sdpa(graph_module):
        written = SdpaCall.from_node(node)
        call = recover_gqa(written)
        decision = route(call, ranges)
        if decision.op is None and call is not written:
            # The repetition may be what made a layout fit: it is a copy.
            call, decision = written, route(written, ranges)
        entry = _entry(call, decision, ranges)
        tiles = None
        if decision.op is not None:
            tile_maps = maps.get(module) or maps.setdefault(
                module, TileMaps(module.graph, Constants(known.get(module)))
            )
            structure = tile_maps.structure_of(call)
            tiles = _replace(call, decision, tile_maps)
            saved = repeated_bytes(written, call, ranges) + _mask_savings(call, structure, tiles not in users, ranges)
            entry = dataclasses.replace(entry, bytes_saved=saved, **_mask_entry(call, structure))
        routes.append(entry)
        users.append(tiles)
    for module in maps:
        eliminate_dead_code(module.graph, kept)
        module.graph.lint()
        module.recompile()
    tidy_regions(regions)
    counts = collections.Counter(tiles for tiles in users if tiles is not None)
    return RoutingReport(
        tuple(
            entry if tiles is None else dataclasses.replace(entry, map_users=counts[tiles])
            for entry, tiles in zip(routes, users, strict=True)
        )
    )


def _replace(call: SdpaCall, decision: Route, tile_maps: TileMaps) -> Node | None:
    """Rewrites one call; returns the node of its tile map, if it has one."""
    assert decision.op is not None
    namespace, name = decision.op.split("::")
    mask = tile_maps.arguments_for(call, PREFILL if decision.op == DISPATCH else decision.op)
    arguments: list[Any] = [mask.query_of(call), call.key, call.value, mask.attn_mask, mask.tiles, mask.tile_counts]
    arguments += [bool(call.is_causal), decision.scale, list(decision.dim_order), mask.key_bounds, mask.key_values]
    group = val(call.query).shape[1] // val(call.key).shape[1]
    if decision.op == DISPATCH and mask.attn_mask is not None and not shares_map(val(mask.attn_mask), group):
        few = tile_maps.arguments_for(call, VERIFY)
        arguments += [few.tiles, few.tile_counts]
    new = call_before(call.node, getattr(getattr(torch.ops, namespace), name).default, *arguments)
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


def _entry(call: SdpaCall, decision: Route, ranges: Ranges | None) -> NodeRoute:
    query = val(call.query)
    return NodeRoute(
        node=call.node.name,
        module_path=call.module_path,
        op=decision.op,
        reason=decision.reason,
        query=tuple(printable(s) for s in query.shape),
        key=tuple(printable(s) for s in val(call.key).shape),
        value=tuple(printable(s) for s in val(call.value).shape),
        lq_range=size_range(query.shape[-2], ranges),
        dtype=str(query.dtype).removeprefix("torch."),
        mask=call.mask_kind,
        branches=decision.branches,
    )


def _copy(program: ExportedProgram) -> ExportedProgram:
    """A program with its own graph and signature; parameters, buffers and constants are the same tensors."""
    graph_module = copy.deepcopy(program.graph_module)
    # Copying a graph renames what shadows a builtin ("input" becomes "input_1"), and the signature goes by name.
    for old, new in zip(program.graph.nodes, graph_module.graph.nodes, strict=True):
        new.name = old.name
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
