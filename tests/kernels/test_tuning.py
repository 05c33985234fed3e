"""Tile choices are values: every choice fits its arch and its kernel's map."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from attention_cases import Case, build, with_intervals
from compile_only import compiling_for

from flashpte.kernels import tuning
from flashpte.kernels.split_k import launch_split_k
from flashpte.kernels.tiled import launch_tiled
from flashpte.kernels.tuning import AttentionShape

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SHAPES = [
    AttentionShape(batch, kv * group, kv, q_len, kv_len, dim, dim, dtype)
    for batch, kv, group, q_len, kv_len, dim, dtype in itertools.product(
        (None, 1, 3),
        (1, 4, 16),
        (1, 3, 8),
        (None, 1, 4, 16, 512),
        (None, 50, 4096, 131072),
        (16, 64, 80, 128, 160, 192, 256, 320, 512),
        (torch.bfloat16, torch.float32),
    )
]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_choice_divides_the_map_its_kernel_walks(arch):
    limits = tuning.limits(arch)
    for shape in SHAPES:
        if shape.q_len is None or shape.q_len <= 16:
            c = tuning.choose_split_k(shape, limits)
            assert tuning.SPLIT_K_MAP_BLOCK_N % c.block_n == 0
            assert 1 <= c.num_splits <= 512
            if shape.kv_len is not None:
                assert c.num_splits <= -(-shape.kv_len // c.block_n)
        t = tuning.choose_tiled(shape, limits)
        map_m, map_n = tuning.tiled_map_block(shape.head_dim, shape.v_head_dim)
        assert map_m % t.block_m == 0
        assert map_n % t.block_n == 0
        assert t.block_n % t.edge_block_n == 0


def test_hopper_tiles_divide_the_map_and_fit():
    for shape in SHAPES:
        for arch in ARCHS:
            config = tuning.choose_hopper(shape, tuning.limits(arch))
            served = arch == "sm_90" and shape.dtype == torch.bfloat16 and (shape.q_len is None or shape.q_len > 64)
            assert (config is not None) == served
            if config is not None:
                map_m, map_n = tuning.tiled_map_block(shape.head_dim, shape.v_head_dim)
                assert map_m == config.block_m
                assert map_n % config.block_n == 0
                assert config.num_stages >= 2
                columns = sum(tuning.hopper_columns(shape.head_dim, config.two_blocks))
                values = config.num_stages + config.more_v_stages
                tiles = config.num_stages * columns + values * config.columns
                exchange = 4096 * config.wide_stores
                needed = (128 * columns + config.block_n * tiles) * 2 + exchange + 1024
                assert needed <= tuning.limits(arch).shared_memory_per_block
                # Two consumer warp groups and one producer warp group share the registers of a multiprocessor.
                assert 128 * (2 * config.consumer_registers + config.producer_registers) <= 65536


def test_hopper_tiles_of_few_rows_divide_the_map_and_fit():
    served = 0
    for shape in SHAPES:
        for arch in ARCHS:
            limits = tuning.limits(arch)
            config = tuning.choose_hopper_split_k(shape, limits)
            if config is None:
                continue
            served += 1
            assert arch == "sm_90"
            assert tuning.SPLIT_K_MAP_BLOCK_N % config.block_n == 0
            assert config.columns == tuning.padded_head_dim(shape.v_head_dim)
            row = tuning.padded_head_dim(shape.head_dim) * 2
            keys = config.num_stages * config.block_n * row
            values = (config.num_stages + config.more_v_stages) * config.block_n * config.columns * 2
            assert config.block_m * row + keys + values + 1024 <= limits.shared_memory_per_block
            assert 128 * (2 * config.consumer_registers + config.producer_registers) <= 65536
    assert served


@pytest.mark.parametrize(("stages", "more"), [(1, 0), (1, 1), (2, -1), (3, -2)])
def test_hopper_kernel_with_one_stage_would_wait_for_ever(stages, more):
    with pytest.raises(ValueError, match="at least two stages of keys and of values, got 1"):
        tuning.HopperConfig(64, 128, stages, more_v_stages=more)


def test_warp_groups_that_share_rows_copy_without_tensor_maps():
    with pytest.raises(ValueError, match="does not copy by tensor maps where warp groups share rows"):
        tuning.HopperConfig(64, 128, 3, share_rows=True, tma=True)


@pytest.mark.parametrize(
    ("head_dim", "blocks"),
    [
        (16, (64, 0)),
        (64, (64, 0)),
        (72, (128, 0)),
        (80, (64, 16)),
        (88, (128, 0)),
        (96, (64, 32)),
        (104, (128, 0)),
        (128, (128, 0)),
        (136, (256, 0)),
        (160, (128, 32)),
        (168, (256, 0)),
        (192, (128, 64)),
        (200, (256, 0)),
        (256, (256, 0)),
        (320, (512, 0)),
        (512, (512, 0)),
    ],
)
def test_blocks_of_columns_of_the_hopper_kernel(head_dim, blocks):
    assert tuning.hopper_columns(head_dim) == blocks
    assert tuning.hopper_columns(head_dim, two_blocks=False) == (max(64, tuning.padded_head_dim(head_dim)), 0)


@pytest.mark.parametrize(
    ("dims", "block_n", "two_blocks"),
    [
        ((64, 64), 128, False),
        ((80, 80), 128, True),
        ((96, 64), 128, True),
        ((64, 80), 128, True),
        ((160, 160), 128, True),
        ((192, 128), 128, True),
        ((128, 192), 64, True),
        ((192, 192), 64, True),
        ((224, 224), 64, False),
        ((80, 512), 32, False),
        ((320, 96), 32, False),
    ],
)
def test_prefill_of_rows_in_two_blocks(dims, block_n, two_blocks):
    shape = AttentionShape(1, 4, 2, 300, 4096, *dims, torch.bfloat16)
    config = tuning.choose_hopper(shape, tuning.limits("sm_90"))
    assert (config.block_n, config.two_blocks) == (block_n, two_blocks)
    assert config.columns >= min(dims[1], 256)


def test_tiles_of_two_blocks_of_columns_are_wide_and_not_shared():
    with pytest.raises(ValueError, match="one block of columns below 64 keys or if warp groups share rows"):
        tuning.HopperConfig(64, 64, 3, share_rows=True, two_blocks=True)
    with pytest.raises(ValueError, match="one block of columns below 64 keys"):
        tuning.HopperConfig(32, 64, 3, two_blocks=True)
    with pytest.raises(ValueError, match="only with two blocks"):
        tuning.HopperConfig(64, 64, 3, rest_dv=32)


def test_choices_are_frozen_and_repeatable():
    shape, arch = SHAPES[0], tuning.limits("sm_90")
    choice = tuning.choose_split_k(shape, arch)
    assert choice == tuning.choose_split_k(shape, arch)
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.block_n = 1


def test_decode_fills_the_gpu():
    shape = AttentionShape(1, 32, 4, 1, 131072, 512, 512, torch.bfloat16)
    for arch in ARCHS:
        limits = tuning.limits(arch)
        assert tuning.choose_split_k(shape, limits).num_splits * shape.heads_kv >= limits.sm_count - 4


@pytest.mark.parametrize("q_len", [1, 8])
@pytest.mark.parametrize(
    ("kv_len", "splits", "short"), [(4096, 32, 32), (32768, 32, 32), (131072, 33, 32), (None, 33, 32)]
)
def test_splits_are_even_unless_one_of_them_gets_more_keys(q_len, kv_len, splits, short):
    """With 131,072 keys of D = 512, one of 33 splits has 125 tiles and one of 32 has 128."""
    shape = AttentionShape(1, 32, 4, q_len, kv_len, 512, 512, torch.bfloat16)
    choose = tuning.choose_split_k if q_len == 1 else tuning.choose_hopper_split_k
    config = choose(shape, tuning.limits("sm_90"))
    assert (config.num_splits, config.short_splits) == (splits, short)


def test_short_keys_are_not_split_below_a_tile():
    shape = AttentionShape(1, 4, 4, 1, 50, 64, 64, torch.bfloat16)
    assert tuning.choose_split_k(shape, tuning.limits("sm_90")).num_splits == 1


def test_unknown_archs():
    assert tuning.limits("sm_103").name == "sm_100"
    with pytest.raises(ValueError, match="older than every supported"):
        tuning.limits("sm_70")
    with pytest.raises(ValueError, match="not an architecture"):
        tuning.limits("hopper")


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
@pytest.mark.parametrize(
    ("q_len", "group", "head_dim", "mask"),
    [
        (16, 8, 512, "bool_context"),
        (1, 4, 128, "none"),
        (1, 8, 256, "none"),
        (300, 2, 256, "bool_window"),
        (5, 2, 512, "intervals"),
        (300, 2, 512, "intervals"),
    ],
)
def test_choices_compile_within_the_shared_memory_of_their_arch(arch, q_len, group, head_dim, mask):
    case = Case(q_len, 4096, heads_q=2 * group, head_dim=head_dim, dtype=torch.bfloat16)
    if mask == "intervals":
        problem, intervals = with_intervals(case, "documents")
        problem = dataclasses.replace(problem, mask=None)
    else:
        problem, intervals = build(dataclasses.replace(case, mask=mask)), None
    launcher = launch_split_k if q_len <= 16 else launch_tiled
    with compiling_for(arch) as compiled:
        launcher(problem.call(case.dim_order, intervals))
    main = next(k for k in compiled if k.name in ("_split_k_kernel", "_tiled_kernel", "_hopper_kernel"))
    assert (main.name == "_hopper_kernel") == (arch == "sm_90" and q_len * group > 16)
    assert 0 < main.shared_memory <= tuning.limits(arch).shared_memory_per_block
    assert "mma" in main.ptx  # on the tensor cores, not element by element
