"""The attention operators: registration, fake and CPU implementations.

An operator's CUDA implementation is its launcher (which AOTInductor traces into), its CPU implementation is the
reference, and its fake gives shape, dtype and memory layout. All three agree on the layout, because models view the
result: ``.transpose(1, 2).view(...)`` after an attention that returns ``[B, L_q, H, D]`` memory. And all three refuse
what :mod:`flashpte.kernels.contract` refuses, before anything is launched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.library import CustomOpDef, triton_op

from flashpte.kernels import tuning
from flashpte.kernels.contract import MAX_ROWS, GivenMap, check_attention, check_rows
from flashpte.kernels.dispatch import launch_dispatch
from flashpte.kernels.intervals import as_intervals
from flashpte.kernels.launch import empty_output
from flashpte.kernels.reference import attention_reference
from flashpte.kernels.split_k import launch_split_k
from flashpte.kernels.tiled import launch_tiled


@triton_op("flashpte::sdpa_decode", mutates_args=())
def sdpa_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    tiles: torch.Tensor | None,
    tile_counts: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dim_order: Sequence[int],
    key_bounds: torch.Tensor | None = None,
    key_values: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query row (L_q = 1) over all keys, split-K.

    Args:
        query: ``[B, H_q, 1, D]``; bfloat16, float16 or float32; D up to 512.
        key: ``[B, H_kv, L_kv, D]``, H_q a multiple of H_kv, same dtype.
        value: ``[B, H_kv, L_kv, D_v]``, same dtype.
        attn_mask: 4-dimensional, size 1 where it is broadcast; bool (True = attend) or float (added to the scores).
        tiles, tile_counts: the mask's ``flashpte::tile_map`` (or ``interval_map``), or ``None`` to make it in here.
        is_causal: aligned to the top left: row ``m`` sees keys ``0..m``. Not together with a mask.
        scale: factor of the scores.
        dim_order: order in which the result's four dimensions lie in memory, outermost first.
        key_bounds, key_values: a mask as :class:`flashpte.kernels.intervals.Intervals`, instead of ``attn_mask``.

    Returns:
        ``[B, H_q, L_q, D_v]``; rows that attend to nothing are 0.

    Raises:
        ValueError: shapes, dtypes, head counts, the mask or its map do not fit; the message names them.
    """
    check_rows(query, 1)
    intervals = as_intervals(key_bounds, key_values)
    return launch_split_k(
        query, key, value, attn_mask, tiles, tile_counts, is_causal, scale, dim_order, intervals=intervals
    )


@triton_op("flashpte::sdpa_verify", mutates_args=())
def sdpa_verify(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    tiles: torch.Tensor | None,
    tile_counts: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dim_order: Sequence[int],
    key_bounds: torch.Tensor | None = None,
    key_values: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a few query rows (L_q up to 16) over all keys, split-K. Arguments as for :func:`sdpa_decode`."""
    intervals = as_intervals(key_bounds, key_values)
    return launch_split_k(
        query, key, value, attn_mask, tiles, tile_counts, is_causal, scale, dim_order, intervals=intervals
    )


@triton_op("flashpte::sdpa_prefill", mutates_args=())
def sdpa_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    tiles: torch.Tensor | None,
    tile_counts: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dim_order: Sequence[int],
    key_bounds: torch.Tensor | None = None,
    key_values: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of any number of query rows, tiled, skipping masked tiles. Arguments as for :func:`sdpa_decode`."""
    intervals = as_intervals(key_bounds, key_values)
    return launch_tiled(
        query, key, value, attn_mask, tiles, tile_counts, is_causal, scale, dim_order, intervals=intervals
    )


@triton_op("flashpte::sdpa_dispatch", mutates_args=())
def sdpa_dispatch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    tiles: torch.Tensor | None,
    tile_counts: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dim_order: Sequence[int],
    key_bounds: torch.Tensor | None = None,
    key_values: torch.Tensor | None = None,
    few_tiles: torch.Tensor | None = None,
    few_tile_counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a dynamic number of query rows: as :func:`sdpa_verify` up to 16, as :func:`sdpa_prefill` beyond.

    Args: as for :func:`sdpa_decode`, with ``tiles`` and ``tile_counts`` as prefill walks them, and

        few_tiles, few_tile_counts: the map that verify walks, for a mask that differs between the query heads of a
            group (else it walks prefill's); ``None`` to make it in here.
    """
    maps = (tiles, tile_counts, few_tiles, few_tile_counts)
    intervals = as_intervals(key_bounds, key_values)
    return launch_dispatch(query, key, value, attn_mask, *maps, is_causal, scale, dim_order, intervals)


def _implement(op: CustomOpDef, most_rows: int | None, map_block_n: int | None) -> None:
    """Registers an operator's fake and CPU implementations.

    Args:
        op: the operator.
        most_rows: query rows that it takes at most.
        map_block_n: keys per tile of ``tiles``; ``None`` for a map of the tiled kernel.
    """

    def checked(
        query,
        key,
        value,
        attn_mask,
        tiles,
        tile_counts,
        is_causal,
        scale,
        dim_order,
        key_bounds=None,
        key_values=None,
        few_tiles=None,
        few_tile_counts=None,
    ):
        """Memory for the result, and what fills it with the reference's."""
        intervals = as_intervals(key_bounds, key_values)
        few = GivenMap(few_tiles, few_tile_counts, tuning.SPLIT_K_MAP_BLOCK_N)
        maps = (GivenMap(tiles, tile_counts, map_block_n), few)
        check_attention(query, key, value, attn_mask, is_causal, dim_order, intervals, maps, most_rows)
        out = empty_output(query, value.shape[3], dim_order)

        def fill():
            mask = attn_mask if intervals is None else intervals.dense(key.shape[2])
            return out.copy_(attention_reference(query, key, value, mask, is_causal, scale))

        return out, fill

    def fake(*args, **kwargs):
        return checked(*args, **kwargs)[0]

    def cpu(*args, **kwargs):
        return checked(*args, **kwargs)[1]()

    op.register_fake(fake)
    op.register_kernel("cpu")(cpu)


_implement(sdpa_decode, 1, tuning.SPLIT_K_MAP_BLOCK_N)
_implement(sdpa_verify, MAX_ROWS, tuning.SPLIT_K_MAP_BLOCK_N)
_implement(sdpa_prefill, None, None)
_implement(sdpa_dispatch, None, None)
