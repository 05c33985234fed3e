"""What attention operators are told about a mask: made once per distinct mask, shared by every call that uses it.

Models compute a mask once and expand it for every layer. The trap: each layer sees its own ``expand`` node, so the
mask has to be followed back through expands to the tensor that was computed, whose broadcast dimensions have size 1.
And before a program is made functional the mask may be changed in place between two calls, which then need two maps.

A mask whose structure is proven is handed on as intervals, and its tensor disappears from the program; any other as the
tensor. Either comes with a tile map.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from flashpte.kernels import tuning
from flashpte.kernels.contract import MAX_ROWS
from flashpte.passes.attention.call import SdpaCall
from flashpte.passes.attention.masks.constants import Constants
from flashpte.passes.attention.masks.equal import EqualMasks
from flashpte.passes.attention.masks.intervals import IntervalNodes, MaskNodes
from flashpte.passes.attention.masks.structure import prove
from flashpte.passes.attention.masks.terms import Structure, with_nodes
from flashpte.passes.attention.route import PREFILL
from flashpte.passes.graph.aliasing import Writes
from flashpte.passes.graph.insert import call_before, insert_before, size_argument
from flashpte.passes.graph.values import aten_target, printable, val

_EXPANDS = (torch.ops.aten.expand.default, torch.ops.aten.expand_copy.default)


def mask_source(mask: Any) -> Node:
    """The node whose result ``mask`` is a broadcast of."""
    while aten_target(mask) in _EXPANDS:
        mask = mask.args[0]
    return mask


@dataclasses.dataclass(frozen=True)
class MaskArguments:
    """Arguments of an attention operator about its mask, as :func:`flashpte.kernels.ops.sdpa_decode` takes them.

    ``live`` is as in :class:`flashpte.passes.attention.masks.intervals.MaskNodes`.
    """

    attn_mask: Node | None = None
    tiles: Node | None = None
    tile_counts: Node | None = None
    key_bounds: Node | None = None
    key_values: Node | None = None
    live: Node | None = None

    def query_of(self, call: SdpaCall) -> Node:
        """The call's query, 0 in rows that average all values."""
        if self.live is None:
            return call.query
        query, aten = val(call.query), torch.ops.aten
        options = {"dtype": query.dtype, "device": query.device, "pin_memory": False}
        zero = call_before(call.node, aten.full.default, [1, 1, 1, 1], 0.0, **options)
        return call_before(call.node, aten.where.self, self.live, call.query, zero)


class TileMaps:
    """The masks of one graph: proves their structure, makes the others 4-dimensional, gives each its maps."""

    def __init__(self, graph: Graph, constants: Constants) -> None:
        self._constants = constants
        self._writes = Writes(graph)
        self._equal = EqualMasks(graph, self._writes)
        self._masks: dict[Node, Node] = {}
        self._maps: dict[tuple, tuple[Node, Node]] = {}
        self._structures: dict[tuple, Structure | str] = {}
        self._intervals: dict[tuple, MaskNodes] = {}
        self._by_structure: dict[tuple, list[tuple[frozenset[Node], MaskNodes]]] = {}
        # Up to where nothing has been written to what a mask is computed from.
        self._unwritten: dict[tuple, Node] = {}

    def arguments_for(self, call: SdpaCall, op: str) -> MaskArguments:
        """What ``op`` is told about the mask of ``call``; inserts what has to be computed before the call."""
        if call.mask is None:
            return MaskArguments()
        if isinstance(self.structure_of(call), Structure):
            bounds, values, live = self._intervals_for(call)
            return MaskArguments(None, *self._interval_map_for(call, op, bounds, values), bounds, values, live)
        return MaskArguments(self.mask_for(call), *self.map_for(call, op))

    def structure_of(self, call: SdpaCall) -> Structure | str | None:
        """The proven structure of the call's mask, or why it has none; ``None`` without a mask."""
        if call.mask is None:
            return None
        source, use = self._source(call), self._use(call)
        if use not in self._structures:
            structure = prove(source, val(call.key).shape[2], self._constants)
            self._structures[use] = structure
            if isinstance(structure, Structure):
                self._unwritten[use] = next(n for n in call.node.graph.nodes if n in structure.visited)
        structure = self._structures[use]
        if isinstance(structure, Structure):
            # Until the intervals are made, what they are computed from must stay as it was; then they and the mask.
            made = [n for n in self._intervals.get(use, ()) if n is not None]
            read = [source, *made] if made else structure.visited
            if self._writes.between(self._unwritten[use], call.node, read):
                structure = self._structures[use] = "it may be written to after it was computed"
            else:
                self._unwritten[use] = call.node.prev
        return structure

    def _source(self, call: SdpaCall) -> Node:
        """The node that computes the call's mask, or an earlier mask that is equal to it."""
        return self._equal.first(mask_source(call.mask), call.node)

    def _use(self, call: SdpaCall) -> tuple:
        """A mask and the lengths it is used for: one that is broadcast over rows may serve several."""
        lengths = (val(call.query).shape[2], val(call.key).shape[2])
        return self._source(call), *(printable(length) for length in lengths)

    def _intervals_for(self, call: SdpaCall) -> MaskNodes:
        use = self._use(call)
        if use not in self._intervals:
            structure = self._structures[use]
            assert isinstance(structure, Structure)
            # Masks that are written differently may still compare the same numbers.
            made = self._by_structure.setdefault((with_nodes(structure, self._equal.number), *use[1:]), [])
            for visited, intervals in made:
                if self._equal.unwritten(structure.visited | visited, call.node):
                    self._intervals[use] = intervals
                    return intervals
            self._intervals[use] = IntervalNodes(call).insert(structure)
            made.append((structure.visited, self._intervals[use]))
        return self._intervals[use]

    def _interval_map_for(self, call: SdpaCall, op: str, bounds: Node, values: Node | None) -> tuple[Node, Node]:
        key = val(call.key)
        tile = self._tile(call, op)
        identity = (bounds, values, printable(key.shape[2]), *tile)
        if identity not in self._maps:
            kv_len = size_argument(call.node, call.key, 2)
            both = call_before(call.node, torch.ops.flashpte.interval_map.default, bounds, values, kv_len, *tile)
            self._maps[identity] = _both_items(call.node, both)
        return self._maps[identity]

    @staticmethod
    def _tile(call: SdpaCall, op: str) -> tuple[int, int, int | None]:
        """Rows and keys of a tile of the map that ``op`` walks, and how many rows of tiles (``None``: all)."""
        if op == PREFILL:
            return *tuning.tiled_map_block(val(call.query).shape[3], val(call.value).shape[3]), None
        # All rows are in the first tile; of a dynamic L_q, the others are never walked.
        return MAX_ROWS, tuning.SPLIT_K_MAP_BLOCK_N, 1

    def mask_for(self, call: SdpaCall) -> Node:
        """The mask of ``call`` as a node of 4 dimensions, with size 1 wherever it is broadcast."""
        source = self._source(call)
        if source not in self._masks:
            mask = source
            for _ in range(4 - val(source).dim()):
                mask = call_before(call.node, torch.ops.aten.unsqueeze.default, mask, 0)
            self._masks[source] = mask
        return self._masks[source]

    def map_for(self, call: SdpaCall, op: str) -> tuple[Node, Node]:
        """The nodes ``(tiles, counts)`` of the map of the call's mask in the tiles that ``op`` walks."""
        query, key = val(call.query), val(call.key)
        block_m, block_n, row_tiles = self._tile(call, op)
        group = 1 if op == PREFILL else query.shape[1] // key.shape[1]
        mask = self.mask_for(call)
        if val(mask).shape[1] == 1:
            group = 1
        identity = (mask, printable(query.shape[2]), printable(key.shape[2]), block_m, block_n, group, row_tiles)
        made = self._maps.get(identity)
        if made is None or self._writes.between(made[0], call.node, [mask]):
            q_len, kv_len = size_argument(call.node, call.query, 2), size_argument(call.node, call.key, 2)
            both = call_before(
                call.node, torch.ops.flashpte.tile_map.default, mask, q_len, kv_len, block_m, block_n, group, row_tiles
            )
            self._maps[identity] = _both_items(call.node, both)
        return self._maps[identity]


def _both_items(anchor: Node, pair: Node) -> tuple[Node, Node]:
    first, second = (insert_before(anchor, operator.getitem, (pair, i), pair.meta["val"][i]) for i in range(2))
    return first, second
