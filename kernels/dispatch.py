"""One operator for short and long calls: which kernel runs is decided at run time, by L_q.

Both kernels are in a lowered program. The one that L_q is not for gets an empty grid, and the host leaves out a launch
whose grid is empty: the choice costs a comparison of sizes, and no synchronisation with the device.

Not ``torch.cond``: Inductor compiles a branch for the strides its inputs had when it was traced, but may lay those
inputs out in another way, so that the branch's kernels would read the wrong elements wherever nothing prevents it.
"""

from __future__ import annotations

import torch

from flashpte.kernels import tuning
from flashpte.kernels.call import NO_MAP, NO_SPLIT_K_MAP, AttentionCall, Destination, GivenMap
from flashpte.kernels.contract import MAX_ROWS, check_attention
from flashpte.kernels.launch import static_int
from flashpte.kernels.split_k import launch_split_k
from flashpte.kernels.tiled import launch_tiled


def shares_map(mask: torch.Tensor | None, group: int) -> bool:
    """Whether both kernels walk one map: all query heads of a group have the same mask."""
    return mask is None or static_int(mask.shape[1]) == 1 or group == 1


def launch_dispatch(call: AttentionCall, given: GivenMap = NO_MAP, few: GivenMap = NO_SPLIT_K_MAP) -> torch.Tensor:
    """Launches the split-K kernels for at most :data:`MAX_ROWS` rows, else the tiled one.

    Args:
        call: any L_q.
        given: the tiled kernel's map. The split-K kernel walks the same map, whose first row of tiles holds all its
            rows, unless the heads that it packs together have masks of their own (:func:`shares_map`).
        few: then, the map of the split-K kernel.

    Returns:
        ``[B, H_q, L_q, D_v]`` in the query's dtype.
    """
    check_attention(call, (given, few))
    # 0 for few rows, 1 for many: of a symbolic L_q, an expression.
    many = torch.sym_min(1, call.q_len // (MAX_ROWS + 1))
    out = call.empty_output()
    if given.tiles is not None and shares_map(call.mask, call.group):
        few = given._replace(block_n=tuning.tiled_map_block(call.head_dim, call.v_head_dim)[1])
    if static_int(many) != 1:
        launch_split_k(call, few, into=Destination(out, 1 - many))
    if static_int(many) != 0:
        launch_tiled(call, given, into=Destination(out, many))
    return out
