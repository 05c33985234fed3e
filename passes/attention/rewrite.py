"""The attention rewrite, which replaces each attention, in any form, by the kernel that fits its shape."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

import flashpte.kernels  # noqa: F401  (registers the operators)
from flashpte.kernels.dispatch import shares_map
from flashpte.passes.attention.call import SdpaCall, find_sdpa
from flashpte.passes.attention.copies import copied_bytes
from flashpte.passes.attention.find import Found, find_attention
from flashpte.passes.attention.forms import broadcast, require_equal, restored, to_four_dims, with_unit_strides
from flashpte.passes.attention.masks.constants import Constants
from flashpte.passes.attention.masks.plan import MapTile, MaskPlan, Masks
from flashpte.passes.attention.masks.regions import copy_masks_into_regions, region_constants, tidy_regions
from flashpte.passes.attention.masks.terms import Structure
from flashpte.passes.attention.other_operators import is_other_attention, other_call
from flashpte.passes.attention.recover_gqa import recover_gqa
from flashpte.passes.attention.report import NodeRoute, RoutingReport
from flashpte.passes.attention.route import DISPATCH, PREFILL, Route, route
from flashpte.passes.attention.savings import mask_bytes, repeated_bytes
from flashpte.passes.attention.written import Unserved, Written
from flashpte.passes.attention.written_call import call_of
from flashpte.passes.graph.planned import Inserted, Value, insert, planned
from flashpte.passes.graph.values import Ranges, module_path, printable, size_range, val
from flashpte.passes.graph.vmap import without_vmap
from flashpte.passes.rewrite import Decision, Outcome, Refusal, Rewrite, Run, Scope


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What one call becomes.

    Attributes:
        call: the call that the kernel gets, on planned values.
        route: the operator and the reason.
        mask: how the operator gets the mask.
        entry: the report's entry, without the fields that need the inserted nodes.
        saved: bytes of repeated keys and values that are no longer written and read.
    """

    call: SdpaCall
    route: Route
    mask: MaskPlan
    entry: NodeRoute
    saved: int


@dataclasses.dataclass(frozen=True)
class _Applied:
    entry: NodeRoute
    tiles: Value | None


class _Shared:
    """State that the calls of one graph share.

    Attributes:
        masks: the masks.
        written_in: tensors that the program holds as plain constants (not buffers), by the placeholder's name.
        copies: copies that the report has already counted.
        tiles: the tile maps that calls have used so far.
    """

    def __init__(self, scope: Scope) -> None:
        self.masks = Masks(scope.graph, Constants(scope.constants))
        self.written_in: Mapping[str, torch.Tensor] = {
            name: constant.tensor
            for name, constant in scope.constants.items()
            if not constant.buffer and type(constant.tensor) is torch.Tensor
        }
        self.copies: set[Value] = set()
        self.tiles: set[Value] = set()


class AttentionRewrite(Rewrite):
    """Replaces every attention of a program by the kernel that fits its shape; see docs/routing.md."""

    name = "attention"

    def prepare(self, program: ExportedProgram) -> ExportedProgram:
        """Replaces ``vmap`` by plain operators, which mask proofs need. A program without SDPA nodes stays as it is."""
        return without_vmap(program) if find_sdpa(program.graph_module) else program

    @contextlib.contextmanager
    def around(self, run: Run) -> Iterator[None]:
        """Copies masks into the regions that read them, and removes the copies that no region needs in the end."""
        regions = copy_masks_into_regions(run.graph_module)
        for region in regions:
            run.constants[region.body] = region_constants(region, run.constants.get(region.parent, {}))
        yield
        tidy_regions(regions, run.kept)

    def match(self, node: Node, scope: Scope) -> Found | None:
        """The attention that the node is, or whose softmax it is."""
        return find_attention(node)

    def decide(self, match: Found, scope: Scope) -> Decision | Refusal:
        """Chooses the operator for a match, plans its arguments and gives the reason; or says why none fits."""
        shared, ranges = scope.state(_Shared), scope.ranges
        written = _written_call(match, shared)
        formed = written if isinstance(written, str) else to_four_dims(written, ranges)
        if isinstance(formed, str):
            known = written if isinstance(written, SdpaCall) else None
            return Refusal(formed, _entry(match.node, known, Route(None, formed), ranges))
        assert isinstance(written, SdpaCall)
        call, decision = _route(formed, recover_gqa(formed, shared.written_in), ranges)
        if decision.op is None:
            return Refusal(decision.reason, _entry(call.node, written, decision, ranges))
        mask = shared.masks.plan(call, _tiles(call, decision))
        entry = dataclasses.replace(_entry(call.node, call, decision, ranges), **_mask_entry(call, mask.structure))
        return Decision(decision.reason, _Plan(call, decision, mask, entry, repeated_bytes(formed, call, ranges)))

    def apply(self, match: Found, decision: Decision, scope: Scope) -> _Applied:
        """Replaces the match by the operator."""
        plan, shared = decision.plan, scope.state(_Shared)
        node = plan.call.node
        for a, b in plan.route.equal:
            require_equal(node, a, b, (plan.call.query, plan.call.key, plan.call.value, plan.call.mask))
        names = ("query", "key", "value", "sinks")
        operands = Inserted().insert([getattr(plan.call, name) for name in names], node)
        call = dataclasses.replace(plan.call, **dict(zip(names, operands, strict=True)))
        moved = copied_bytes(call, shared.copies, scope.ranges)
        mask = shared.masks.insert(plan.mask, node)
        _replace(call, plan.route, mask)
        scope.dropped.update(match.dropped if isinstance(match, Written) else (match.node,))
        tiles = mask.maps[0][0] if mask.maps else None
        saved = plan.saved + _mask_savings(call, mask, tiles not in shared.tiles, scope.ranges)
        if tiles is not None:
            shared.tiles.add(tiles)
        return _Applied(dataclasses.replace(plan.entry, bytes_saved=saved, bytes_copied=moved), tiles)

    def report(self, outcomes: Sequence[Outcome]) -> RoutingReport:
        """One entry for every attention, including how many share its tile map."""
        applied = [outcome.result for outcome in outcomes]
        counts = collections.Counter(result.tiles for result in applied if result is not None)
        entries = []
        for outcome, result in zip(outcomes, applied, strict=True):
            entry = outcome.decision.plan if result is None else result.entry
            if result is not None and result.tiles is not None:
                entry = dataclasses.replace(entry, map_users=counts[result.tiles])
            entries.append(entry)
        return RoutingReport(tuple(entries))


def _written_call(found: Found, shared: _Shared) -> SdpaCall | str:
    """The call in the program's own form, or one sentence that says why it is not a plain call."""
    if isinstance(found, Unserved):
        return found.reason
    if isinstance(found, Written):
        return call_of(found, shared.written_in)
    if is_other_attention(found.node):
        return other_call(found.node)
    return SdpaCall.from_node(found.node)


def _route(formed: SdpaCall, grouped: SdpaCall, ranges: Ranges | None) -> tuple[SdpaCall, Route]:
    """The call that the kernels get and the decision on it. ``formed`` and ``grouped`` are equivalent calls."""
    call = with_unit_strides(broadcast(grouped), ranges)
    decision = route(call, ranges)
    if decision.op is None and grouped is not formed:
        # The repetition is a copy, so its layout may fit where the source's does not.
        call = with_unit_strides(broadcast(formed), ranges)
        decision = route(call, ranges)
    return call, decision


def _tiles(call: SdpaCall, decision: Route) -> list[MapTile]:
    """The tile sizes of the maps that the operator walks."""
    if decision.op not in (PREFILL, DISPATCH):
        return [MapTile.of_few_rows()]
    many = MapTile.of_many_rows(call)
    return [many, MapTile.of_few_rows()] if decision.op == DISPATCH else [many]


def _replace(call: SdpaCall, decision: Route, mask: MaskPlan) -> None:
    """Inserts the operator before the call's node and replaces the node by it."""
    assert decision.op is not None
    namespace, name = decision.op.split("::")
    tiles, counts = mask.maps[0] if mask.maps else (None, None)
    bounds, values, _ = mask.intervals or (None, None, None)
    arguments: list[Any] = [mask.query_of(call), call.key, call.value, mask.attn_mask, tiles, counts]
    arguments += [bool(call.is_causal), decision.scale, list(decision.dim_order), bounds, values]
    group = val(call.query).shape[1] // val(call.key).shape[1]
    if decision.op == DISPATCH and mask.attn_mask is not None and not shares_map(val(mask.attn_mask), group):
        arguments += mask.maps[1]
    op = getattr(getattr(torch.ops, namespace), name).default
    scores: dict[str, Any] = {"softcap": call.softcap} if call.softcap else {}
    scores |= {} if call.sinks is None else {"sinks": call.sinks}
    new = insert(restored(call, planned(op, *arguments, near=call.node, **scores)), call.node)
    call.node.replace_all_uses_with(new)
    call.node.graph.erase_node(call.node)
    # The signatures of a program and of its modules refer to outputs by name.
    new.name = call.node.name


def _mask_entry(call: SdpaCall, structure: Structure | str | None) -> dict[str, Any]:
    """The report's fields on the mask of a replaced call."""
    if isinstance(structure, Structure):
        note = "the mask is computed from positions where it is needed; attention reads no mask tensor"
        return {"mask": structure.kind, "mask_form": "positions", "mask_note": note}
    if structure is not None:
        return {"mask_form": "tensor", "mask_note": f"the mask is read through a tile map: {structure}"}
    return {"mask_form": "is_causal"} if call.is_causal else {}


def _mask_savings(call: SdpaCall, mask: MaskPlan, first: bool, ranges: Ranges | None) -> int:
    """Mask bytes that a call no longer moves. ``first`` says that no earlier call has the same map."""
    if isinstance(mask.structure, Structure):
        return mask_bytes(call, ranges) * (2 if first else 1)
    return 0 if first else mask_bytes(call, ranges)


def _entry(node: Node, call: SdpaCall | None, decision: Route, ranges: Ranges | None) -> NodeRoute:
    """The report entry of one attention. Without a call, it holds what the node shows."""
    given = node.args[:3] if call is None else (call.query, call.key, call.value)
    if call is None and not isinstance(node.target, torch._ops.HigherOrderOperator):
        given = ()
    tensors = [val(n) for n in given if isinstance(n, Value) and isinstance(n.meta.get("val"), torch.Tensor)]
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
        softcap=0.0 if call is None else call.softcap,
        sinks=call is not None and call.sinks is not None,
    )


def _sizes(tensor: torch.Tensor | None) -> tuple[int | str, ...]:
    return () if tensor is None else tuple(printable(size) for size in tensor.shape)
