"""The tile choices for the kernel for Hopper. Where a number came from a measurement it says which."""

from __future__ import annotations

import torch

from flashpte.kernels.tuning.arch import GpuArch
from flashpte.kernels.tuning.configs import AttentionShape, HopperConfig, even, padded_head_dim

# From this many keys on all splits work: they leave more bytes than those of Triton's kernel.
LONG_KEYS_OF_MANY_ROWS = 65536

# Prefill of few rows: into how many splits the keys may be cut, and from how many on.
_PREFILL_SPLITS, _PREFILL_SPLIT_KEYS = 16, 2048

# Up to this many keys, storing the results of prefill takes a share of the time.
_SHORT_KEYS = 4096


def hopper_serves(shape: AttentionShape, arch: GpuArch) -> bool:
    """Whether the kernel for Hopper runs there, and takes the dtype."""
    return arch.capability == (9, 0) and shape.dtype in (torch.bfloat16, torch.float16)


def hopper_registers(width: int) -> tuple[int, int]:
    """Registers per thread of the kernel for Hopper: of its consumers, and of its producer, which copies ``width``."""
    return (224, 56) if width <= 256 else (216, 72)  # wide rows need more addresses to copy


def choose_hopper(shape: AttentionShape, arch: GpuArch) -> HopperConfig | None:
    """Tiles for the prefill kernel for Hopper; ``None`` where it does not serve: other archs, float32, few rows."""
    few_rows = shape.q_len is not None and shape.q_len <= 64
    if few_rows or not hopper_serves(shape, arch):
        return None
    # 128 bytes of a row are swizzled at a time.
    block_d = max(64, padded_head_dim(shape.head_dim))
    block_dv = min(256, max(64, padded_head_dim(shape.v_head_dim)))
    widest = max(block_d, padded_head_dim(shape.v_head_dim))
    # On an H200, 64 keys instead of 128 ran 13% slower for D = 128, 32 instead of 64 33% slower for D = 256.
    block_n = 128 if widest <= 128 else 64 if widest <= 256 else 32
    barriers, exchange = 1024, 4096
    left = arch.shared_memory_per_block - barriers - 128 * block_d * 2
    # Of D = 64 a fourth tile costs 4 to 6%: 58 us with three for 2,048 rows of 32 heads of an H100 instead of 60, 656
    # instead of 681 for 8,192.
    stages = min(3 if widest <= 64 else 4, left // (block_n * (block_d + block_dv) * 2))
    used = stages * block_n * (block_d + block_dv) * 2
    short = shape.kv_len is not None and shape.kv_len <= _SHORT_KEYS
    # Room for wide stores instead of a third tile of values: 2,048 rows of D = 128 took 85.0 us on an H100 instead of
    # 86.8, 8,192 rows 1,099 instead of 1,036.
    fewer_v_stages = int(short and stages > 2 and used + exchange > left)
    used -= fewer_v_stages * block_n * block_dv * 2
    # Maps gain nothing in four tiles: without them 175 rows of D = 160 take 14.6 us instead of 15.7, 512 of D = 64 10.6
    # instead of 10.8.
    long_enough = shape.kv_len is None or shape.kv_len > 4 * block_n
    return HopperConfig(
        block_n,
        block_dv,
        stages,
        *hopper_registers(widest),
        # Few rows of few heads fill the GPU only with splits of the keys; those of a short context are not worth it.
        num_splits=_PREFILL_SPLITS,
        short_splits=1,
        long_keys=_PREFILL_SPLIT_KEYS,
        fill=arch.sm_count,
        more_v_stages=-fewer_v_stages,
        wide_stores=used + exchange <= left,
        # On an H100 32,768 rows of D = 128 took 14,201 us instead of 15,240, 2,048 77.3 instead of 80.7; of D = 256
        # 226 instead of 237 for 4,096; of D = 512, whose tiles are of 32 keys, 462 instead of 453 for 2,048. But a map
        # knows where narrower rows end: of D = 320 410 instead of 447, of D = 384 428 instead of 455.
        tma=long_enough and (widest <= 256 or shape.columns_left_out),
    )


def programs_of(shape: AttentionShape, block_n: int) -> int:
    """How many programs there are if each has ``block_n`` keys of a head; the length is known."""
    assert shape.kv_len is not None
    return shape.heads_of_batch * -(-shape.kv_len // block_n)


def _splits_serve(shape: AttentionShape, arch: GpuArch) -> bool:
    """Whether the kernel for Hopper could split these keys: 17 rows and more, and two halves of at least 64 columns."""
    return hopper_serves(shape, arch) and shape.packed_rows > 16 and padded_head_dim(shape.v_head_dim) >= 128


def little_for_each(shape: AttentionShape, arch: GpuArch) -> bool:
    """Whether up to 64 rows have so few keys that no multiprocessor of Hopper would get more than 64 of them.

    What the kernel for Hopper takes to begin is then most of its time. On an H100 the other takes 4.6 us instead of 6.5
    for 60 rows of one head of D = 96 and 512 keys, 7.9 instead of 9.6 for 6,000, 7.7 instead of 8.4 for 32 rows of two
    heads of D = 128 and 4,096, 8.9 instead of 9.4 for 36 rows of one head of D = 192 and 3,941. At D = 256 it takes
    longer: 64 rows of two heads and 1,024 keys 9.4 instead of 7.9.
    """
    if not _splits_serve(shape, arch) or shape.packed_rows > 64 or shape.kv_len is None:
        return False
    fits = shape.width <= 128 or (shape.width == 256 and shape.columns_left_out)
    return fits and programs_of(shape, 64) <= arch.sm_count


def reads_keys_twice(shape: AttentionShape, arch: GpuArch) -> bool:
    """Whether the kernel for Hopper would copy many keys of ragged rows twice, once for each of two tiles of 64 rows.

    The other then has 128 rows and reads them once: on an H100 403 us instead of 511 for 105 rows, 12 heads of D = 192
    and 119,219 keys, 44.9 instead of 46.9 for 120 rows, 16 heads of D = 160 and 6,260. At D = 256, where no columns are
    left out, two tiles are faster.
    """
    if not _splits_serve(shape, arch) or not 64 < shape.packed_rows <= 128 or shape.kv_len is None:
        return False
    return shape.width == 256 and shape.columns_left_out and programs_of(shape, 64) >= 8 * arch.sm_count


def choose_hopper_split_k(shape: AttentionShape, arch: GpuArch) -> HopperConfig | None:
    """Tiles for decode and verify with the kernel for Hopper; ``None`` where Triton's is as good or has to serve.

    It is up to 1.8 times faster for many packed rows, and slower for up to 16, which fit in one tile of the other: 10.6
    instead of 9.3 us for 8 rows of D = 256 and 4,096 keys of an H100, 12.7 instead of 11.8 for 8 of D = 128. Splits:
    one program per multiprocessor, which is all that fits, or for every second one.
    """
    width, packed_rows = shape.width, shape.packed_rows
    if not _splits_serve(shape, arch) or little_for_each(shape, arch) or reads_keys_twice(shape, arch):
        return None
    block_n = 32 if width > 256 else 64
    parallel = shape.heads_of_batch * -(-packed_rows // 64)
    splits = max(1, arch.sm_count // parallel)
    short_splits = even(splits)
    if short_splits > 32:
        # Half of the multiprocessors read as fast, and leave half as much to combine: 64 rows of two heads of D = 256
        # took 32.2 us for 32,768 keys of an H100 instead of 33.5, and 10.9 for 4,096 instead of 11.4.
        short_splits = max(32, short_splits // 2)
    short_shares = False
    if shape.kv_len is not None:
        tiles = max(1, -(-shape.kv_len // block_n))
        splits = min(even(splits, tiles) if shape.kv_len >= LONG_KEYS_OF_MANY_ROWS else short_splits, tiles)
        short_shares = tiles <= 8 * splits
    # Tiles of keys and of values in shared memory. Of D = 512, 64 packed rows took 380 us for 131,072 keys of an H100
    # with three and two, 390 with two and three; 128 rows for 32,768 keys 144 and 124. Of D = 256, 32 rows took 19.2
    # for splits of 4 tiles with three and two, 19.8 with three of each; for splits of 16 tiles 33.5 and 30.5, 128 rows
    # 36.4 and 32.8. Of D = 128, 128 rows took 12.8 for splits of 4 tiles with two and three, 13.1 with three of each.
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
