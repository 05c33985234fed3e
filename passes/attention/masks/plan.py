"""Plans the mask arguments of attention operators, and inserts them once per distinct mask.

A mask whose structure is proven is passed as intervals, and its tensor disappears from the program. Any other mask is
passed as its tensor. Both come with a tile map.

Two traps. Models compute a mask once and expand it for every layer, so each layer sees its own ``expand`` node. The
mask must be followed back through expands to the computed tensor, whose broadcast dimensions have size 1. In a program
that is not functional yet, the mask may change in place between two calls, and then they need two maps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from flashpte.kernels import tuning
from flashpte.kernels.contract import MAX_ROWS
from flashpte.passes.attention.call import SdpaCall
from flashpte.passes.attention.masks.constants import Constants
from flashpte.passes.attention.masks.equal import EqualValues
from flashpte.passes.attention.masks.intervals import IntervalPlan, IntervalPlanner
from flashpte.passes.attention.masks.structure import prove
from flashpte.passes.attention.masks.terms import Structure, with_values
from flashpte.passes.graph.aliasing import Writes
from flashpte.passes.graph.planned import Inserted, Value, nodes_of, planned, planned_item, planned_size
from flashpte.passes.graph.values import printable, val
from flashpte.passes.graph.views import Kind, kind_of

aten, flashpte = torch.ops.aten, torch.ops.flashpte


def mask_source(mask: Value) -> Value:
    """The value that ``mask`` broadcasts."""
    while kind_of(mask) is Kind.EXPAND:
        mask = mask.args[0]  # type: ignore[assignment]
    return mask


@dataclasses.dataclass(frozen=True)
class MapTile:
    """The tile of a map that a kernel walks.

    Attributes:
        rows, keys: the size of the tile.
        row_tiles: the number of rows of tiles; ``None`` for as many as the query rows need.
        packs_heads: whether one tile holds the rows of all query heads that share a key/value head.
    """

    rows: int
    keys: int
    row_tiles: int | None
    packs_heads: bool

    @classmethod
    def of_many_rows(cls, call: SdpaCall) -> MapTile:
        """The tile of prefill."""
        return cls(*tuning.tiled_map_block(val(call.query).shape[3], val(call.value).shape[3]), None, False)

    @classmethod
    def of_few_rows(cls) -> MapTile:
        """The tile of decode and verify, which holds all rows in one row of tiles. No further row is ever walked."""
        return cls(MAX_ROWS, tuning.SPLIT_K_MAP_BLOCK_N, 1, True)


@dataclasses.dataclass(frozen=True)
class MaskPlan:
    """The mask arguments of one call's operator, planned or inserted.

    Attributes:
        source: the mask without broadcasts; ``None`` for a call without a mask.
        lengths: L_q and L_kv, each a number, or a text if it is dynamic.
        structure: the proven structure, or the reason why there is none; ``None`` without a mask.
        attn_mask: the mask as ``[B or 1, H or 1, L_q or 1, L_kv or 1]``; ``None`` if intervals replace it.
        intervals: the intervals that replace it.
        maps: the tile map's ``(tiles, counts)`` for each requested tile.
    """

    source: Value | None = None
    lengths: tuple[int | str, ...] = ()
    structure: Structure | str | None = None
    attn_mask: Value | None = None
    intervals: IntervalPlan | None = None
    maps: tuple[tuple[Value, Value], ...] = ()

    def query_of(self, call: SdpaCall) -> Value:
        """The call's query, with rows that average all values set to 0."""
        if self.intervals is None or self.intervals.live is None:
            return call.query
        query = val(call.query)
        options = {"dtype": query.dtype, "device": query.device, "pin_memory": False}
        zero = planned(aten.full.default, [1, 1, 1, 1], 0.0, near=call.query, **options)
        return planned(aten.where.self, self.intervals.live, call.query, zero, near=call.query)


@dataclasses.dataclass(frozen=True)
class _Made:
    """The arguments that were inserted for a mask, and the node up to which nothing wrote to them."""

    intervals: IntervalPlan
    until: Node


class Masks:
    """The masks of one graph, with the proof of each and the arguments that were inserted for it."""

    def __init__(self, graph: Graph, constants: Constants) -> None:
        self._graph = graph
        self._constants = constants
        self._writes = Writes(graph)
        self._equal = EqualValues(graph, self._writes)
        self._inserted = Inserted(self._writes)
        # The masks that were inserted, by their number (see EqualValues).
        self._used: dict[Value, list[Value]] = {}
        self._made: dict[tuple, _Made] = {}
        self._by_structure: dict[tuple, list[tuple[frozenset[Node], IntervalPlan]]] = {}
        # Proofs by mask and lengths, each computed once.
        self._proofs: dict[tuple, Structure | str] = {}

    def plan(self, call: SdpaCall, tiles: Sequence[MapTile]) -> MaskPlan:
        """Plans the mask arguments of ``call`` for an operator that walks maps of ``tiles``."""
        if call.mask is None:
            return MaskPlan()
        source = self._first_equal(mask_source(call.mask), call.node)
        lengths = tuple(printable(val(tensor).shape[2]) for tensor in (call.query, call.key))
        structure = self._structure(source, lengths, call)
        if isinstance(structure, Structure):
            intervals = self._intervals(source, lengths, structure, call)
            maps = tuple(self._interval_map(call, tile, intervals) for tile in tiles)
            return MaskPlan(source, lengths, structure, None, intervals, maps)
        mask = source
        for _ in range(4 - val(source).dim()):
            mask = planned(aten.unsqueeze.default, mask, 0, near=mask)
        maps = tuple(self._tile_map(call, tile, mask) for tile in tiles)
        return MaskPlan(source, lengths, structure, mask, None, maps)

    def insert(self, plan: MaskPlan, before: Node) -> MaskPlan:
        """Inserts a plan before a node and remembers it for later calls. Returns the plan with nodes."""
        if plan.source is None:
            return plan
        intervals = plan.intervals or (None, None, None)
        values = [*intervals, plan.attn_mask, *(value for pair in plan.maps for value in pair)]
        nodes = self._inserted.insert(values, before)
        maps = tuple(zip(nodes[4::2], nodes[5::2], strict=True))
        made = None if plan.intervals is None else IntervalPlan(*nodes[:3])
        used = self._used.setdefault(self._equal.number(plan.source), [])
        if plan.source not in used:
            used.append(plan.source)
        if made is not None and isinstance(plan.structure, Structure):
            key = (plan.source, *plan.lengths, plan.structure.blank_rows_average)
            self._made[key] = _Made(made, before.prev)
            alike = self._by_structure.setdefault(self._form(plan.structure, plan.lengths), [])
            if all(other != made for _, other in alike):
                alike.append((plan.structure.visited, made))
        return dataclasses.replace(plan, attn_mask=nodes[3], intervals=made, maps=maps)

    def _first_equal(self, mask: Value, user: Node) -> Value:
        """An earlier call's mask that is equal to ``mask`` where ``user`` reads it, or else ``mask`` itself."""
        used = self._used.get(self._equal.number(mask), [])
        if mask in used:
            return mask
        return next((other for other in used if self._equal.unwritten((mask, other), user)), mask)

    def _structure(self, source: Value, lengths: tuple, call: SdpaCall) -> Structure | str:
        """The proven structure of a mask where ``call`` reads it, or the reason why there is none."""
        use = (source, *lengths)
        if use not in self._proofs:
            self._proofs[use] = prove(source, val(call.key).shape[2], self._constants)
        structure = self._proofs[use]
        if isinstance(structure, str):
            return structure
        # A row of minima averages all values, but beside a sink these weigh nothing, and the row is 0.
        average = structure.blank_rows_average and call.sinks is None
        structure = dataclasses.replace(structure, blank_rows_average=average)
        # Before the intervals exist, their inputs must stay unwritten. Afterwards, the intervals and the mask must.
        made = self._made.get((*use, average))
        if made is not None:
            read = [source, *(value for value in made.intervals if value is not None)]
            written = self._writes.between(made.until, call.node, nodes_of(read))
        else:
            first = next((node for node in self._graph.nodes if node in structure.visited), None)
            written = first is not None and self._writes.between(first, call.node, structure.visited)
        return "it may be written to after it was computed" if written else structure

    def _intervals(self, source: Value, lengths: tuple, structure: Structure, call: SdpaCall) -> IntervalPlan:
        made = self._made.get((source, *lengths, structure.blank_rows_average))
        if made is not None:
            return made.intervals
        # Masks with different nodes may still compare the same numbers.
        for visited, intervals in self._by_structure.get(self._form(structure, lengths), []):
            if self._equal.unwritten(structure.visited | visited, call.node):
                return intervals
        return IntervalPlanner(call).plan(structure)

    def _form(self, structure: Structure, lengths: tuple) -> tuple:
        return with_values(structure, self._equal.number), *lengths

    def _interval_map(self, call: SdpaCall, tile: MapTile, intervals: IntervalPlan) -> tuple[Value, Value]:
        kv_len = planned_size(call.key, 2)
        given = (intervals.key_bounds, intervals.key_values, kv_len, tile.rows, tile.keys, tile.row_tiles)
        pair = planned(flashpte.interval_map.default, *given, near=call.query)
        return planned_item(pair, 0), planned_item(pair, 1)

    def _tile_map(self, call: SdpaCall, tile: MapTile, mask: Value) -> tuple[Value, Value]:
        group = 1
        if tile.packs_heads and val(mask).shape[1] != 1:
            group = val(call.query).shape[1] // val(call.key).shape[1]
        q_len, kv_len = planned_size(call.query, 2), planned_size(call.key, 2)
        given = (mask, q_len, kv_len, tile.rows, tile.keys, group, tile.row_tiles)
        pair = planned(flashpte.tile_map.default, *given, near=call.query)
        return planned_item(pair, 0), planned_item(pair, 1)
