"""Tile choices for the kernels that run on every arch.

A number that comes from a measurement has the measurement next to it; see docs/benchmarks.md.
"""

from __future__ import annotations

import dataclasses

import torch

from flashpte.kernels.tuning.arch import GpuArch
from flashpte.kernels.tuning.configs import (
    LONG_KEYS,
    MAX_SPLITS,
    WIDEST_TILE,
    AttentionShape,
    CombineConfig,
    HopperConfig,
    SplitKConfig,
    TiledConfig,
    even,
    next_power_of_2,
    padded_head_dim,
)
from flashpte.kernels.tuning.hopper import (
    LONG_KEYS_OF_MANY_ROWS,
    hopper_serves,
    little_for_each,
    programs_of,
    reads_keys_twice,
    two_tiles_of_128_keys,
)

# With at least this many results and D_v above 256, a step combines fewer splits.
_MANY_RESULTS = 65536

# With at least this many keys, splits beyond those that fill the GPU are worth combining.
_WORTH_ANOTHER_SPLIT = 2048

# Rows, keys, stages. Scores of float32 tensors are summed element by element, which needs small tiles.
_FLOAT32_TILE = (16, 16, 1)


def choose_combine(config: SplitKConfig | HopperConfig, v_head_dim: int, results: int | None) -> CombineConfig:
    """Tiles for combining the splits of ``config``. ``results`` is B x H_q x L_q x D_v, ``None`` if that is dynamic.

    A program is one warp, which exchanges nothing through shared memory and has 128 bytes of every row. In one step it
    adds all splits if there are at most 64, or else those of a short context. The step takes as long as reading them.
    It adds fewer splits if many results would need more memory than the GPU's programs have (8 rows with D = 512: 25.6
    us instead of 26.4 us). With 4 warps and 64 columns on an H100, decode of 4,096 keys was 0.3 to 0.6 us slower, and
    verify of 16 rows with D = 256 or 512 was 1 to 3 us slower.
    """
    splits = min(64, next_power_of_2(config.num_splits if config.num_splits <= 64 else config.short_splits))
    many = results is not None and results >= _MANY_RESULTS and v_head_dim > 256
    columns = 64 if isinstance(config, HopperConfig) else 32  # 128 bytes of float16 or of float32
    return CombineConfig(min(splits, 16 if many else 64), min(padded_head_dim(v_head_dim), columns))


def tiled_map_block(head_dim: int, v_head_dim: int) -> tuple[int, int]:
    """``(block_m, block_n)`` of the map that the prefill kernel walks.

    It depends on the head dims alone, so that a program is rewritten without knowing the arch. The tiles chosen for any
    arch divide it.
    """
    if max(head_dim, v_head_dim) > 128 and not two_tiles_of_128_keys(head_dim, v_head_dim):
        return 128, 64
    return 128, 128


def _fit(
    shape: AttentionShape, rows: int, block_n: int, stages: int, stored_itemsize: int, arch: GpuArch
) -> tuple[int, int, int]:
    """Reduces pipeline stages, keys per tile and rows until a program's tiles fit in shared memory.

    Keys, values and mask are staged once per pipeline stage, and the query rows and the probabilities once. After the
    loop, the accumulator passes through shared memory on its way out, in entries of ``stored_itemsize`` bytes.
    """
    itemsize = shape.dtype.itemsize
    widths = padded_head_dim(shape.head_dim), padded_head_dim(shape.v_head_dim)

    def needed() -> int:
        staged = block_n * (sum(widths) * itemsize + rows * shape.mask_itemsize)
        loop = stages * staged + rows * (widths[0] + block_n) * itemsize
        return max(loop, rows * widths[1] * stored_itemsize)

    while needed() > arch.shared_memory_per_block:
        if stages > 2:
            stages -= 1
        elif block_n > 32:
            block_n //= 2
        elif rows > 64 or (rows > 16 and rows * widths[1] * stored_itemsize > arch.shared_memory_per_block):
            rows //= 2
        elif stages > 1:
            stages -= 1
        elif block_n > 16:
            block_n //= 2
        elif rows > 16:
            rows //= 2
        else:
            break
    return rows, block_n, stages


def _programs_each(
    shape: AttentionShape, rows: int, block_n: int, stages: int, parallel: int, arch: GpuArch
) -> tuple[int, int]:
    """How many split-K programs a multiprocessor gets, for buffers below :data:`LONG_KEYS` keys and for longer ones.

    ``parallel`` is the number of programs without splits. A second program helps if two fit on a multiprocessor and
    one alone has few bytes in flight. With D = 128, one has enough: on an H100, 32,768 keys take 50.1 us instead of
    51.1 us, and 51.1 us instead of 52.7 us for 4 rows.
    """
    width = shape.width
    # One of the stages is in registers, unless the matrix instructions of a warp group read it from shared memory.
    staged = stages if rows >= 64 else stages - 1
    needed = (staged * block_n * 2 + rows) * width * shape.dtype.itemsize
    if width > 128 or 2 * needed > arch.shared_memory_per_block:
        return 1, 1
    hopper = hopper_serves(shape, arch)
    one, two = arch.sm_count // parallel * parallel, 2 * arch.sm_count // parallel * parallel
    idle = one < 0.8 * arch.sm_count and two >= 1.6 * arch.sm_count
    if hopper and rows <= 32 and idle and shape.kv_len is not None and shape.kv_len >= _WORTH_ANOTHER_SPLIT:
        # 22.0 us instead of 24.3 us for 48 heads, D = 96 and 2,201 keys on an H100.
        return 2, 2
    if width > 64:
        return 1, 1
    if not hopper or rows <= 16:
        return 1, 2
    # On an H100 with 8 heads, 24 rows and 4,096 keys take 8.9 us with two and 9.7 us with one. 64 rows and 16,384 keys
    # take 18.2 us with one and 18.6 us with two. 128 rows take 22.4 us with one and 23.9 us with two. But 98 rows, 16
    # heads and 170,497 keys take 256 us with two and 286 us with one.
    if rows <= 32:
        return 2, 2
    if rows <= 64:
        return 2, 1
    return 1, 2 if shape.kv_len is not None and shape.kv_len >= LONG_KEYS_OF_MANY_ROWS else 1


def choose_split_k(shape: AttentionShape, arch: GpuArch) -> SplitKConfig:
    """Tiles for decode and verify.

    One tile has all ``L_q x group`` packed rows if the accumulator fits, so that keys are read once. There are enough
    splits for one or two programs per multiprocessor. A dynamic L_kv counts as long.
    """
    width, packed_rows = shape.width, shape.packed_rows
    rows = min(max(16, next_power_of_2(packed_rows)), 64 if width > 256 else 128)
    # With 2 stages instead of 3, 8 rows with D = 512 and 131,072 keys took 303 us instead of 246 us on an H200.
    block_n, stages = (32, 3 if rows == 16 else 2) if width > 256 else (64, 3)
    hopper = hopper_serves(shape, arch)
    little = little_for_each(shape, arch)
    if little and (width > 128 or 2 * programs_of(shape, 32) <= arch.sm_count):
        block_n = 32  # gives twice as many programs
    if reads_keys_twice(shape, arch):
        block_n, stages = 32, 4
    if hopper and width <= 64 and rows >= 64:
        stages = 4
    if shape.dtype == torch.float32:
        rows, block_n, stages = _FLOAT32_TILE
    # The mask is loaded in a separate loop, which is not pipelined.
    rows, block_n, stages = _fit(dataclasses.replace(shape, mask_itemsize=0), rows, block_n, stages, 4, arch)
    parallel = shape.heads_of_batch * -(-packed_rows // rows)
    in_short, in_long = _programs_each(shape, rows, block_n, stages, parallel, arch)
    splits = short_splits = even(max(1, in_short * arch.sm_count // parallel))
    if shape.kv_len is None or shape.kv_len >= LONG_KEYS:
        splits = max(1, in_long * arch.sm_count // parallel)
    if little and rows >= 64 and splits > 32:
        splits //= 2  # otherwise partial results would have as many bytes as the keys
    if shape.kv_len is not None:
        tiles = max(1, -(-shape.kv_len // block_n))
        splits = min(even(splits, tiles), tiles)
    # With D = 256, 4 warps are 1% faster for 2 packed rows, and 8 warps are 4% faster for 4 to 16 rows.
    accumulated = rows * min(width, WIDEST_TILE)
    warps = 8 if accumulated > 32 * 256 or rows >= 64 or (width == 256 and packed_rows >= 4) else 4
    if little or (hopper and width <= 64 and (rows <= 64 or in_long > 1)):
        # One warp group multiplies 64 rows. 35 rows, 32 heads, D = 64 and 18,116 keys take 58 us instead of 77 us on an
        # H100.
        warps = 4
    # On an H200, a separate loop for full tiles made D = 512 15 to 25% slower with 2 stages (because of registers), but
    # not with 3 stages. It made narrower heads up to 25% faster.
    splits = min(splits, MAX_SPLITS)
    separate = width <= 256 or stages == 3
    # With these weights on an H100, a context that ends within a tile took 19.0 us instead of 22.7 us (D = 512, 4,000
    # keys) and 11.3 us instead of 12.2 us (D = 128).
    edge_weight = 1 if not separate else 4 if width > 256 else 2
    return SplitKConfig(rows, block_n, splits, warps, stages, separate, min(short_splits, splits), edge_weight)


def choose_tiled(shape: AttentionShape, arch: GpuArch) -> TiledConfig:
    """Tiles for prefill: the map's tile if it fits, and smaller for a short L_q, little shared memory or float32."""
    width = shape.width
    rows, block_n = 128, 128 if width <= 128 else 64
    stages = 3 if width <= 128 else 2
    if width > 256:
        rows = 64
        # 185 (mask) and 197 (causal) TFLOP/s on an H200, compared with 174 and 140 with 64 keys and one stage.
        block_n = 32
    if shape.dtype == torch.float32:
        rows, block_n, stages = _FLOAT32_TILE
    if shape.q_len is not None:
        rows = min(rows, max(16, next_power_of_2(shape.q_len)))
    # Only the edge loop loads the mask. It has its own, smaller tile.
    itemsize = shape.dtype.itemsize
    rows, block_n, stages = _fit(dataclasses.replace(shape, mask_itemsize=0), rows, block_n, stages, itemsize, arch)
    # 32 keys would not spill registers, but were 7% slower (D = 256, window of 1,024 on an H200).
    edge_n, edge_stages = min(block_n, 64), min(stages, 2)
    _, edge_n, edge_stages = _fit(shape, rows, edge_n, edge_stages, itemsize, arch)
    return TiledConfig(rows, block_n, 4 if rows <= 32 else 8, stages, edge_n, edge_stages)
