"""One tile map per distinct mask, shared by every attention call that uses it.

Models compute a mask once and expand it for every layer. The trap: each layer sees its own ``expand`` node, so the
mask has to be followed back through expands to the tensor that was computed, whose broadcast dimensions have size 1.
And before a program is made functional the mask may be changed in place between two calls, which then need two maps.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from flashpte.kernels import tuning
from flashpte.kernels.split_k import MAX_ROWS
from flashpte.passes.insert import call_before, insert_before, size_argument
from flashpte.passes.mutation import written_between
from flashpte.passes.route import PREFILL
from flashpte.passes.sdpa_node import SdpaCall, aten_target, printable, val

_EXPANDS = (torch.ops.aten.expand.default, torch.ops.aten.expand_copy.default)


def mask_source(mask: Any) -> Node:
    """The node whose result ``mask`` is a broadcast of."""
    while aten_target(mask) in _EXPANDS:
        mask = mask.args[0]
    return mask


class TileMaps:
    """Makes masks 4-dimensional and gives each distinct one its maps, once per graph."""

    def __init__(self) -> None:
        self._masks: dict[Node, Node] = {}
        self._maps: dict[tuple, tuple[Node, Node]] = {}

    def mask_for(self, call: SdpaCall) -> Node:
        """The mask of ``call`` as a node of 4 dimensions, with size 1 wherever it is broadcast."""
        source = mask_source(call.mask)
        if source not in self._masks:
            mask = source
            for _ in range(4 - val(source).dim()):
                mask = call_before(call.node, torch.ops.aten.unsqueeze.default, mask, 0)
            self._masks[source] = mask
        return self._masks[source]

    def map_for(self, call: SdpaCall, op: str) -> tuple[Node, Node]:
        """The nodes ``(tiles, counts)`` of the map of the call's mask in the tiles that ``op`` walks."""
        query, key, value = val(call.query), val(call.key), val(call.value)
        if op == PREFILL:
            block_m, block_n = tuning.tiled_map_block(query.shape[3], value.shape[3])
            group, row_tiles = 1, None
        else:
            block_m, block_n = MAX_ROWS, tuning.SPLIT_K_MAP_BLOCK_N
            # All rows are in the first tile; of a dynamic L_q, the others are never walked.
            group, row_tiles = query.shape[1] // key.shape[1], 1
        mask = self.mask_for(call)
        if val(mask).shape[1] == 1:
            group = 1
        identity = (mask, printable(query.shape[2]), printable(key.shape[2]), block_m, block_n, group, row_tiles)
        made = self._maps.get(identity)
        if made is None or written_between(made[0], call.node, [mask]):
            q_len, kv_len = size_argument(call.node, call.query, 2), size_argument(call.node, call.key, 2)
            both = call_before(
                call.node, torch.ops.flashpte.tile_map.default, mask, q_len, kv_len, block_m, block_n, group, row_tiles
            )
            tiles, counts = (
                insert_before(call.node, operator.getitem, (both, i), both.meta["val"][i]) for i in range(2)
            )
            self._maps[identity] = tiles, counts
        return self._maps[identity]
