"""The inputs and outputs of tile choices: shapes of attention calls, and the tiles of each kernel."""

from __future__ import annotations

import dataclasses

import torch

# Keys per tile of the map that split-K kernels walk. Every split-K block_n divides it.
SPLIT_K_MAP_BLOCK_N = 64

# With at least this many keys to visit, all splits of the split-K kernel are active, not only those for short contexts.
LONG_KEYS = 16384

MAX_SPLITS = 512

WIDEST_TILE = 512
"""The most columns of one tile of keys or of values."""


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """The shape of one attention call. ``None`` is a dynamic size.

    ``q_len`` is L_q. ``kv_len`` is L_kv (the length of the buffer if the keys are a cache). ``mask_itemsize`` is the
    size of a mask entry in bytes (0 without a mask).
    """

    batch: int | None
    heads_q: int
    heads_kv: int
    q_len: int | None
    kv_len: int | None
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    mask_itemsize: int = 0

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads_q // self.heads_kv

    @property
    def heads_of_batch(self) -> int:
        """Key/value heads of all batch entries. A dynamic batch counts as one entry."""
        return (self.batch or 1) * self.heads_kv

    @property
    def packed_rows(self) -> int:
        """Rows that share a key/value head. A dynamic L_q counts as 16, the longest verify."""
        return (self.q_len or 16) * self.group

    @property
    def width(self) -> int:
        """Columns of a tile of keys or of values, whichever is wider."""
        return padded_head_dim(max(self.head_dim, self.v_head_dim))

    @property
    def columns_left_out(self) -> bool:
        """Whether rows are narrower than the tiles that hold them, which have padded columns."""
        return max(self.head_dim, self.v_head_dim) < self.width


@dataclasses.dataclass(frozen=True)
class SplitKConfig:
    """Tiles of the split-K kernel, in packed rows by keys, and the number of splits of the keys.

    ``num_splits`` splits are launched. If fewer than :data:`LONG_KEYS` keys are to be visited, only the first
    ``short_splits`` are active. ``separate_full`` gives full tiles a separate loop, without checks or mask. The loop
    over other tiles is then not pipelined, so each counts as ``edge_weight`` full tiles when splits divide the keys.
    """

    block_rows: int
    block_n: int
    num_splits: int
    num_warps: int
    num_stages: int
    separate_full: bool = True
    short_splits: int = MAX_SPLITS
    edge_weight: int = 1

    long_keys = LONG_KEYS


@dataclasses.dataclass(frozen=True)
class TiledConfig:
    """Tiles of the prefill kernel: query rows by keys.

    ``edge_block_n`` and ``edge_stages`` are for the loop over edge tiles, which need checks or a mask. That loop costs
    additional registers and shared memory. ``edge_block_n`` divides ``block_n``.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    edge_block_n: int
    edge_stages: int


@dataclasses.dataclass(frozen=True)
class HopperConfig:
    """Tiles of the Hopper kernel: query rows by ``block_n`` keys, and columns of V.

    Each of two consumer warp groups has 64 rows and ``block_dv`` columns, and ``rest_dv`` more in a second block. The
    groups have different rows, or with ``share_rows`` the same rows and different columns. With ``two_blocks``, queries
    and keys have a second block as well if their head dim has one (:func:`hopper_columns`).

    Shared memory holds ``num_stages`` tiles of keys and ``num_stages + more_v_stages`` tiles of values, which are held
    longer. Each must be at least two, because a consumer waits for the next tile before it gives back the last tile of
    values. ``wide_stores`` uses 4 KB more, so that each thread stores results in 16 bytes.

    With ``tma``, keys and values are copied by tensor maps. Every program makes its own, while its first tiles are
    copied without. It cannot be combined with ``share_rows``, whose splits are too short for it.

    ``consumer_registers`` and ``producer_registers`` are per thread. Splits are as in :class:`SplitKConfig`, with
    ``long_keys`` instead of :data:`LONG_KEYS`. Prefill launches as many splits as give at most ``fill`` programs, but
    at least one.
    """

    block_n: int
    block_dv: int
    num_stages: int
    consumer_registers: int = 224
    producer_registers: int = 56
    share_rows: bool = False
    num_splits: int = 1
    short_splits: int = 1
    long_keys: int = LONG_KEYS
    fill: int = 0
    more_v_stages: int = 0
    wide_stores: bool = False
    tma: bool = False
    two_blocks: bool = False
    rest_dv: int = 0

    @property
    def block_m(self) -> int:
        """Query rows per program."""
        return 64 if self.share_rows else 128

    @property
    def columns(self) -> int:
        """Columns of V per program."""
        return 2 * self.block_dv if self.share_rows else self.block_dv + self.rest_dv

    @property
    def stored_columns(self) -> int:
        """Columns that a warp group stores in a row of partial results, which share a unit. A multiple of 32."""
        return self.block_dv + -(-self.rest_dv // 32) * 32

    def __post_init__(self) -> None:
        fewest = self.num_stages + min(0, self.more_v_stages)
        if fewest < 2:
            raise ValueError(f"the kernel for Hopper needs at least two stages of keys and of values, got {fewest}")
        if self.tma and self.share_rows:
            raise ValueError("the kernel for Hopper does not copy by tensor maps where warp groups share rows")
        if self.two_blocks and (self.share_rows or self.block_n < 64):
            raise ValueError(
                "the kernel for Hopper has one block of columns below 64 keys or if warp groups share rows"
            )
        if self.rest_dv and not self.two_blocks:
            raise ValueError("the kernel for Hopper has a second block of values only with two blocks")


Config = SplitKConfig | TiledConfig | HopperConfig


@dataclasses.dataclass(frozen=True)
class CombineConfig:
    """Tiles of the combining kernel. A step of its single warp adds ``block_s`` splits in ``block_dv`` columns."""

    block_s: int
    block_dv: int


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def tile_columns(head_dim: int) -> tuple[int, int]:
    """Columns of the tile that holds ``head_dim``, and of a second tile for the rest of a wider head (0 for none).

    Each is a power of two, at least 16 (the minimum of a matrix instruction). Above :data:`WIDEST_TILE`, one power of
    two would nearly double the tile: multi-head latent attention in its absorbed form has D = 576.
    """
    rest = head_dim - WIDEST_TILE
    return max(16, next_power_of_2(min(head_dim, WIDEST_TILE))), max(16, next_power_of_2(rest)) if rest > 0 else 0


def padded_head_dim(head_dim: int) -> int:
    """Columns of all tiles that hold ``head_dim``."""
    return sum(tile_columns(head_dim))


def hopper_columns(head_dim: int, two_blocks: bool = True) -> tuple[int, int]:
    """Columns of a tile of the Hopper kernel, and of a second tile for the rest of each row (0 for none).

    Both are powers of two. The first is at least 64, because swizzling works on 128 bytes of a row, and the second is
    at least 16. 80 columns (64 + 16), 96 (64 + 32), 160 (128 + 32) and 192 (128 + 64) have two tiles, without padding.
    Other widths between them (72, 136) would fit in two as well, but that has not run on a GPU in its present form.
    """
    whole = max(64, padded_head_dim(head_dim))
    half = whole // 2
    rest = head_dim - half
    exact = 64 <= half <= 128 and 16 <= rest < half and rest == next_power_of_2(rest)
    return (half, rest) if two_blocks and exact else (whole, 0)


def even(splits: int, tiles: int | None = None) -> int:
    """``splits`` rounded down to a multiple of 16, if that is near and no split gets more of the ``tiles``, if known.

    Combining steps add powers of two, so they then have no remainder. On an H100 with 4,096 keys, 32 splits instead of
    33 took 17.8 us instead of 18.3 us for one row with D = 512, and 11.6 us instead of 12.5 us for 16 rows with
    D = 256.
    """
    even = splits - splits % 16
    near = splits % 16 <= splits // 32
    return even if near and (tiles is None or -(-tiles // even) <= -(-tiles // splits)) else splits
