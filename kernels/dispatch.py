"""One operator for short and long calls: which kernel runs is decided at run time, by L_q.

Both kernels are in a lowered program. The one that L_q is not for gets an empty grid, and the host leaves out a launch
whose grid is empty: the choice costs a comparison of sizes, and no synchronisation with the device.

Not ``torch.cond``: Inductor compiles a branch for the strides its inputs had when it was traced, but may lay those
inputs out in another way, so that the branch's kernels would read the wrong elements wherever nothing prevents it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flashpte.kernels import tuning
from flashpte.kernels.contract import MAX_ROWS, GivenMap, check_attention
from flashpte.kernels.intervals import Intervals
from flashpte.kernels.launch import empty_output, static_int
from flashpte.kernels.split_k import launch_split_k
from flashpte.kernels.tiled import launch_tiled


def shares_map(mask: torch.Tensor | None, group: int) -> bool:
    """Whether both kernels walk one map: all query heads of a group have the same mask."""
    return mask is None or static_int(mask.shape[1]) == 1 or group == 1


def launch_dispatch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    tiles: torch.Tensor | None,
    counts: torch.Tensor | None,
    few_tiles: torch.Tensor | None,
    few_counts: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dim_order: Sequence[int],
    intervals: Intervals | None = None,
) -> torch.Tensor:
    """Launches the split-K kernels for at most :data:`MAX_ROWS` rows, else the tiled one.

    Args: as for :func:`launch_tiled`, with the tiled kernel's map in ``tiles`` and ``counts``. The split-K kernel walks
    the same map, whose first row of tiles holds all its rows, unless the heads that it packs together have masks of
    their own (:func:`shares_map`): then ``few_tiles`` and ``few_counts`` are its map.

    Returns:
        ``[B, H_q, L_q, D_v]`` in the query's dtype.
    """
    maps = (GivenMap(tiles, counts, None), GivenMap(few_tiles, few_counts, tuning.SPLIT_K_MAP_BLOCK_N))
    check_attention(query, key, value, mask, is_causal, dim_order, intervals, maps)
    # 0 for few rows, 1 for many: of a symbolic L_q, an expression.
    many = torch.sym_min(1, query.shape[2] // (MAX_ROWS + 1))
    options: dict[str, Any] = {
        "is_causal": is_causal,
        "scale": scale,
        "dim_order": dim_order,
        "intervals": intervals,
        "out": empty_output(query, value.shape[3], dim_order),
    }
    block_n = tuning.SPLIT_K_MAP_BLOCK_N
    if tiles is not None and shares_map(mask, query.shape[1] // key.shape[1]):
        few_tiles, few_counts = tiles, counts
        block_n = tuning.tiled_map_block(query.shape[3], value.shape[3])[1]
    if static_int(many) != 1:
        few_map = (few_tiles, few_counts)
        launch_split_k(query, key, value, mask, *few_map, enabled=1 - many, map_block_n=block_n, **options)
    if static_int(many) != 0:
        launch_tiled(query, key, value, mask, tiles, counts, enabled=many, **options)
    return options["out"]
