"""One operator for short and long calls. L_q chooses the kernel at run time.

A lowered program contains both kernels. The kernel that L_q does not select gets an empty grid, and the host skips a
launch with an empty grid. The choice costs a comparison of sizes and no synchronization with the device.

``torch.cond`` does not work here. Inductor compiles a branch for the strides that its inputs had during tracing, but
may then choose another layout for those inputs, and the branch's kernels would read the wrong elements.
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
    """Whether both kernels can walk the same map, because all query heads of a group have the same mask."""
    return mask is None or static_int(mask.shape[1]) == 1 or group == 1


def launch_dispatch(call: AttentionCall, given: GivenMap = NO_MAP, few: GivenMap = NO_SPLIT_K_MAP) -> torch.Tensor:
    """Launches the split-K kernels for at most :data:`MAX_ROWS` rows, and the tiled kernel for more.

    On sm_90, either may be the Hopper kernel instead.

    Args:
        call: any L_q.
        given: the tiled kernel's map. The split-K kernel walks the same map, whose first row of tiles holds all its
            rows, unless the heads that it packs together have different masks (:func:`shares_map`).
        few: the split-K kernel's map in that case.

    Returns:
        ``[B, H_q, L_q, D_v]`` in the query's dtype.
    """
    check_attention(call, (given, few))
    # 0 for few rows, 1 for many; an expression if L_q is symbolic.
    many = torch.sym_min(1, call.q_len // (MAX_ROWS + 1))
    out = call.empty_output()
    if given.tiles is not None and shares_map(call.mask, call.group):
        few = given._replace(block_n=tuning.tiled_map_block(call.head_dim, call.v_head_dim)[1])
    if static_int(many) != 1:
        launch_split_k(call, few, into=Destination(out, 1 - many))
    if static_int(many) != 0:
        launch_tiled(call, given, into=Destination(out, many))
    return out
