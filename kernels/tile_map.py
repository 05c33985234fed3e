"""Tile maps, which list the tiles of an attention mask that must be visited.

A mask ``[Bm, Hm, L_q, L_kv]`` is divided into tiles of ``block_m`` query rows by ``block_n`` keys. Every tile is
classified once:

* *empty*: no row attends to any of its keys, so it is never visited;
* *full*: every row attends to every key and nothing is added to the scores, so it is visited without the mask;
* *partial*: everything else.

For each row of tiles, the map lists the live tiles: full tiles in ascending order, then partial tiles in ascending
order. A first and a last live tile would not be enough, because a ring buffer has two live runs. Kernels walk the full
tiles in a loop without branches, which the compiler can pipeline.

Everything stays on the device. There is no host synchronization, and a captured CUDA graph recomputes the map at each
replay. The idea is FlexAttention's BlockMask, computed from the program's mask instead of a ``mask_mod``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from flashpte.kernels.call import MapTiling
from flashpte.kernels.contract import Size, may_be_equal, printable
from flashpte.kernels.facts import register
from flashpte.kernels.launch import broadcast_stride, cdiv, static_int
from flashpte.kernels.primitives import INTERPRETED

EMPTY = 0
PARTIAL = 1
FULL = 2
# All entries are the float dtype's minimum or -inf. The tile is empty if each of its rows has a much larger entry
# elsewhere.
FLOOR = 3

# How many numbers ``counts`` holds per row of tiles.
COUNTS = 4

_COMPACT_CHUNK = 1024


@triton.jit
def _classify_kernel(
    mask_ptr,
    states_ptr,  # int8 [Bm, Hm / HEAD_GROUP, n_row_tiles, n_key_tiles]
    anchored_ptr,  # int8 [Bm, Hm / HEAD_GROUP, HEAD_GROUP, L_q], zeroed; float masks only
    stride_mb, stride_mh, stride_mm, stride_mn,
    map_heads, q_len, kv_len, floor,
    HEAD_GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_BOOL: tl.constexpr,
):  # fmt: skip
    """Classifies one tile of a mask."""
    key_tile = tl.program_id(0)
    row_tile = tl.program_id(1)
    map_bh = tl.program_id(2)
    b = map_bh // map_heads
    h = (map_bh % map_heads) * HEAD_GROUP
    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = m < q_len
    ok = row_ok[:, None] & (n < kv_len)[None, :]
    base = mask_ptr + b.to(tl.int64) * stride_mb
    any_live = 0
    any_above_floor = 0
    all_open = 1
    for g in range(HEAD_GROUP):
        ptrs = base + (h + g).to(tl.int64) * stride_mh
        ptrs = ptrs + m.to(tl.int64)[:, None] * stride_mm + n.to(tl.int64)[None, :] * stride_mn
        if IS_BOOL:
            entry = tl.load(ptrs, mask=ok, other=0) != 0
            live = entry
            open_ = entry
        else:
            value = tl.load(ptrs, mask=ok, other=float("-inf")).to(tl.float32)
            live = value != float("-inf")
            open_ = value == 0.0
            # NaN counts as above the floor, because it must reach the softmax.
            above = live & ((value > floor) | (value != value))
            any_above_floor = tl.maximum(any_above_floor, tl.max(tl.max(above.to(tl.int32), 1), 0))
            # No score bridges the gap between the minimum and half of it, so the minimum's weight is exactly 0 next to
            # an entry above half of it.
            anchor = tl.max((live & (value > floor * 0.5)).to(tl.int32), 1)
            tl.store(anchored_ptr + (map_bh.to(tl.int64) * HEAD_GROUP + g) * q_len + m, 1, mask=row_ok & (anchor != 0))
        any_live = tl.maximum(any_live, tl.max(tl.max((live & ok).to(tl.int32), 1), 0))
        # A tile with rows past the end can be full. A tile with keys past the end cannot.
        all_open = tl.minimum(all_open, tl.min(tl.min((open_ | (row_ok == 0)[:, None]).to(tl.int32), 1), 0))
    all_open = tl.where((key_tile + 1) * BLOCK_N <= kv_len, all_open, 0)
    state = tl.where(any_live == 0, 0, tl.where(all_open != 0, 2, 1))
    if not IS_BOOL:
        state = tl.where((any_live != 0) & (any_above_floor == 0), 3, state)
    tile = (map_bh.to(tl.int64) * tl.num_programs(1) + row_tile) * tl.num_programs(0) + key_tile
    tl.store(states_ptr + tile, state.to(tl.int8))


# Only attention uses tile maps.
register(_classify_kernel, "attention")


@triton.jit
def _compact_kernel(
    states_ptr,
    anchored_ptr,
    tiles_ptr,  # int32 [Bm, Hm / HEAD_GROUP, n_row_tiles, n_key_tiles]
    counts_ptr,  # int32 [Bm, Hm / HEAD_GROUP, n_row_tiles, 4]: full and partial tiles, first tile of each kind
    n_key_tiles, q_len,
    HEAD_GROUP: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, IS_BOOL: tl.constexpr,
):  # fmt: skip
    """Lists the live tiles of one row of a map."""
    row_tile = tl.program_id(0)
    map_bh = tl.program_id(1)
    row = (map_bh.to(tl.int64) * tl.num_programs(0) + row_tile) * n_key_tiles
    floor_is_live = 0
    if not IS_BOOL:
        m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        for g in range(HEAD_GROUP):
            anchored = tl.load(
                anchored_ptr + (map_bh.to(tl.int64) * HEAD_GROUP + g) * q_len + m, mask=m < q_len, other=1
            )
            floor_is_live = tl.maximum(floor_is_live, tl.max((anchored == 0).to(tl.int32), 0))
    n_full = 0
    first_full, last_full, first_partial, last_partial = n_key_tiles, -1, n_key_tiles, -1
    for start in range(0, n_key_tiles, CHUNK):
        i = start + tl.arange(0, CHUNK)
        state = tl.load(states_ptr + row + i, mask=i < n_key_tiles, other=0).to(tl.int32)
        full = state == 2
        partial = (state == 1) | ((state == 3) & (floor_is_live != 0))
        n_full += tl.sum(full.to(tl.int32), 0)
        first_full = tl.minimum(first_full, tl.min(tl.where(full, i, n_key_tiles), 0))
        last_full = tl.maximum(last_full, tl.max(tl.where(full, i, -1), 0))
        first_partial = tl.minimum(first_partial, tl.min(tl.where(partial, i, n_key_tiles), 0))
        last_partial = tl.maximum(last_partial, tl.max(tl.where(partial, i, -1), 0))
    full_at = 0
    partial_at = n_full
    for start in range(0, n_key_tiles, CHUNK):
        i = start + tl.arange(0, CHUNK)
        state = tl.load(states_ptr + row + i, mask=i < n_key_tiles, other=0).to(tl.int32)
        full = (state == 2).to(tl.int32)
        partial = ((state == 1) | ((state == 3) & (floor_is_live != 0))).to(tl.int32)
        tl.store(tiles_ptr + row + full_at + tl.cumsum(full, 0) - 1, i, mask=full != 0)
        tl.store(tiles_ptr + row + partial_at + tl.cumsum(partial, 0) - 1, i, mask=partial != 0)
        full_at += tl.sum(full, 0)
        partial_at += tl.sum(partial, 0)
    n_partial = partial_at - n_full
    counts = counts_ptr + (map_bh * tl.num_programs(0) + row_tile) * 4
    tl.store(counts, n_full)
    tl.store(counts + 1, n_partial)
    tl.store(counts + 2, tl.where((n_full > 0) & (last_full - first_full + 1 == n_full), first_full, -1))
    one_run = (n_partial > 0) & (last_partial - first_partial + 1 == n_partial)
    tl.store(counts + 3, tl.where(one_run, first_partial, -1))


register(_compact_kernel, "attention")


def _check(mask: torch.Tensor, head_group: int, q_len: Size, kv_len: Size) -> None:
    if mask.dim() != 4:
        raise ValueError(f"tile_map needs a 4-dimensional mask, got {mask.dim()} dimensions")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(f"tile_map needs a bool or float mask, got {mask.dtype}")
    heads = mask.shape[1]
    if isinstance(heads, int) and heads != 1 and heads % head_group:
        raise ValueError(f"tile_map: {heads} mask heads are not a multiple of head_group {head_group}")
    for size, wanted, what in ((mask.shape[2], q_len, "rows"), (mask.shape[3], kv_len, "keys")):
        if not (isinstance(size, int) and size == 1) and not may_be_equal(size, wanted, True):
            raise ValueError(f"tile_map: the mask is for {printable(size)} {what}, not for {printable(wanted)}")


def _floor(dtype: torch.dtype) -> float:
    """The value which makes a tile that holds nothing else skippable if its rows have larger entries elsewhere.

    float16's minimum does not qualify, because scores can bridge the 65,504 between it and 0. float16 masks get
    float32's minimum, which they never hold.
    """
    return torch.finfo(torch.float32 if dtype == torch.float16 else dtype).min


def _map_heads(mask: torch.Tensor, head_group: int) -> int:
    return 1 if static_int(mask.shape[1]) == 1 else mask.shape[1] // head_group


def map_strides(tiles: torch.Tensor) -> tuple[int, int, int]:
    """For a map ``[Bm, Hm, rows, n]``: rows per batch entry and per head (0 where it broadcasts), and ``n``."""
    batch, heads, rows, key_tiles = tiles.shape
    per_batch = 0 if static_int(batch) == 1 else heads * rows
    return per_batch, 0 if static_int(heads) == 1 else rows, key_tiles


def launch_compact(
    states: torch.Tensor, anchored: torch.Tensor, q_len: int, group: int, block_m: int, is_bool: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists the live tiles of ``states`` int8 ``[Bm, Hm, row tiles, key tiles]``: full ones, then partial ones.

    Returns ``tiles`` and ``counts`` as :func:`tile_map` does. ``anchored`` int8 ``[Bm, Hm, group, L_q]`` marks rows
    with an entry next to which the mask's floor has no weight. It may be anything if ``is_bool``.
    """
    batch, heads, row_tiles, key_tiles = states.shape
    tiles = torch.empty(states.shape, dtype=torch.int32, device=states.device)
    counts = torch.empty((batch, heads, row_tiles, COUNTS), dtype=torch.int32, device=states.device)
    compact = _compact_kernel if INTERPRETED else wrap_triton(_compact_kernel)
    compact[(row_tiles, batch * heads)](
        states,
        anchored,
        tiles,
        counts,
        key_tiles,
        q_len,
        HEAD_GROUP=group,
        BLOCK_M=block_m,
        CHUNK=_COMPACT_CHUNK,
        IS_BOOL=is_bool,
        num_warps=4,
    )
    return tiles, counts


def launch_tile_map(
    mask: torch.Tensor, q_len: int, kv_len: int, tiling: MapTiling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the two kernels. Arguments and results as for :func:`tile_map`."""
    head_group = tiling.head_group
    _check(mask, head_group, q_len, kv_len)
    heads = _map_heads(mask, head_group)
    group = 1 if static_int(mask.shape[1]) == 1 else head_group
    row_tiles, key_tiles = tiling.rows(q_len), cdiv(kv_len, tiling.block_n)
    is_bool = mask.dtype == torch.bool
    shape = (mask.shape[0], heads, row_tiles, key_tiles)
    states = torch.empty(shape, dtype=torch.int8, device=mask.device)
    anchored = (
        states if is_bool else torch.zeros((mask.shape[0], heads, group, q_len), dtype=torch.int8, device=mask.device)
    )
    classify = _classify_kernel if INTERPRETED else wrap_triton(_classify_kernel)
    classify[(key_tiles, row_tiles, mask.shape[0] * heads)](
        mask,
        states,
        anchored,
        *(broadcast_stride(mask, d) for d in range(4)),
        heads,
        q_len,
        kv_len,
        0.0 if is_bool else _floor(mask.dtype),
        HEAD_GROUP=group,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        IS_BOOL=is_bool,
        num_warps=4,
    )
    return launch_compact(states, anchored, q_len, group, tiling.block_m, is_bool)


@triton_op("flashpte::tile_map", mutates_args=())
def tile_map(
    mask: torch.Tensor,
    q_len: int,
    kv_len: int,
    block_m: int,
    block_n: int,
    head_group: int,
    row_tiles: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists the live tiles of a mask.

    Args:
        mask: bool (True = attend) or float (added to the scores), ``[Bm, Hm, L_q, L_kv]`` with size 1 where it
            broadcasts. Any strides.
        q_len, kv_len: L_q and L_kv of the attention that uses the map.
        block_m, block_n: tile size in query rows and keys, powers of two.
        head_group: how many consecutive mask heads share one row of the map: 1, or H_q / H_kv if the kernel packs the
            query heads of a group into one tile. Ignored for a mask with one head.
        row_tiles: how many rows of tiles to map, starting with the first; ``None`` for all ``ceil(L_q / block_m)``. A
            row of tiles beyond L_q is empty.

    Returns:
        ``tiles`` int32 ``[Bm, Hm / head_group, row_tiles, ceil(L_kv / block_n)]``: the indices of full key tiles in
        ascending order, then those of partial tiles. Entries after these are not written. ``counts`` int32
        ``[Bm, Hm / head_group, row_tiles, 4]``: the number of full tiles, the number of partial tiles, the first full
        tile and the first partial tile. A first tile is -1 if its kind is not consecutive or has no tiles.

    Raises:
        ValueError: the mask is not 4-dimensional, is not bool or float, has other lengths, or has a number of heads
            that is not a multiple of ``head_group``.
    """
    return launch_tile_map(mask, q_len, kv_len, MapTiling(block_m, block_n, head_group, row_tiles))


@tile_map.register_fake
def _tile_map_fake(mask, q_len, kv_len, block_m, block_n, head_group, row_tiles=None):
    tiling = MapTiling(block_m, block_n, head_group, row_tiles)
    _check(mask, tiling.head_group, q_len, kv_len)
    heads = _map_heads(mask, tiling.head_group)
    shape = (mask.shape[0], heads, tiling.rows(q_len), cdiv(kv_len, tiling.block_n))
    return mask.new_empty(shape, dtype=torch.int32), mask.new_empty((*shape[:3], COUNTS), dtype=torch.int32)


@tile_map.register_kernel("cpu")
def _tile_map_cpu(mask, q_len, kv_len, block_m, block_n, head_group, row_tiles=None):
    return tile_map_reference(mask, q_len, kv_len, MapTiling(block_m, block_n, head_group, row_tiles))


def tile_map_reference(
    mask: torch.Tensor, q_len: int, kv_len: int, tiling: MapTiling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch definition of :func:`tile_map`. Entries that the kernel does not write are -1."""
    block_m, block_n, head_group = tiling.block_m, tiling.block_n, tiling.head_group
    _check(mask, head_group, q_len, kv_len)
    batch, heads = mask.shape[0], _map_heads(mask, head_group)
    group = 1 if mask.shape[1] == 1 else head_group
    rows, keys = tiling.rows(q_len), cdiv(kv_len, block_n)
    full_mask = mask.expand(batch, mask.shape[1], q_len, kv_len)[:, :, : rows * block_m]
    q_len = full_mask.shape[2]
    if mask.dtype == torch.bool:
        live, open_ = full_mask, full_mask
        floor = torch.zeros_like(live)
        anchored = torch.ones(batch, heads, q_len, dtype=torch.bool)
    else:
        minimum = _floor(mask.dtype)
        full_mask = full_mask.float()
        live = full_mask != float("-inf")
        open_ = full_mask == 0
        floor = full_mask == minimum
        anchored = (live & (full_mask > minimum / 2)).any(-1).view(batch, heads, group, q_len).all(2)

    def tiled(entries: torch.Tensor, padding_row: bool, padding_key: bool) -> torch.Tensor:
        """Entries by tile, ``[batch, heads, rows, keys, entries of the tile]``."""
        out = entries.new_full((batch, mask.shape[1], rows * block_m, keys * block_n), padding_row)
        out[:, :, :q_len, kv_len:] = padding_key
        out[:, :, :q_len, :kv_len] = entries
        out = out.view(batch, heads, group, rows, block_m, keys, block_n)
        return out.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)

    any_live = tiled(live, False, False).any(-1)
    all_open = tiled(open_, True, False).all(-1)
    all_floor = any_live & ~tiled(live & ~floor, False, False).any(-1)
    row_anchored = anchored.new_ones(batch, heads, rows * block_m)
    row_anchored[..., :q_len] = anchored
    skip_floor = row_anchored.view(batch, heads, rows, 1, block_m).all(-1)
    state = torch.where(all_open, FULL, PARTIAL)
    state = torch.where(~any_live | (all_floor & skip_floor), EMPTY, state)
    return list_tiles_reference(state)


def list_tiles_reference(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch definition of :func:`launch_compact` for ``states`` without floor tiles."""
    tiles = torch.full(states.shape, -1, dtype=torch.int32)
    counts = torch.full((*states.shape[:3], COUNTS), -1, dtype=torch.int32)
    for row_tiles, row_counts, row_states in zip(
        tiles.flatten(0, 2), counts.flatten(0, 2), states.flatten(0, 2), strict=True
    ):
        listed = [(row_states == kind).nonzero().flatten().to(torch.int32) for kind in (FULL, PARTIAL)]
        row_tiles[: sum(map(len, listed))] = torch.cat(listed)
        for i, of_kind in enumerate(listed):
            row_counts[i] = len(of_kind)
            if len(of_kind) and of_kind[-1] - of_kind[0] == len(of_kind) - 1:
                row_counts[2 + i] = of_kind[0]
    return tiles, counts
