"""Tile choices: pure functions from (shape, dtype, arch) to a frozen config. Export runs no benchmarks.

A build is therefore deterministic, and is the same on a machine without a GPU.
"""

from flashpte.kernels.tuning.arch import ARCHES, GpuArch, current_arch, limits
from flashpte.kernels.tuning.choose import choose_combine, choose_split_k, choose_tiled, tiled_map_block
from flashpte.kernels.tuning.configs import (
    LONG_KEYS,
    SPLIT_K_MAP_BLOCK_N,
    WIDEST_TILE,
    AttentionShape,
    CombineConfig,
    Config,
    HopperConfig,
    SplitKConfig,
    TiledConfig,
    hopper_columns,
    padded_head_dim,
    tile_columns,
)
from flashpte.kernels.tuning.hopper import choose_hopper, choose_hopper_split_k, hopper_registers

__all__ = [
    "ARCHES",
    "LONG_KEYS",
    "SPLIT_K_MAP_BLOCK_N",
    "WIDEST_TILE",
    "AttentionShape",
    "CombineConfig",
    "Config",
    "GpuArch",
    "HopperConfig",
    "SplitKConfig",
    "TiledConfig",
    "choose_combine",
    "choose_hopper",
    "choose_hopper_split_k",
    "choose_split_k",
    "choose_tiled",
    "current_arch",
    "hopper_columns",
    "hopper_registers",
    "limits",
    "padded_head_dim",
    "tile_columns",
    "tiled_map_block",
]
