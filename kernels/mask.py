"""A mask in the form that kernels take: tensors, strides and flags for dense masks and intervals, and a tile map."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from flashpte.kernels.call import AttentionCall, GivenMap, MapTiling
from flashpte.kernels.intervals import launch_interval_map
from flashpte.kernels.launch import broadcast_stride, mask_kind
from flashpte.kernels.primitives import MASK_INTERVALS
from flashpte.kernels.tile_map import launch_tile_map, map_strides


@dataclasses.dataclass(frozen=True)
class KernelMask:
    """A mask, or no mask. Any tensor stands in for a tensor that does not exist.

    Attributes:
        tensors: the mask or the bounds of intervals; and the values of intervals.
        strides: strides of the first tensor per batch entry, head, row and key, in elements.
        interval_strides: strides of bounds per side, and of values per batch entry and per term, in elements.
        tiles, counts: the tile map.
        map_strides: rows of the map per batch entry and per head, and tiles of keys per row.
        constants: ``MAP_BLOCK_M``, ``MAP_BLOCK_N``, ``CAUSAL``, ``MASK``, ``TERMS`` and ``INDEX_TERM``, which kernels
            take under these names, and ``EXP2_SCALE``, which depends on the dtype and the kind of mask.
    """

    tensors: tuple[torch.Tensor, torch.Tensor]
    strides: list[int]
    interval_strides: tuple[int, int, int]
    tiles: torch.Tensor
    counts: torch.Tensor
    map_strides: tuple[int, int, int]
    constants: dict[str, Any]


def kernel_mask(call: AttentionCall, given: GivenMap, tiling: MapTiling) -> KernelMask:
    """The mask of a call with the given map, or with a map that is made here if there is none."""
    mask, intervals, anything = call.mask, call.intervals, call.query
    tiles, counts, _ = given
    if tiles is None and intervals is not None:
        tiles, counts = launch_interval_map(intervals, call.kv_len, tiling)
    elif tiles is None and mask is not None:
        tiles, counts = launch_tile_map(mask, call.q_len, call.kv_len, tiling)
    constants: dict[str, Any] = {"MAP_BLOCK_M": tiling.block_m, "MAP_BLOCK_N": tiling.block_n, "CAUSAL": call.is_causal}
    constants |= {"MASK": mask_kind(mask), "TERMS": 0, "INDEX_TERM": 0, "EXP2_SCALE": call.exp2_scale}
    if intervals is not None:
        values, bound_batch, side, value_batch, value_term = intervals.kernel_arguments()
        tensors, strides = (intervals.bounds, values), [bound_batch, 0, 1, 0]
        interval_strides = (side, value_batch, value_term)
        flags = {"MASK": MASK_INTERVALS, "TERMS": intervals.terms, "INDEX_TERM": int(intervals.index_term)}
        constants |= flags
    else:
        tensors = (anything if mask is None else mask, anything)
        strides = [0] * 4 if mask is None else [broadcast_stride(mask, d) for d in range(4)]
        interval_strides = (0, 0, 0)
    tile_strides = (0, 0, 0) if tiles is None else map_strides(tiles)
    if tiles is None or counts is None:
        tiles, counts = anything, anything
    return KernelMask(tensors, strides, interval_strides, tiles, counts, tile_strides, constants)


def pointers(call: AttentionCall, mask: KernelMask, out: torch.Tensor) -> list[torch.Tensor]:
    """The first arguments of every attention kernel, its tensors, in the order of its parameters."""
    return [call.query, call.key, call.value, *mask.tensors, mask.tiles, mask.counts, out]


def strides(call: AttentionCall, mask: KernelMask, out: torch.Tensor) -> list[int]:
    """The strides of these tensors, in the order of every attention kernel's parameters.

    Each is a separate integer. In a tuple, they would become constants of a lowered program's kernel, but a stride may
    depend on a dynamic size.
    """
    return [*call.strides, *mask.strides, *out.stride(), *mask.map_strides, *mask.interval_strides]
