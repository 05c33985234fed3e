"""Launches the Hopper kernel, for prefill and for split-K."""

from __future__ import annotations

import functools

from torch.library import wrap_triton

from flashpte.kernels import tuning
from flashpte.kernels.call import AttentionCall, Launch
from flashpte.kernels.hopper.kernel import _hopper_kernel
from flashpte.kernels.launch import (
    all_of_triton,
    cdiv,
    copies_in_16_bytes,
    dependent_launch,
    launch_with_scratch,
    static_int,
)
from flashpte.kernels.mask import KernelMask, pointers, strides


def serves(call: AttentionCall) -> bool:
    """Whether the kernel takes this call: no softcap or sinks, Gluon can be launched, aligned copies, a positive scale.

    (The scale must be positive because the kernel takes the maximum of the scores before it scales them.)
    """
    if call.softcap or call.sinks is not None or call.scale <= 0 or not all_of_triton(call.query):
        return False
    return all(map(copies_in_16_bytes, (call.query, call.key, call.value)))


def launch_hopper(call: AttentionCall, mask: KernelMask, launch: Launch, pack: int) -> None:
    """Launches the kernel.

    Args:
        call: the attention call.
        mask: the call's mask.
        launch: the kernel's tiles and results. Partials have rows ``[B * H_q / pack, splits, L_q * pack]``.
        pack: how many consecutive query heads share the rows of a tile: 1, or H_q / H_kv.

    Raises:
        ValueError: the config's tiles do not divide the map's tiles, or a causal call has several splits. With a causal
            mask, this kernel counts the keys that a tile of rows sees, but the combining kernel counts the keys that
            all rows see.
    """
    config, num_splits, out, partials = launch.config, launch.num_splits, launch.out, launch.partials
    assert isinstance(config, tuning.HopperConfig)
    if call.is_causal and static_int(num_splits) != 1:
        raise ValueError("the kernel for Hopper does not split the keys of a causal mask")
    if mask.constants["MASK"] and mask.constants["MAP_BLOCK_N"] % config.block_n:
        tile = mask.constants["MAP_BLOCK_N"]
        raise ValueError(f"tiles of {config.block_n} keys do not divide the map's {tile}")
    block_d, rest_d = tuning.hopper_columns(call.head_dim, config.two_blocks)
    slices = cdiv(call.v_head_dim, config.columns)
    programs = cdiv(call.q_len * pack, config.block_m) * slices * (call.heads_q // pack) * call.batch
    tiles = {"BLOCK_N": config.block_n, "BLOCK_DV": config.block_dv, "SHARE_ROWS": config.share_rows, "TMA": config.tma}
    stages = {"STAGES": config.num_stages, "V_STAGES": config.num_stages + config.more_v_stages}
    splits = {"SINGLE_SPLIT": static_int(num_splits) == 1, "LONG_KEYS": config.long_keys}
    # Rows of the result are as wide as those of the values, which are multiples of 16 bytes.
    stores = {"WIDE_STORES": config.wide_stores, "ROWS_ALIGNED": static_int(out.stride(3)) == 1}
    run = functools.partial(
        wrap_triton(_hopper_kernel)[(programs * launch.enabled, 1, num_splits)],
        *pointers(call, mask, out),
        partials.acc,
        partials.stats,
        *strides(call, mask, out),
        call.heads_q // pack,
        call.q_len,
        call.kv_len,
        call.scale,
        config.short_splits,
        **call.constants,
        PACK=pack,
        BLOCK_D=block_d,
        REST_D=rest_d,
        REST_DV=config.rest_dv,
        WIDTH=partials.width,
        STATS=partials.numbers,
        **tiles,
        **stages,
        **splits,
        **stores,
        CONSUMER_REGISTERS=config.consumer_registers,
        PRODUCER_REGISTERS=config.producer_registers,
        **mask.constants,
        num_warps=4,
        **dependent_launch(call.query),
    )
    if config.tma:
        launch_with_scratch(run, call.query)
    else:
        run()
