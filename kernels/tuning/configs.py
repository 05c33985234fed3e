"""What a table is asked, and what it answers: shapes of attention calls, and the tiles of each kernel."""

from __future__ import annotations

import dataclasses

import torch

# Keys per tile of the map that split-K kernels walk; every split-K block_n divides it.
SPLIT_K_MAP_BLOCK_N = 64

# From this many keys on, all splits of split-K kernels work, and not only those for short contexts.
LONG_KEYS = 16384

MAX_SPLITS = 512


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """The shape of one attention call; ``None`` stands for a size that is dynamic.

    ``q_len`` is L_q, ``kv_len`` is L_kv (of the buffer, where the keys are a cache), ``mask_itemsize`` the bytes of a
    mask entry (0 without a mask).
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
        """Key/value heads of all entries of the batch; of a dynamic batch those of one."""
        return (self.batch or 1) * self.heads_kv

    @property
    def packed_rows(self) -> int:
        """Rows that share a key/value head; with a dynamic L_q those of the longest verify."""
        return (self.q_len or 16) * self.group

    @property
    def width(self) -> int:
        """Columns of the wider of the tiles of keys and of values."""
        return padded_head_dim(max(self.head_dim, self.v_head_dim))

    @property
    def columns_left_out(self) -> bool:
        """Whether rows are narrower than the tiles that hold them."""
        return max(self.head_dim, self.v_head_dim) < self.width


@dataclasses.dataclass(frozen=True)
class SplitKConfig:
    """Tiles of the split-K kernel: packed rows by keys, and into how many splits the keys are cut.

    ``num_splits`` programs are launched; where a mask leaves fewer than :data:`LONG_KEYS` keys to visit, only the first
    ``short_splits`` of them work. ``separate_full`` gives full tiles a loop of their own, without checks or mask. The
    other tiles' loop is not pipelined: one of them counts as ``edge_weight`` full ones where splits share the keys.
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

    ``edge_block_n`` and ``edge_stages`` are for the loop over tiles that need checks or a mask, which costs registers
    and shared memory of its own; ``edge_block_n`` divides ``block_n``.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    edge_block_n: int
    edge_stages: int


@dataclasses.dataclass(frozen=True)
class HopperConfig:
    """Tiles of the kernel for Hopper: query rows by ``block_n`` keys, by columns of V.

    Each of two warp groups has 64 rows and ``block_dv`` columns. They have rows of their own, or with ``share_rows``
    the same rows and columns of their own. ``num_stages`` tiles of keys and of values are in shared memory, and
    ``more_v_stages`` of values, which are held longer (fewer, if negative); at least two of either: the next tile is
    waited for before the last tile of values is given back. With ``wide_stores`` 4 KB more let results be stored 16
    bytes a thread. With ``tma`` keys and values are copied by tensor maps, which every program makes first; not with
    ``share_rows``, whose splits are too short for it. ``consumer_registers`` and ``producer_registers`` are per thread.
    Splits are as in :class:`SplitKConfig`, with ``long_keys`` for :data:`LONG_KEYS`; of prefill, as many of them are
    launched as give ``fill`` programs at most, and at least one.
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

    @property
    def block_m(self) -> int:
        """Query rows of a program."""
        return 64 if self.share_rows else 128

    @property
    def columns(self) -> int:
        """Columns of V of a program."""
        return 2 * self.block_dv if self.share_rows else self.block_dv

    def __post_init__(self) -> None:
        fewest = self.num_stages + min(0, self.more_v_stages)
        if fewest < 2:
            raise ValueError(f"the kernel for Hopper needs at least two stages of keys and of values, got {fewest}")
        if self.tma and self.share_rows:
            raise ValueError("the kernel for Hopper does not copy by tensor maps where warp groups share rows")


Config = SplitKConfig | TiledConfig | HopperConfig


@dataclasses.dataclass(frozen=True)
class CombineConfig:
    """Tiles of the kernel that combines splits: a step of its one warp adds ``block_s``, in ``block_dv`` columns."""

    block_s: int
    block_dv: int


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile that holds ``head_dim``: a power of two, at least 16 (a matrix instruction's minimum)."""
    return max(16, next_power_of_2(head_dim))


def even(splits: int, tiles: int | None = None) -> int:
    """``splits``, or the multiple of 16 below if that is near and no split gets more of ``tiles``, if they are known.

    Steps that combine powers of two have nothing left over then: 32 splits instead of 33 took 17.8 instead of 18.3 us
    for one row of D = 512 and 4,096 keys of an H100, 11.6 instead of 12.5 for 16 rows of D = 256.
    """
    even = splits - splits % 16
    near = splits % 16 <= splits // 32
    return even if near and (tiles is None or -(-tiles // even) <= -(-tiles // splits)) else splits
