"""Tile choices for the Hopper kernel. A number that comes from a measurement has the measurement next to it."""

from __future__ import annotations

from flashpte.kernels.tuning.arch import GpuArch
from flashpte.kernels.tuning.configs import (
    WIDEST_TILE,
    AttentionShape,
    HopperConfig,
    even,
    hopper_columns,
    padded_head_dim,
)

# With at least this many keys, all splits are active. The limit is above the split-K kernel's, because these splits
# store more bytes.
LONG_KEYS_OF_MANY_ROWS = 65536

# Prefill of few rows: the most splits of the keys, and the fewest keys that are split.
_PREFILL_SPLITS, _PREFILL_SPLIT_KEYS = 16, 2048

# Up to this many keys, storing the results takes a noticeable share of the time of prefill.
_SHORT_KEYS = 4096


def hopper_serves(shape: AttentionShape, arch: GpuArch) -> bool:
    """Whether the Hopper kernel runs on ``arch`` and takes the dtype and the head dim."""
    return arch.capability == (9, 0) and shape.dtype.itemsize == 2 and shape.head_dim <= WIDEST_TILE


def hopper_registers(width: int) -> tuple[int, int]:
    """Registers per thread of the Hopper kernel's consumers and of its producer, which copies ``width`` columns."""
    return (224, 56) if width <= 256 else (216, 72)  # copying wide rows needs more addresses


def two_tiles_of_128_keys(head_dim: int, v_head_dim: int) -> bool:
    """Whether two tiles of 128 keys and their values fit in shared memory, and the accumulator in registers."""
    columns, v_columns = sum(hopper_columns(head_dim)), sum(hopper_columns(v_head_dim))
    return columns + v_columns <= 320 and columns <= 192 and v_columns <= 160


def choose_hopper(shape: AttentionShape, arch: GpuArch) -> HopperConfig | None:
    """Tiles of the Hopper kernel for prefill; ``None`` if it does not serve (:func:`hopper_serves`, up to 64 rows)."""
    few_rows = shape.q_len is not None and shape.q_len <= 64
    if few_rows or not hopper_serves(shape, arch):
        return None
    widest = max(64, shape.width)
    # Small tiles of keys have one block of columns. Values of more than 256 columns are shared by two programs.
    block_d, rest_d = hopper_columns(shape.head_dim, widest <= 256)
    block_dv, rest_dv = hopper_columns(min(256, shape.v_head_dim), widest <= 256)
    columns_d, columns = block_d + rest_d, block_d + rest_d + block_dv + rest_dv
    # On an H200, 64 keys instead of 128 were 13% slower for D = 128, and 32 keys instead of 64 were 33% slower for
    # D = 256.
    block_n = 128 if widest <= 128 else 64 if widest <= 256 else 32
    if two_tiles_of_128_keys(shape.head_dim, shape.v_head_dim):
        # On an H200, 8,192 rows with D = 160 take 1,162 us instead of 1,281 us with four tiles of 64 keys.
        block_n = 128
    barriers, exchange = 1024, 4096
    left = arch.shared_memory_per_block - barriers - 128 * columns_d * 2
    # For D = 64, a fourth tile costs 4 to 6%. On an H100 with 32 heads, three tiles take 58 us instead of 60 us for
    # 2,048 rows, and 656 us instead of 681 us for 8,192 rows.
    stages = min(3 if widest <= 64 else 4, left // (block_n * columns * 2))
    used = stages * block_n * columns * 2
    short = shape.kv_len is not None and shape.kv_len <= _SHORT_KEYS
    # For a short context, use the room of a third tile of values for wide stores. On an H100 with D = 128, 2,048 rows
    # took 85.0 us instead of 86.8 us, but 8,192 rows took 1,099 us instead of 1,036 us.
    fewer_v_stages = int(short and stages > 2 and used + exchange > left)
    used -= fewer_v_stages * block_n * (block_dv + rest_dv) * 2
    # Tensor maps gain nothing for up to four tiles. Without them, 175 rows with D = 160 take 14.6 us instead of 15.7
    # us, and 512 rows with D = 64 take 10.6 us instead of 10.8 us.
    long_enough = shape.kv_len is None or shape.kv_len > 4 * block_n
    return HopperConfig(
        block_n,
        block_dv,
        stages,
        *hopper_registers(widest),
        # A few rows of a few heads fill the GPU only with splits of the keys. A short context is not worth splitting.
        num_splits=_PREFILL_SPLITS,
        short_splits=1,
        long_keys=_PREFILL_SPLIT_KEYS,
        fill=arch.sm_count,
        more_v_stages=-fewer_v_stages,
        wide_stores=used + exchange <= left,
        # With tensor maps on an H100, 32,768 rows with D = 128 took 14,201 us instead of 15,240 us, 2,048 rows with
        # D = 128 took 77.3 us instead of 80.7 us, and 4,096 rows with D = 256 took 226 us instead of 237 us. With
        # D = 512, whose tiles have 32 keys, 2,048 rows took 462 us instead of 453 us. But a map knows where narrower
        # rows end: D = 320 took 410 us instead of 447 us, and D = 384 took 428 us instead of 455 us.
        tma=long_enough and (widest <= 256 or shape.columns_left_out),
        two_blocks=rest_d > 0 or rest_dv > 0,
        rest_dv=rest_dv,
    )


def programs_of(shape: AttentionShape, block_n: int) -> int:
    """How many programs there are if each has ``block_n`` keys of a head. L_kv must be static."""
    assert shape.kv_len is not None
    return shape.heads_of_batch * -(-shape.kv_len // block_n)


def _splits_serve(shape: AttentionShape, arch: GpuArch) -> bool:
    """Whether the Hopper kernel can split these keys: more than 16 packed rows, two halves of at least 64 V columns."""
    return hopper_serves(shape, arch) and shape.packed_rows > 16 and padded_head_dim(shape.v_head_dim) >= 128


def little_for_each(shape: AttentionShape, arch: GpuArch) -> bool:
    """Whether up to 64 rows have so few keys that no multiprocessor would get more than 64 of them.

    The prologue is then most of the Hopper kernel's time. On an H100, the split-K kernel takes:

    * 4.6 us instead of 6.5 us for 60 rows, one head, D = 96 and 512 keys, and 7.9 us instead of 9.6 us for 6,000 keys;
    * 7.7 us instead of 8.4 us for 32 rows, two heads, D = 128 and 4,096 keys;
    * 8.9 us instead of 9.4 us for 36 rows, one head, D = 192 and 3,941 keys;
    * but 9.4 us instead of 7.9 us for 64 rows, two heads, D = 256 and 1,024 keys, so D = 256 is excluded.
    """
    if not _splits_serve(shape, arch) or shape.packed_rows > 64 or shape.kv_len is None:
        return False
    fits = shape.width <= 128 or (shape.width == 256 and shape.columns_left_out)
    return fits and programs_of(shape, 64) <= arch.sm_count


def reads_keys_twice(shape: AttentionShape, arch: GpuArch) -> bool:
    """Whether the Hopper kernel would copy many keys with padded columns twice, for each of two tiles of 64 rows.

    The split-K kernel then has a tile of 128 rows and reads the keys once. On an H100, it takes 403 us instead of 511
    us for 105 rows, 12 heads, D = 192 and 119,219 keys, and 44.9 us instead of 46.9 us for 120 rows, 16 heads, D = 160
    and 6,260 keys. With D = 256, which has no padded columns, two tiles are faster.
    """
    if not _splits_serve(shape, arch) or not 64 < shape.packed_rows <= 128 or shape.kv_len is None:
        return False
    return shape.width == 256 and shape.columns_left_out and programs_of(shape, 64) >= 8 * arch.sm_count


def choose_hopper_split_k(shape: AttentionShape, arch: GpuArch) -> HopperConfig | None:
    """Tiles of the Hopper kernel for decode and verify; ``None`` if the split-K kernel is as good or must serve.

    The Hopper kernel is up to 1.8x faster for many packed rows. It is slower for up to 16 rows, which fit in one tile
    of the split-K kernel: on an H100 with 4,096 keys, 8 rows take 10.6 us instead of 9.3 us with D = 256, and 12.7 us
    instead of 11.8 us with D = 128. There are enough splits for one program per multiprocessor, which is all that fits,
    or for every second multiprocessor.
    """
    width, packed_rows = shape.width, shape.packed_rows
    if not _splits_serve(shape, arch) or little_for_each(shape, arch) or reads_keys_twice(shape, arch):
        return None
    block_n = 32 if width > 256 else 64
    parallel = shape.heads_of_batch * -(-packed_rows // 64)
    splits = max(1, arch.sm_count // parallel)
    short_splits = even(splits)
    if short_splits > 32:
        # Half of the multiprocessors read as fast and leave half as much to combine. On an H100, 64 rows, two heads and
        # D = 256 took 32.2 us instead of 33.5 us for 32,768 keys, and 10.9 us instead of 11.4 us for 4,096 keys.
        short_splits = max(32, short_splits // 2)
    short_shares = False
    if shape.kv_len is not None:
        tiles = max(1, -(-shape.kv_len // block_n))
        splits = min(even(splits, tiles) if shape.kv_len >= LONG_KEYS_OF_MANY_ROWS else short_splits, tiles)
        short_shares = tiles <= 8 * splits
    # The number of tiles of keys + tiles of values in shared memory. On an H100:
    # D = 512: 64 packed rows and 131,072 keys took 380 us with 3 + 2 and 390 us with 2 + 3, but 128 rows and 32,768
    # keys took 144 us with 3 + 2 and 124 us with 2 + 3.
    # D = 256: 32 rows with splits of 4 tiles took 19.2 us with 3 + 2 and 19.8 us with 3 + 3. With splits of 16 tiles,
    # 32 rows took 33.5 us and 30.5 us, and 128 rows took 36.4 us and 32.8 us.
    # D = 128: 128 rows with splits of 4 tiles took 12.8 us with 2 + 3 and 13.1 us with 3 + 3.
    if width <= 128:
        stages, v_stages = 2, 3
    elif width <= 256:
        stages, v_stages = 3, 2 if short_shares else 3
    else:
        stages, v_stages = (3, 2) if packed_rows <= 64 else (2, 3)
    return HopperConfig(
        block_n,
        padded_head_dim(shape.v_head_dim) // 2,
        stages,
        *hopper_registers(width),
        share_rows=True,
        num_splits=splits,
        short_splits=min(short_splits, splits),
        long_keys=LONG_KEYS_OF_MANY_ROWS,
        more_v_stages=v_stages - stages,
    )
