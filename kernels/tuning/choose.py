"""The tile choices. Where a number came from a measurement it says which; see docs/benchmarks.md."""

from __future__ import annotations

import dataclasses

import torch

from flashpte.kernels.tuning.arch import GpuArch

# Keys per tile of the map that split-K kernels walk; every split-K block_n divides it.
SPLIT_K_MAP_BLOCK_N = 64

# From this many keys on, all splits of split-K kernels work, and not only those for short contexts.
LONG_KEYS = 16384

# The same for the kernel for Hopper, whose splits leave more bytes.
_LONG_KEYS_OF_MANY_ROWS = 65536

_MAX_SPLITS = 512

# From this many results with D_v above 256 on, fewer splits are added in a step.
_MANY_RESULTS = 65536

# Prefill of few rows: into how many splits the keys may be cut, and from how many on.
_PREFILL_SPLITS, _PREFILL_SPLIT_KEYS = 16, 2048

# Up to this many keys, storing the results of prefill takes a share of the time.
_SHORT_KEYS = 4096

# Rows, keys, stages. Scores of float32 tensors are summed element by element, which wants small tiles.
_FLOAT32_TILE = (16, 16, 1)


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
    short_splits: int = _MAX_SPLITS
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


@dataclasses.dataclass(frozen=True)
class CombineConfig:
    """Tiles of the kernel that combines splits: a step of its one warp adds ``block_s``, in ``block_dv`` columns."""

    block_s: int
    block_dv: int


def _even(splits: int, tiles: int | None = None) -> int:
    """``splits``, or the multiple of 16 below if that is near and no split gets more of ``tiles``, if they are known.

    Steps that combine powers of two have nothing left over then: 32 splits instead of 33 took 17.8 instead of 18.3 us
    for one row of D = 512 and 4,096 keys of an H100, 11.6 instead of 12.5 for 16 rows of D = 256.
    """
    even = splits - splits % 16
    near = splits % 16 <= splits // 32
    return even if near and (tiles is None or -(-tiles // even) <= -(-tiles // splits)) else splits


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile that holds ``head_dim``: a power of two, at least 16 (a matrix instruction's minimum)."""
    return max(16, _next_power_of_2(head_dim))


def choose_combine(config: SplitKConfig | HopperConfig, v_head_dim: int, results: int | None) -> CombineConfig:
    """Tiles for combining the splits of ``config``; ``results`` is B x H_q x L_q x D_v, ``None`` if that is dynamic.

    One warp, which exchanges nothing through shared memory, has 128 bytes of every row, and adds all splits of a few,
    else those of a short context, in one step, which takes as long as reading them; fewer where many results would need
    more memory than the GPU's programs have (8 rows of D = 512 25.6 instead of 26.4 us). With 4 warps and 64 columns
    decodes of 4,096 keys of an H100 took 0.3 to 0.6 us longer, verifies of 16 rows of D = 256 and 512 1 to 3.
    """
    splits = min(64, _next_power_of_2(config.num_splits if config.num_splits <= 64 else config.short_splits))
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


def choose_split_k(shape: AttentionShape, arch: GpuArch) -> SplitKConfig:
    """Tiles for decode and verify.

    Rows: all ``L_q x group`` packed rows in one tile where the accumulator fits, so that keys are read once. Splits:
    enough programs for one per multiprocessor, on long buffers of narrow heads for two; with a dynamic L_kv, as for a
    long one.
    """
    packed_rows = (shape.q_len or 16) * shape.group
    width = padded_head_dim(max(shape.head_dim, shape.v_head_dim))
    rows = min(max(16, _next_power_of_2(packed_rows)), 64 if width > 256 else 128)
    # With 2 stages instead of 3, 8 rows of D = 512 took 303 instead of 246 us for 131,072 keys of an H200.
    block_n, stages = (32, 3 if rows == 16 else 2) if width > 256 else (64, 3)
    if shape.dtype == torch.float32:
        rows, block_n, stages = _FLOAT32_TILE
    # The mask is loaded in a loop of its own, which is not pipelined.
    rows, block_n, stages = _fit(dataclasses.replace(shape, mask_itemsize=0), rows, block_n, stages, 4, arch)
    parallel = (shape.batch or 1) * shape.heads_kv * -(-packed_rows // rows)
    splits = short_splits = _even(max(1, arch.sm_count // parallel))
    if shape.kv_len is None or shape.kv_len >= LONG_KEYS:
        # A second program per multiprocessor helps where two fit beside each other and one has few bytes on their way.
        # (Of the stages one is in registers, unless the matrix instructions of a warp group read it from shared
        # memory.) With D = 128 one has enough: 50.1 us for 32,768 keys of an H100 instead of 51.1, and 51.1 instead of
        # 52.7 for 4 rows.
        staged = stages if rows >= 64 else stages - 1
        needed = (staged * block_n * 2 + rows) * width * shape.dtype.itemsize
        two = width <= 64 and 2 * needed <= arch.shared_memory_per_block
        splits = max(1, (2 if two else 1) * arch.sm_count // parallel)
    if shape.kv_len is not None:
        tiles = max(1, -(-shape.kv_len // block_n))
        splits = min(_even(splits, tiles), tiles)
    # 4 warps for 2 packed rows of D = 256 are 1% faster, 8 for 4 to 16 rows 4%.
    warps = 8 if rows * width > 32 * 256 or rows >= 64 or (width == 256 and packed_rows >= 4) else 4
    # On an H200 two loops made D = 512 15 to 25% slower with 2 stages (registers), not with 3, and narrower heads up to
    # 25% faster.
    splits = min(splits, _MAX_SPLITS)
    separate = width <= 256 or stages == 3
    # On an H100 a context that ends within a tile then took 19.0 us instead of 22.7 (D = 512, 4,000 keys), 11.3 instead
    # of 12.2 (D = 128).
    edge_weight = 1 if not separate else 4 if width > 256 else 2
    return SplitKConfig(rows, block_n, splits, warps, stages, separate, min(short_splits, splits), edge_weight)


def choose_tiled(shape: AttentionShape, arch: GpuArch) -> TiledConfig:
    """Tiles for prefill: the map's tile where it fits, smaller for short L_q, small shared memory and float32."""
    width = padded_head_dim(max(shape.head_dim, shape.v_head_dim))
    rows, block_n = tiled_map_block(shape.head_dim, shape.v_head_dim)
    stages = 3 if width <= 128 else 2
    if width > 256:
        rows = 64
        # 185 (mask) and 197 (causal) TFLOP/s on an H200, against 174 and 140 with 64 keys and one stage.
        block_n = 32
    if shape.dtype == torch.float32:
        rows, block_n, stages = _FLOAT32_TILE
    if shape.q_len is not None:
        rows = min(rows, max(16, _next_power_of_2(shape.q_len)))
    # The mask is loaded in the edge loop alone, which has its own, smaller tile.
    itemsize = shape.dtype.itemsize
    rows, block_n, stages = _fit(dataclasses.replace(shape, mask_itemsize=0), rows, block_n, stages, itemsize, arch)
    # 32 keys would not spill registers, but ran 7% slower (D = 256, window of 1,024 on an H200).
    edge_n, edge_stages = min(block_n, 64), min(stages, 2)
    _, edge_n, edge_stages = _fit(shape, rows, edge_n, edge_stages, itemsize, arch)
    return TiledConfig(rows, block_n, 4 if rows <= 32 else 8, stages, edge_n, edge_stages)


def hopper_registers(width: int) -> tuple[int, int]:
    """Registers per thread of the kernel for Hopper: of its consumers, and of its producer, which copies ``width``."""
    return (224, 56) if width <= 256 else (216, 72)  # wide rows need more addresses to copy


def _hopper_serves(shape: AttentionShape, arch: GpuArch) -> bool:
    return arch.capability == (9, 0) and shape.dtype in (torch.bfloat16, torch.float16)


def choose_hopper(shape: AttentionShape, arch: GpuArch) -> HopperConfig | None:
    """Tiles for the prefill kernel for Hopper; ``None`` where it does not serve: other archs, float32, few rows."""
    few_rows = shape.q_len is not None and shape.q_len <= 64
    if few_rows or not _hopper_serves(shape, arch):
        return None
    # 128 bytes of a row are swizzled at a time.
    block_d = max(64, padded_head_dim(shape.head_dim))
    block_dv = min(256, max(64, padded_head_dim(shape.v_head_dim)))
    widest = max(block_d, padded_head_dim(shape.v_head_dim))
    # On an H200, 64 keys instead of 128 ran 13% slower for D = 128, 32 instead of 64 33% slower for D = 256.
    block_n = 128 if widest <= 128 else 64 if widest <= 256 else 32
    barriers, exchange = 1024, 4096
    left = arch.shared_memory_per_block - barriers - 128 * block_d * 2
    stages = min(4, left // (block_n * (block_d + block_dv) * 2))
    used = stages * block_n * (block_d + block_dv) * 2
    short = shape.kv_len is not None and shape.kv_len <= _SHORT_KEYS
    # Room for wide stores instead of a third tile of values: 2,048 rows of D = 128 took 85.0 us on an H100 instead of
    # 86.8, 8,192 rows 1,099 instead of 1,036.
    fewer_v_stages = int(short and stages > 2 and used + exchange > left)
    used -= fewer_v_stages * block_n * block_dv * 2
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
        # 226 instead of 237 for 4,096; of D = 512, whose tiles are of 32 keys, 462 instead of 453 for 2,048.
        tma=widest <= 256,
    )


def choose_hopper_split_k(shape: AttentionShape, arch: GpuArch) -> HopperConfig | None:
    """Tiles for decode and verify with the kernel for Hopper; ``None`` where Triton's is as good or has to serve.

    It is up to 1.8 times faster for many packed rows, and slower for up to 16, which fit in one tile of the other: 10.6
    instead of 9.3 us for 8 rows of D = 256 and 4,096 keys of an H100, 12.7 instead of 11.8 for 8 of D = 128. Splits:
    one program per multiprocessor, which is all that fits, or for every second one.
    """
    width = max(padded_head_dim(shape.head_dim), padded_head_dim(shape.v_head_dim))
    packed_rows = (shape.q_len or 16) * shape.group
    if not _hopper_serves(shape, arch):
        return None
    # A warp group's half of the columns is at least the 64 that are swizzled at a time.
    if padded_head_dim(shape.v_head_dim) < 128 or packed_rows <= 16:
        return None
    block_n = 32 if width > 256 else 64
    parallel = (shape.batch or 1) * shape.heads_kv * -(-packed_rows // 64)
    splits = max(1, arch.sm_count // parallel)
    short_splits = _even(splits)
    if short_splits > 32:
        # Half of the multiprocessors read as fast, and leave half as much to combine: 64 rows of two heads of D = 256
        # took 32.2 us for 32,768 keys of an H100 instead of 33.5, and 10.9 for 4,096 instead of 11.4.
        short_splits = max(32, short_splits // 2)
    short_shares = False
    if shape.kv_len is not None:
        tiles = max(1, -(-shape.kv_len // block_n))
        splits = min(_even(splits, tiles) if shape.kv_len >= _LONG_KEYS_OF_MANY_ROWS else short_splits, tiles)
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
        long_keys=_LONG_KEYS_OF_MANY_ROWS,
        more_v_stages=v_stages - stages,
    )
