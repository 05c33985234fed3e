"""Launching the kernel for Hopper, for prefill and for split-K."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.library import wrap_triton

from flashpte.kernels import tuning
from flashpte.kernels.combine import Partials
from flashpte.kernels.hopper.kernel import _hopper_kernel
from flashpte.kernels.launch import (
    all_of_triton,
    broadcast_stride,
    cdiv,
    copies_in_16_bytes,
    dependent_launch,
    launch_with_scratch,
    static_int,
)


def serves(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> bool:
    """Whether the kernel takes these tensors: Gluon can be launched, copies are aligned, and the scale is positive.

    (It takes the maximum of the scores before it scales them.)
    """
    return scale > 0 and all_of_triton(query) and all(map(copies_in_16_bytes, (query, key, value)))


def launch_hopper(
    config: tuning.HopperConfig,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_tensors: list[torch.Tensor],
    mask_strides: list[int],
    interval_strides: list[int],
    tiles: torch.Tensor,
    counts: torch.Tensor,
    map_strides: tuple[int, int, int],
    out: torch.Tensor,
    partials: Partials,
    scale: float,
    pack: int,
    num_splits: int | torch.SymInt,
    enabled: int | torch.SymInt,
    constants: dict[str, Any],
) -> None:
    """Launches the kernel.

    Args:
        config: its tiles.
        query, key, value: ``[B, H_q, L_q, D]``, ``[B, H_kv, L_kv, D]``, ``[B, H_kv, L_kv, D_v]``.
        mask_tensors, mask_strides, interval_strides: what :func:`flashpte.kernels.intervals.mask_arguments` returns.
        tiles, counts, map_strides: the tile map; anything where there is none.
        out: ``[B, H_q, L_q, D_v]``, written if there is one split.
        partials: written if there are more; rows ``[B * H_q / pack, splits, L_q * pack]``.
        scale: factor of the scores.
        pack: how many consecutive query heads share the rows of a tile: 1, or H_q / H_kv.
        num_splits: how many there are, :attr:`tuning.HopperConfig.num_splits` or fewer.
        enabled: 0 or 1, may be symbolic: with 0, at run time no program is launched.
        constants: ``MAP_BLOCK_M``, ``MAP_BLOCK_N``, ``CAUSAL``, ``MASK``, ``TERMS``, ``INDEX_TERM``, ``EXP2_SCALE``.

    Raises:
        ValueError: the config's tiles do not divide the map's, or splits of a causal mask: the kernel counts the keys
            that a tile of rows sees, the combining kernel those that all rows see.
    """
    if constants["CAUSAL"] and static_int(num_splits) != 1:
        raise ValueError("the kernel for Hopper does not split the keys of a causal mask")
    if constants["MASK"] and constants["MAP_BLOCK_N"] % config.block_n:
        raise ValueError(f"tiles of {config.block_n} keys do not divide the map's {constants['MAP_BLOCK_N']}")
    batch, heads_q, q_len, head_dim = query.shape
    heads_kv, kv_len, v_head_dim = key.shape[1], key.shape[2], value.shape[3]
    slices = cdiv(v_head_dim, config.columns)
    programs = cdiv(q_len * pack, config.block_m) * slices * (heads_q // pack) * batch
    grid = (programs * enabled, 1, num_splits)
    launch = functools.partial(
        wrap_triton(_hopper_kernel)[grid],
        query,
        key,
        value,
        *mask_tensors,
        tiles,
        counts,
        out,
        partials.acc,
        partials.stats,
        *(broadcast_stride(tensor, d) for tensor in (query, key, value) for d in range(3)),
        *mask_strides,
        *out.stride(),
        *map_strides,
        *interval_strides,
        heads_q // pack,
        q_len,
        kv_len,
        scale,
        config.short_splits,
        GROUP=heads_q // heads_kv,
        PACK=pack,
        HEAD_DIM=head_dim,
        V_HEAD_DIM=v_head_dim,
        BLOCK_D=max(64, tuning.padded_head_dim(head_dim)),
        BLOCK_DV=config.block_dv,
        WIDTH=partials.width,
        STATS=partials.numbers,
        BLOCK_N=config.block_n,
        SHARE_ROWS=config.share_rows,
        TMA=config.tma,
        SINGLE_SPLIT=static_int(num_splits) == 1,
        LONG_KEYS=config.long_keys,
        STAGES=config.num_stages,
        V_STAGES=config.num_stages + config.more_v_stages,
        CONSUMER_REGISTERS=config.consumer_registers,
        PRODUCER_REGISTERS=config.producer_registers,
        WIDE_STORES=config.wide_stores,
        # They are as wide as the values', which are copied in 16 bytes.
        ROWS_ALIGNED=static_int(out.stride(3)) == 1,
        **constants,
        num_warps=4,
        **dependent_launch(query),
    )
    if config.tma:
        launch_with_scratch(launch, query)
    else:
        launch()
