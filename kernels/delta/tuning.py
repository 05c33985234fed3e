"""Tile choices of the delta rule's kernels: pure functions from the shape to frozen configs."""

from __future__ import annotations

import dataclasses

from flashpte.kernels.tuning.arch import GpuArch

CHUNK = 64
"""Tokens of a chunk of the chunked kernels."""


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    """A program of the recurrent kernel has all of D_k and ``block_v`` columns of D_v."""

    block_v: int
    num_warps: int


@dataclasses.dataclass(frozen=True)
class ChunkedConfig:
    """Warps of a program that prepares a chunk, and columns, warps and stages of one that carries the state."""

    prepare_warps: int
    block_v: int
    scan_warps: int
    scan_stages: int


def choose_recurrent(k_dim: int) -> RecurrentConfig:
    """Columns of a program of the recurrent kernel: a state of 128 x 16 is 64 registers of a warp's lanes.

    Measured on an H200 at D_k = D_v = 128 with 1, 4 and 16 tokens: within 5% of the best of ten choices.
    """
    return RecurrentConfig(16, 1) if k_dim <= 128 else RecurrentConfig(16, 2)


def choose_chunked(itemsize: int, arch: GpuArch) -> ChunkedConfig:
    """Tiles of the chunked kernels, for head dims of up to 128.

    The scan keeps a key, a query and two 64 x 64 blocks of each of two stages in shared memory. Without Hopper's
    products, which read their operands from there, 32 columns do not fit in registers.
    """
    if itemsize == 4:
        return ChunkedConfig(8, 16, 4, 1)
    return ChunkedConfig(4, 32, 4, 2) if arch.capability[0] == 9 else ChunkedConfig(8, 16, 4, 2)
