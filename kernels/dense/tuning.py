"""Tile choice of the dense few-rows kernels: a pure function from the shape to a frozen config."""

from __future__ import annotations

import dataclasses

MAX_ROWS = 16
"""The most rows of x that the kernels take."""

MAX_ROWS_IN_LANES = 4
"""The most rows of x for which lanes multiply and add; more rows always go to tensor cores."""


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """Tiles of a program: ``block_n`` rows of each part of the weight by ``block_k`` columns at a time.

    With ``tiles``, products are on tensor cores, and a step has so many blocks of columns, which warps share.
    """

    block_n: int
    block_k: int
    num_warps: int
    tiles: int = 0


def choose_dense(rows: int, weight_rows: int, in_features: int, parts: int = 1) -> DenseConfig:
    """Tiles for M = ``rows``, a weight of N = ``weight_rows`` by K = ``in_features``, and as many parts of it.

    Measured on an H200 with one part and 1, 8 and 16 rows, N from 576 to 49,152 and K from 576 to 21,504: each choice
    is within 9% of the best one tried, most within 4%. So is that for 4 rows of a small weight. Two rows, and 4 of a
    large weight, were not measured. With two parts, a program takes half as much of each.
    """
    config = _choose(rows, weight_rows, in_features)
    if parts == 1:
        return config
    if config.tiles:
        return dataclasses.replace(config, block_k=64)
    return dataclasses.replace(config, block_n=max(1, config.block_n // 2))


def _choose(rows: int, out_features: int, in_features: int) -> DenseConfig:
    narrow, short = out_features <= 1024, in_features <= 2048
    if rows == 1:
        if not short:
            return DenseConfig(1, 1024, num_warps=4)
        return DenseConfig(8, 512, num_warps=4) if out_features > 8192 else DenseConfig(2, 1024, num_warps=4)
    if rows <= MAX_ROWS_IN_LANES and narrow and short:
        return DenseConfig(2, 1024, num_warps=2) if in_features <= 1024 else DenseConfig(1, 1024, num_warps=4)
    if in_features >= 1024:
        return DenseConfig(16, 128, num_warps=4, tiles=4)
    if out_features > 8192:
        return DenseConfig(32, 64, num_warps=4, tiles=2)
    return DenseConfig(16, 64, num_warps=4, tiles=4)
