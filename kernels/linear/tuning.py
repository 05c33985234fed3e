"""Tile choices of the linear layers with packed weights: pure functions from shape and arch to a frozen config.

Those of the kernels for Hopper were measured there. Those of the plain kernels are defaults that nobody measured.
"""

from __future__ import annotations

import dataclasses

import torch

from flashpte.kernels.launch import cdiv
from flashpte.kernels.tuning import GpuArch

MAX_FEW_ROWS = 16
"""The most rows of x that the few-rows kernel takes."""

_COLUMNS = 128  # of a tile of packed weights


@dataclasses.dataclass(frozen=True)
class LinearShape:
    """The shape of one call: M rows (``None`` if dynamic), N = ``out_features``, K = ``in_features``.

    ``sums_x`` says whether few rows of x need the sums of their groups: with offsets, and with zero points that are not
    subtracted from codes.
    """

    rows: int | None
    out_features: int
    in_features: int
    bits: int
    dtype: torch.dtype
    sums_x: bool = False


@dataclasses.dataclass(frozen=True)
class FewRowsConfig:
    """Tiles of the few-rows kernel.

    A program has ``block_n`` rows of the weight. It multiplies ``tiles_at_once`` tiles of 128 columns in a step, which
    warps share. ``num_splits`` programs share the columns. ``num_stages`` is for the loop over steps.
    """

    block_n: int
    tiles_at_once: int
    num_splits: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class HopperFewRowsConfig:
    """Tiles of the few-rows kernel for Hopper.

    A block has ``block_n`` rows of the weight, at least 16 for each of ``row_warps`` warps. ``column_warps`` warps take
    tiles of 128 columns in turn. ``num_stages`` steps of copies are in flight. ``num_programs`` programs share the work
    equally; 0 stands for one program per block.
    """

    block_n: int
    column_warps: int
    row_warps: int
    num_stages: int
    num_programs: int = 0


@dataclasses.dataclass(frozen=True)
class HopperManyRowsConfig:
    """Tiles of the many-rows kernel for Hopper: ``block_m`` rows of x by ``block_n`` rows of the weight.

    ``num_stages`` steps of 128 columns are in shared memory. ``num_programs`` programs share the work equally; 0 stands
    for one program per block.
    """

    block_m: int
    block_n: int
    num_stages: int
    num_programs: int = 0


@dataclasses.dataclass(frozen=True)
class ManyRowsConfig:
    """Tiles of the many-rows kernel: ``block_m`` rows of x by ``block_n`` rows of the weight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_few_rows(shape: LinearShape, arch: GpuArch) -> FewRowsConfig:
    """Tiles for at most :data:`MAX_FEW_ROWS` rows. Splits the columns until there are two programs per multiprocessor.

    A split has at least four steps, so that its loads overlap.
    """
    block_n, at_once = 32, 2
    steps = cdiv(cdiv(shape.in_features, _COLUMNS), at_once)
    wanted = 2 * arch.sm_count // cdiv(shape.out_features, block_n)
    splits = max(1, min(wanted, steps // 4))
    # As many as have work: splits of equal length may need fewer.
    splits = cdiv(steps, cdiv(steps, splits))
    return FewRowsConfig(block_n, at_once, splits, num_warps=4, num_stages=3 if shape.dtype.itemsize == 2 else 2)


def choose_many_rows(shape: LinearShape, arch: GpuArch) -> ManyRowsConfig:
    """Tiles for more rows. Float32 gets small ones: its products run outside the tensor cores."""
    if shape.dtype.itemsize == 4:
        return ManyRowsConfig(32, 32, num_warps=4, num_stages=2)
    if shape.rows is not None and shape.rows <= 64:
        return ManyRowsConfig(64, 64, num_warps=4, num_stages=3)
    return ManyRowsConfig(128, 64, num_warps=8, num_stages=3)


def choose_few_rows_hopper(shape: LinearShape, arch: GpuArch) -> HopperFewRowsConfig | None:
    """Tiles of the kernel for Hopper; ``None`` on another arch. A dynamic M counts as 16.

    Measured on an H200 for N from 4,096 to 43,008 (262,144 with 8 bits) and K from 4,096 to 21,504. Blocks that fill
    about two programs per multiprocessor are not shared, which saves the second launch.
    """
    if arch.capability != (9, 0):
        return None
    rows, sm_count, tiles = shape.rows or MAX_FEW_ROWS, arch.sm_count, cdiv(shape.out_features, 16)
    if shape.sums_x:
        return _choose_few_rows_hopper_with_sums(shape, rows, tiles, sm_count)
    if shape.bits == 8:
        return _choose_few_rows_hopper_8_bits(shape, rows, tiles, sm_count)
    short = shape.in_features <= 8192
    narrow = tiles <= (3 if rows <= 4 else 2 if rows <= 8 else 0) * sm_count
    if tiles % 4 or (narrow and short):
        if tiles % 2 == 0 and tiles > 3 * sm_count:
            return HopperFewRowsConfig(32, column_warps=2, row_warps=2, num_stages=3, num_programs=4 * sm_count)
        return HopperFewRowsConfig(16, column_warps=4, row_warps=1, num_stages=3)
    wide = tiles >= 7 * sm_count
    if rows > 8:
        if tiles % 8 == 0 and wide:
            return HopperFewRowsConfig(128, column_warps=1, row_warps=4, num_stages=3, num_programs=4 * sm_count)
        if tiles % 8 == 0 and not short:
            return HopperFewRowsConfig(128, column_warps=1, row_warps=4, num_stages=4, num_programs=3 * sm_count)
        return HopperFewRowsConfig(64, column_warps=1, row_warps=4, num_stages=4, num_programs=3 * sm_count)
    if 1.8 * sm_count <= tiles // 4 <= 2 * sm_count:
        return HopperFewRowsConfig(64, column_warps=2, row_warps=2, num_stages=3)
    if rows <= 4 or wide:
        programs = (4 if rows <= 4 else 3) * sm_count
        return HopperFewRowsConfig(64, column_warps=2, row_warps=2, num_stages=3, num_programs=programs)
    return HopperFewRowsConfig(64, column_warps=1, row_warps=4, num_stages=4, num_programs=4 * sm_count)


def _choose_few_rows_hopper_8_bits(shape: LinearShape, rows: int, tiles: int, sm_count: int) -> HopperFewRowsConfig:
    wide = tiles >= 7 * sm_count
    if tiles % 4 or (tiles <= 2 * sm_count and shape.in_features <= 8192):
        return HopperFewRowsConfig(16, column_warps=4, row_warps=1, num_stages=3)
    if wide and tiles % 8 == 0 and rows > 8:
        return HopperFewRowsConfig(128, column_warps=1, row_warps=4, num_stages=4, num_programs=2 * sm_count)
    if rows <= 4:
        return HopperFewRowsConfig(64, column_warps=2, row_warps=2, num_stages=3, num_programs=3 * sm_count)
    return HopperFewRowsConfig(64, column_warps=1, row_warps=4, num_stages=3, num_programs=4 * sm_count)


def _choose_few_rows_hopper_with_sums(shape: LinearShape, rows: int, tiles: int, sm_count: int) -> HopperFewRowsConfig:
    """Sums of x take registers: three programs with 64 rows of the weight fit on a multiprocessor instead of four."""
    narrow = tiles <= (3 if rows <= 4 else 2) * sm_count
    if tiles % 4 or (narrow and shape.in_features <= 8192):
        return HopperFewRowsConfig(16, column_warps=4, row_warps=1, num_stages=3)
    if rows > 8 and tiles % 8 == 0:
        return HopperFewRowsConfig(128, column_warps=1, row_warps=4, num_stages=3, num_programs=2 * sm_count)
    programs = (3 if rows <= 8 and shape.bits == 4 else 2) * sm_count
    return HopperFewRowsConfig(64, column_warps=2, row_warps=2, num_stages=3, num_programs=programs)


def choose_many_rows_hopper(shape: LinearShape, arch: GpuArch) -> HopperManyRowsConfig | None:
    """Tiles of the many-rows kernel for Hopper; ``None`` on another arch.

    Blocks that fill their waves to nine tenths are not shared. A dynamic M shares what does not fill a wave.
    """
    if arch.capability != (9, 0):
        return None
    block_m, block_n, stages = 256, 128, 3
    if shape.bits == 8:
        stages = 2  # more do not fit
    if shape.rows is not None and shape.rows <= 128:
        block_m, stages = (64, 5) if shape.rows <= 64 else (128, 4)
    if shape.rows is None:
        return HopperManyRowsConfig(block_m, block_n, stages, arch.sm_count)
    if block_m == 64 and 2 * cdiv(shape.out_features, block_n) <= arch.sm_count:
        # Every block is shared by several programs: wide ones read x less often.
        return HopperManyRowsConfig(block_m, 256, 4, arch.sm_count)
    blocks = cdiv(shape.rows, block_m) * cdiv(shape.out_features, block_n)
    fills = blocks >= 0.9 * cdiv(blocks, arch.sm_count) * arch.sm_count
    return HopperManyRowsConfig(block_m, block_n, stages, 0 if fills else arch.sm_count)
