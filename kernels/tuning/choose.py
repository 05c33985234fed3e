"""The tile choices for kernels that run on every arch.

Where a number came from a measurement it says which; see docs/benchmarks.md.
"""

from __future__ import annotations

import dataclasses

import torch

from flashpte.kernels.tuning.arch import GpuArch
from flashpte.kernels.tuning.configs import (
    LONG_KEYS,
    MAX_SPLITS,
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
)

# From this many results with D_v above 256 on, fewer splits are added in a step.
_MANY_RESULTS = 65536

# From this many keys on, splits that would not be needed to fill the GPU are worth combining.
_WORTH_ANOTHER_SPLIT = 2048

# Rows, keys, stages. Scores of float32 tensors are summed element by element, which wants small tiles.
_FLOAT32_TILE = (16, 16, 1)


def choose_combine(config: SplitKConfig | HopperConfig, v_head_dim: int, results: int | None) -> CombineConfig:
    """Tiles for combining the splits of ``config``; ``results`` is B x H_q x L_q x D_v, ``None`` if that is dynamic.

    One warp, which exchanges nothing through shared memory, has 128 bytes of every row, and adds all splits of a few,
    else those of a short context, in one step, which takes as long as reading them; fewer where many results would need
    more memory than the GPU's programs have (8 rows of D = 512 25.6 instead of 26.4 us). With 4 warps and 64 columns
    decodes of 4,096 keys of an H100 took 0.3 to 0.6 us longer, verifies of 16 rows of D = 256 and 512 1 to 3.
    """
    splits = min(64, next_power_of_2(config.num_splits if config.num_splits <= 64 else config.short_splits))
    many = results is not None and results >= _MANY_RESULTS and v_head_dim > 256
    columns = 64 if isinstance(config, HopperConfig) else 32  # of float16, of float32
    return CombineConfig(min(splits, 16 if many else 64), min(padded_head_dim(v_head_dim), columns))


def tiled_map_block(head_dim: int, v_head_dim: int) -> tuple[int, int]:
    """``(block_m, block_n)`` of the map that the prefill kernel walks.

    A function of the head dims alone, so that a program is rewritten without knowing the arch; the tiles chosen for any
    arch divide it.
    """
    return (128, 128) if max(head_dim, v_head_dim) <= 128 else (128, 64)


def _fit(
    shape: AttentionShape, rows: int, block_n: int, stages: int, stored_itemsize: int, arch: GpuArch
) -> tuple[int, int, int]:
    """Reduces pipeline stages, keys per tile and rows until a program's tiles fit in shared memory.

    Keys, values and mask are staged once per pipeline stage; the query rows and the probabilities once. After the loop
    the accumulator passes through shared memory on its way out, in entries of ``stored_itemsize`` bytes.
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
    """How many split-K programs a multiprocessor has, of buffers below :data:`LONG_KEYS` keys, and of longer ones.

    ``parallel`` programs are there without splits. A second one helps where two fit beside each other and one has few
    bytes on their way. With D = 128 one has enough: 50.1 us for 32,768 keys of an H100 instead of 51.1, and 51.1
    instead of 52.7 for 4 rows.
    """
    width = shape.width
    # Of the stages one is in registers, unless the matrix instructions of a warp group read it from shared memory.
    staged = stages if rows >= 64 else stages - 1
    needed = (staged * block_n * 2 + rows) * width * shape.dtype.itemsize
    if width > 128 or 2 * needed > arch.shared_memory_per_block:
        return 1, 1
    hopper = hopper_serves(shape, arch)
    one, two = arch.sm_count // parallel * parallel, 2 * arch.sm_count // parallel * parallel
    idle = one < 0.8 * arch.sm_count and two >= 1.6 * arch.sm_count
    if hopper and rows <= 32 and idle and shape.kv_len is not None and shape.kv_len >= _WORTH_ANOTHER_SPLIT:
        # 22.0 us instead of 24.3 for 48 heads of D = 96 and 2,201 keys of an H100.
        return 2, 2
    if width > 64:
        return 1, 1
    if not hopper or rows <= 16:
        return 1, 2
    # 24 rows of 8 heads and 4,096 keys of an H100 take 8.9 us with two, 9.7 with one; 64 rows 18.2 with one for 16,384,
    # 18.6 with two; 128 rows 22.4 with one, 23.9 with two, but 98 rows of 16 heads and 170,497 keys 256 with two, 286
    # with one.
    if rows <= 32:
        return 2, 2
    if rows <= 64:
        return 2, 1
    return 1, 2 if shape.kv_len is not None and shape.kv_len >= LONG_KEYS_OF_MANY_ROWS else 1


def choose_split_k(shape: AttentionShape, arch: GpuArch) -> SplitKConfig:
    """Tiles for decode and verify.

    Rows: all ``L_q x group`` packed rows in one tile where the accumulator fits, so that keys are read once. Splits:
    enough programs for one per multiprocessor, or for two; with a dynamic L_kv, as for a long one.
    """
    width, packed_rows = shape.width, shape.packed_rows
    rows = min(max(16, next_power_of_2(packed_rows)), 64 if width > 256 else 128)
    # With 2 stages instead of 3, 8 rows of D = 512 took 303 instead of 246 us for 131,072 keys of an H200.
    block_n, stages = (32, 3 if rows == 16 else 2) if width > 256 else (64, 3)
    hopper = hopper_serves(shape, arch)
    little = little_for_each(shape, arch)
    if little and (width > 128 or 2 * programs_of(shape, 32) <= arch.sm_count):
        block_n = 32  # for twice as many programs
    if reads_keys_twice(shape, arch):
        block_n, stages = 32, 4
    if hopper and width <= 64 and rows >= 64:
        stages = 4
    if shape.dtype == torch.float32:
        rows, block_n, stages = _FLOAT32_TILE
    # The mask is loaded in a loop of its own, which is not pipelined.
    rows, block_n, stages = _fit(dataclasses.replace(shape, mask_itemsize=0), rows, block_n, stages, 4, arch)
    parallel = shape.heads_of_batch * -(-packed_rows // rows)
    in_short, in_long = _programs_each(shape, rows, block_n, stages, parallel, arch)
    splits = short_splits = even(max(1, in_short * arch.sm_count // parallel))
    if shape.kv_len is None or shape.kv_len >= LONG_KEYS:
        splits = max(1, in_long * arch.sm_count // parallel)
    if little and rows >= 64 and splits > 32:
        splits //= 2  # as many bytes of partial results as of keys otherwise
    if shape.kv_len is not None:
        tiles = max(1, -(-shape.kv_len // block_n))
        splits = min(even(splits, tiles), tiles)
    # 4 warps for 2 packed rows of D = 256 are 1% faster, 8 for 4 to 16 rows 4%.
    warps = 8 if rows * width > 32 * 256 or rows >= 64 or (width == 256 and packed_rows >= 4) else 4
    if little or (hopper and width <= 64 and (rows <= 64 or in_long > 1)):
        # One warp group multiplies 64 rows: 58 us instead of 77 for 35 rows of 32 heads of D = 64 and 18,116 keys of an
        # H100.
        warps = 4
    # On an H200 two loops made D = 512 15 to 25% slower with 2 stages (registers), not with 3, and narrower heads up to
    # 25% faster.
    splits = min(splits, MAX_SPLITS)
    separate = width <= 256 or stages == 3
    # On an H100 a context that ends within a tile then took 19.0 us instead of 22.7 (D = 512, 4,000 keys), 11.3 instead
    # of 12.2 (D = 128).
    edge_weight = 1 if not separate else 4 if width > 256 else 2
    return SplitKConfig(rows, block_n, splits, warps, stages, separate, min(short_splits, splits), edge_weight)


def choose_tiled(shape: AttentionShape, arch: GpuArch) -> TiledConfig:
    """Tiles for prefill: the map's tile where it fits, smaller for short L_q, small shared memory and float32."""
    width = shape.width
    rows, block_n = tiled_map_block(shape.head_dim, shape.v_head_dim)
    stages = 3 if width <= 128 else 2
    if width > 256:
        rows = 64
        # 185 (mask) and 197 (causal) TFLOP/s on an H200, against 174 and 140 with 64 keys and one stage.
        block_n = 32
    if shape.dtype == torch.float32:
        rows, block_n, stages = _FLOAT32_TILE
    if shape.q_len is not None:
        rows = min(rows, max(16, next_power_of_2(shape.q_len)))
    # The mask is loaded in the edge loop alone, which has its own, smaller tile.
    itemsize = shape.dtype.itemsize
    rows, block_n, stages = _fit(dataclasses.replace(shape, mask_itemsize=0), rows, block_n, stages, itemsize, arch)
    # 32 keys would not spill registers, but ran 7% slower (D = 256, window of 1,024 on an H200).
    edge_n, edge_stages = min(block_n, 64), min(stages, 2)
    _, edge_n, edge_stages = _fit(shape, rows, edge_n, edge_stages, itemsize, arch)
    return TiledConfig(rows, block_n, 4 if rows <= 32 else 8, stages, edge_n, edge_stages)
