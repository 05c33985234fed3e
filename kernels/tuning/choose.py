"""The tile choices. Where a number came from a measurement it says which; see docs/benchmarks.md."""

from __future__ import annotations

import dataclasses

import torch

from flashpte.kernels.tuning.arch import ArchLimits

# Keys per tile of the map that split-K kernels walk; every split-K block_n divides it.
SPLIT_K_MAP_BLOCK_N = 64

_MAX_SPLITS = 512


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """The shape of one attention call; ``None`` stands for a size that is dynamic.

    ``q_len`` is L_q, ``kv_len`` is L_kv (of the buffer, where the keys are a cache).
    """

    batch: int | None
    heads_q: int
    heads_kv: int
    q_len: int | None
    kv_len: int | None
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads_q // self.heads_kv


@dataclasses.dataclass(frozen=True)
class SplitKConfig:
    """Tiles of the split-K kernel: packed rows by keys, and into how many splits the keys are cut."""

    block_rows: int
    block_n: int
    num_splits: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class TiledConfig:
    """Tiles of the prefill kernel: query rows by keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile that holds ``head_dim``: a power of two, at least 16 (a matrix instruction's minimum)."""
    return max(16, _next_power_of_2(head_dim))


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of the matrix products: full float32, never TF32, for float32 tensors."""
    return "ieee" if dtype == torch.float32 else "tf32"


def combine_block(block_s: int, v_head_dim: int) -> int:
    """Columns of D_v that one program of the combine kernel takes, so that its tile stays within 8,192 elements."""
    return min(padded_head_dim(v_head_dim), max(16, 8192 // block_s))


def tiled_map_block(head_dim: int, v_head_dim: int) -> tuple[int, int]:
    """``(block_m, block_n)`` of the map that the prefill kernel walks.

    A function of the head dims alone, so that a program is rewritten without knowing the arch; the tiles chosen for any
    arch divide it.
    """
    widest = max(head_dim, v_head_dim)
    if widest <= 128:
        return 128, 128
    return (128, 64) if widest <= 256 else (64, 64)


def _fit(block_n: int, stages: int, bytes_per_key: int, row_bytes: int, arch: ArchLimits) -> tuple[int, int]:
    """Reduces pipeline stages, then keys per tile, until keys, values and rows fit in shared memory."""
    while row_bytes + block_n * bytes_per_key * stages > arch.shared_memory:
        if stages > 2:
            stages -= 1
        elif block_n > 32:
            block_n //= 2
        elif stages > 1:
            stages -= 1
        elif block_n > 16:
            block_n //= 2
        else:
            break
    return block_n, stages


def choose_split_k(shape: AttentionShape, arch: ArchLimits) -> SplitKConfig:
    """Tiles for decode and verify.

    Rows: all ``L_q x group`` packed rows in one tile where the accumulator fits, so that keys are read once. Splits:
    enough programs for one per multiprocessor on short buffers and two on long ones; with a dynamic L_kv, as for a
    long one.
    """
    rows = (shape.q_len or 16) * shape.group
    width = padded_head_dim(max(shape.head_dim, shape.v_head_dim))
    wide = shape.dtype == torch.float32
    max_rows = (16 if width > 256 else 32) if wide else (64 if width > 256 else 128)
    block_rows = min(max(16, _next_power_of_2(rows)), max_rows)
    block_n, stages = (32, 2) if width > 256 else (64, 3)
    if wide:
        block_n, stages = (16, 1) if width > 256 else (32, 2)
    itemsize = shape.dtype.itemsize
    bytes_per_key = (padded_head_dim(shape.head_dim) + padded_head_dim(shape.v_head_dim)) * itemsize
    block_n, stages = _fit(block_n, stages, bytes_per_key, block_rows * (width * itemsize + 4 * block_n), arch)
    row_tiles = -(-rows // block_rows)
    parallel = (shape.batch or 1) * shape.heads_kv * row_tiles
    long = shape.kv_len is None or shape.kv_len >= 16384
    splits = max(1, arch.multiprocessors * (2 if long else 1) // parallel)
    if shape.kv_len is not None:
        splits = min(splits, max(1, -(-shape.kv_len // block_n)))
    warps = 8 if block_rows * width > 32 * 256 or block_rows >= 64 else 4
    return SplitKConfig(block_rows, block_n, min(splits, _MAX_SPLITS), warps, stages)


def choose_tiled(shape: AttentionShape, arch: ArchLimits) -> TiledConfig:
    """Tiles for prefill: the map's tile where it fits, smaller for short L_q, small shared memory and float32."""
    width = padded_head_dim(max(shape.head_dim, shape.v_head_dim))
    block_m, block_n = tiled_map_block(shape.head_dim, shape.v_head_dim)
    stages = {512: 1, 256: 2}.get(width, 3)
    warps = 8
    if shape.dtype == torch.float32:
        # Full-precision float32 products run on the plain units, from registers.
        block_m, block_n, stages = (16, 16, 1) if width > 256 else (32, 32, 2)
        warps = 4 if width <= 256 else 8
    if shape.q_len is not None:
        block_m = min(block_m, max(16, _next_power_of_2(shape.q_len)))
    if block_m <= 32:
        warps = min(warps, 4)
    itemsize = shape.dtype.itemsize
    bytes_per_key = (padded_head_dim(shape.head_dim) + padded_head_dim(shape.v_head_dim)) * itemsize
    row_bytes = block_m * width * itemsize
    block_n, stages = _fit(block_n, stages, bytes_per_key, row_bytes, arch)
    return TiledConfig(block_m, block_n, warps, stages)
