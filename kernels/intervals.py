"""Masks as intervals: each row has bounds on numbers that belong to the keys, instead of a row of a dense tensor.

Row ``m`` sees key ``n`` if ``lower[t, m] <= value[t, n] <= upper[t, m]`` for each of T terms. Examples:

* causal mask: the values are positions, and ``upper`` is the row's position;
* sliding window: in addition, ``lower`` is the row's position minus the window plus one;
* ring buffer: each slot's value is the position that it holds;
* packed documents: the values are document numbers, and both bounds are the row's document;
* padding mask: the values are 0 and 1.

Nothing is assumed about the numbers. Positions may have gaps, repeat or be permuted.

The kernels compute visibility in partly masked tiles. ``flashpte::interval_map`` finds these and the full tiles from
L_q + L_kv numbers instead of L_q x L_kv mask entries.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from flashpte.kernels.call import MapTiling
from flashpte.kernels.facts import register
from flashpte.kernels.launch import cdiv, static_int
from flashpte.kernels.primitives import INTERPRETED
from flashpte.kernels.tile_map import COUNTS, EMPTY, FULL, PARTIAL, launch_compact, list_tiles_reference

# How many tiles of keys one program classifies.
_KEY_TILES = 32


@dataclasses.dataclass(frozen=True)
class Intervals:
    """A mask of T terms.

    Attributes:
        bounds: int64 ``[2 T, Bm, L_q]``, contiguous: for each term, the rows' lower bounds and then their upper bounds.
            Bm is B or 1.
        values: int64 ``[T', Bv, L_kv]``, contiguous: the keys' values. Bv is B or 1. T' is T, or T - 1 if the value of
            the first term is the key's index; ``None`` if that is the only term.
    """

    bounds: torch.Tensor
    values: torch.Tensor | None

    @property
    def terms(self) -> int:
        """T."""
        return self.bounds.shape[0] // 2

    @property
    def index_term(self) -> bool:
        """Whether the first term's value is the key's index."""
        return self.values is None or self.values.shape[0] < self.terms

    @property
    def batch(self) -> int | torch.SymInt:
        """B, or 1 if all batch entries have the same mask."""
        shared = self.values is None or static_int(self.values.shape[1]) == 1
        return self.bounds.shape[1] if shared or self.values is None else self.values.shape[1]

    def check(self, batch: int | None = None, q_len: int | None = None, kv_len: int | None = None) -> None:
        """Raises ``ValueError`` with one sentence if the tensors do not fit together or do not fit the given sizes.

        Symbolic sizes are not compared.
        """
        bounds, values = self.bounds, self.values
        if bounds.dim() != 3 or bounds.dtype != torch.int64 or bounds.shape[0] == 0 or bounds.shape[0] % 2:
            raise ValueError(f"key_bounds must be int64 [2 T, B, L_q], got {bounds.dtype} {tuple(bounds.shape)}")
        if values is not None and (values.dim() != 3 or values.dtype != torch.int64):
            raise ValueError(f"key_values must be int64 [T, B, L_kv], got {values.dtype} {tuple(values.shape)}")
        if values is None and self.terms != 1:
            raise ValueError(f"key_bounds have {self.terms} terms; without key_values there can be one")
        if values is not None and values.shape[0] not in (self.terms, self.terms - 1):
            raise ValueError(f"key_bounds have {self.terms} terms, key_values {values.shape[0]}")

        def differ(size: int | torch.SymInt, wanted: int | None) -> bool:
            return isinstance(size, int) and isinstance(wanted, int) and size != wanted

        if differ(bounds.shape[2], q_len):
            raise ValueError(f"key_bounds are for {bounds.shape[2]} rows, the query has {q_len}")
        if values is not None and differ(values.shape[2], kv_len):
            raise ValueError(f"key_values are for {values.shape[2]} keys, there are {kv_len}")
        for size in (bounds.shape[1], 1 if values is None else values.shape[1]):
            if differ(size, 1) and differ(size, batch):
                raise ValueError(f"key_bounds and key_values are for a batch of {size}, the query has {batch}")

    def kernel_arguments(self) -> tuple[torch.Tensor, int, int, int, int]:
        """Values (or a stand-in), strides of the bounds per batch entry and side, and of values per entry and term."""
        bounds, values = self.bounds, self.values
        bound_batch = 0 if static_int(bounds.shape[1]) == 1 else bounds.stride(1)
        if values is None:
            return bounds, bound_batch, bounds.stride(0), 0, 0
        value_batch = 0 if static_int(values.shape[1]) == 1 else values.stride(1)
        return values, bound_batch, bounds.stride(0), value_batch, values.stride(0)

    def dense(self, kv_len: int) -> torch.Tensor:
        """The same mask as a bool tensor ``[B or 1, 1, L_q, L_kv]``. This is the definition of intervals."""
        visible = self.bounds.new_ones((), dtype=torch.bool)
        for term in range(self.terms):
            if self.index_term and term == 0:
                value = torch.arange(kv_len, device=self.bounds.device)[None, None]
            else:
                assert self.values is not None
                value = self.values[term - self.index_term][:, None]
            lower, upper = self.bounds[2 * term, :, :, None], self.bounds[2 * term + 1, :, :, None]
            visible = visible & (value >= lower) & (value <= upper)
        return visible[:, None]


def as_intervals(bounds: torch.Tensor | None, values: torch.Tensor | None) -> Intervals | None:
    """The intervals of an operator's optional arguments.

    Raises:
        ValueError: the tensors do not fit together.
    """
    if bounds is None:
        if values is not None:
            raise ValueError("key_values without key_bounds")
        return None
    intervals = Intervals(bounds.contiguous(), values if values is None else values.contiguous())
    intervals.check()
    return intervals


@triton.jit
def _classify_intervals_kernel(
    bounds_ptr,
    values_ptr,
    states_ptr,  # int8 [B, 1, n_row_tiles, n_key_tiles]
    stride_bb, side_stride, stride_vb, values_stride,
    q_len, kv_len, n_key_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEY_TILES: tl.constexpr,
    TERMS: tl.constexpr, INDEX_TERM: tl.constexpr,
):  # fmt: skip
    """Classifies ``KEY_TILES`` tiles of keys for one tile of rows."""
    key_tile = tl.program_id(0) * KEY_TILES + tl.arange(0, KEY_TILES)
    row_tile = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = m < q_len
    # Per row and tile: live says whether the tile may hold a visible key, open_ whether all its keys are visible.
    live = row_ok[:, None] & (key_tile < n_key_tiles)[None, :]
    open_ = live
    for term in tl.static_range(TERMS):
        row = bounds_ptr + b * stride_bb + 2 * term * side_stride + m
        lower = tl.load(row, mask=row_ok, other=0)[:, None]
        upper = tl.load(row + side_stride, mask=row_ok, other=0)[:, None]
        if INDEX_TERM and term == 0:
            smallest = (key_tile * BLOCK_N).to(tl.int64)
            largest = tl.minimum(smallest + BLOCK_N, kv_len) - 1
        else:
            n = key_tile[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            # Keys past the end repeat the last one.
            row_of_values = values_ptr + b * stride_vb + (term - INDEX_TERM) * values_stride
            value = tl.load(row_of_values + tl.minimum(n, kv_len - 1))
            smallest = tl.min(value, 1)
            largest = tl.max(value, 1)
        smallest = smallest[None, :]
        largest = largest[None, :]
        live = live & (lower <= upper) & (lower <= largest) & (upper >= smallest)
        open_ = open_ & (lower <= smallest) & (upper >= largest)
    any_live = tl.max(live.to(tl.int32), 0)
    # A tile with rows past the end can be full. A tile with keys past the end cannot.
    all_open = tl.min((open_ | (row_ok == 0)[:, None]).to(tl.int32), 0)
    all_open = tl.where((key_tile + 1) * BLOCK_N <= kv_len, all_open, 0)
    state = tl.where(any_live == 0, 0, tl.where(all_open != 0, 2, 1))
    tile = (b * tl.num_programs(1) + row_tile) * n_key_tiles + key_tile
    tl.store(states_ptr + tile, state.to(tl.int8), mask=key_tile < n_key_tiles)


register(_classify_intervals_kernel, "attention")


def launch_interval_map(intervals: Intervals, kv_len: int, tiling: MapTiling) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the two kernels. Results as for :func:`interval_map`."""
    bounds = intervals.bounds
    q_len, batch = bounds.shape[2], intervals.batch
    values, *strides = intervals.kernel_arguments()
    row_tiles, key_tiles = tiling.rows(q_len), cdiv(kv_len, tiling.block_n)
    states = torch.empty((batch, 1, row_tiles, key_tiles), dtype=torch.int8, device=bounds.device)
    classify = _classify_intervals_kernel if INTERPRETED else wrap_triton(_classify_intervals_kernel)
    classify[(cdiv(key_tiles, _KEY_TILES), row_tiles, batch)](
        bounds,
        values,
        states,
        *strides,
        q_len,
        kv_len,
        key_tiles,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        KEY_TILES=_KEY_TILES,
        TERMS=intervals.terms,
        INDEX_TERM=int(intervals.index_term),
        num_warps=4,
    )
    return launch_compact(states, states, q_len, 1, tiling.block_m, True)


@triton_op("flashpte::interval_map", mutates_args=())
def interval_map(
    key_bounds: torch.Tensor,
    key_values: torch.Tensor | None,
    kv_len: int,
    block_m: int,
    block_n: int,
    row_tiles: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists the live tiles of a mask given as intervals.

    Args:
        key_bounds, key_values: as in :class:`Intervals`.
        kv_len: L_kv.
        block_m, block_n: tile size in query rows and keys, powers of two.
        row_tiles: as for ``flashpte::tile_map``.

    Returns:
        ``tiles`` and ``counts`` as ``flashpte::tile_map`` returns them, for one mask head. A tile is live if the range
        of its values overlaps a row's bounds, even if no single value lies within them. A kernel that visits such a
        tile finds nothing to see.

    Raises:
        ValueError: the tensors do not fit together.
    """
    intervals = as_intervals(key_bounds, key_values)
    assert intervals is not None
    intervals.check(kv_len=kv_len)
    return launch_interval_map(intervals, kv_len, MapTiling(block_m, block_n, row_tiles=row_tiles))


@interval_map.register_fake
def _interval_map_fake(key_bounds, key_values, kv_len, block_m, block_n, row_tiles=None):
    intervals = Intervals(key_bounds, key_values)
    intervals.check(kv_len=kv_len)
    rows = MapTiling(block_m, block_n, row_tiles=row_tiles).rows(key_bounds.shape[2])
    shape = (intervals.batch, 1, rows, cdiv(kv_len, block_n))
    return (
        key_bounds.new_empty(shape, dtype=torch.int32),
        key_bounds.new_empty((*shape[:3], COUNTS), dtype=torch.int32),
    )


@interval_map.register_kernel("cpu")
def _interval_map_cpu(key_bounds, key_values, kv_len, block_m, block_n, row_tiles=None):
    intervals = as_intervals(key_bounds, key_values)
    assert intervals is not None
    return interval_map_reference(intervals, kv_len, MapTiling(block_m, block_n, row_tiles=row_tiles))


def interval_map_reference(intervals: Intervals, kv_len: int, tiling: MapTiling) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch definition of :func:`interval_map`. Entries that the kernel does not write are -1."""
    intervals.check(kv_len=kv_len)
    key_bounds, block_m, block_n = intervals.bounds, tiling.block_m, tiling.block_n
    batch, q_len = intervals.batch, key_bounds.shape[2]
    rows, keys = tiling.rows(q_len), cdiv(kv_len, block_n)
    live = torch.ones(batch, q_len, keys, dtype=torch.bool)
    open_ = live.clone()
    for term in range(intervals.terms):
        if intervals.index_term and term == 0:
            value = torch.arange(kv_len)[None]
        else:
            assert intervals.values is not None
            value = intervals.values[term - intervals.index_term]
        tiled = torch.stack(
            [torch.stack([t.amin(-1), t.amax(-1)]) for t in value.split(block_n, -1)], -1
        )  # [2, B, key tiles]
        smallest, largest = tiled[0][:, None], tiled[1][:, None]
        lower, upper = key_bounds[2 * term][..., None], key_bounds[2 * term + 1][..., None]
        live = live & (lower <= upper) & (lower <= largest) & (upper >= smallest)
        open_ = open_ & (lower <= smallest) & (upper >= largest)
    open_[..., kv_len // block_n :] = False
    states = torch.full((batch, 1, rows, keys), EMPTY)
    for i in range(rows):
        of_rows = slice(i * block_m, (i + 1) * block_m)
        # A row of tiles beyond L_q is empty.
        any_live, all_open = live[:, of_rows].any(1), open_[:, of_rows].all(1)
        states[:, 0, i] = torch.where(any_live, torch.where(all_open, FULL, PARTIAL), EMPTY)
    return list_tiles_reference(states)
