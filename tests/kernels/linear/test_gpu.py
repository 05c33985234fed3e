"""Linear layers with packed weights on a GPU, compared with float64 on random problems with poisoned memory."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from linear_cases import Case, build, check

from flashpte.kernels import tuning
from flashpte.kernels.linear import many_rows_hopper
from flashpte.kernels.linear.call import Destination
from flashpte.kernels.linear.dispatch import launch_linear
from flashpte.kernels.linear.few_rows_hopper import launch_few_rows_hopper, serves
from flashpte.kernels.linear.many_rows_hopper import launch_many_rows_hopper
from flashpte.kernels.linear.plain import launch_few_rows, launch_many_rows
from flashpte.kernels.linear.tuning import HopperFewRowsConfig, HopperManyRowsConfig, choose_few_rows_hopper

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)


def random_cases(count: int, rows: tuple[int, ...], seed: int) -> list[Case]:
    rng = random.Random(seed)
    cases = []
    for i in range(count):
        bits, columns = rng.choice((4, 4, 8)), rng.choice((128, 320, 1024, 2048, 5376))
        cases.append(
            Case(
                rows=rng.choice(rows),
                out_features=rng.choice((5, 48, 64, 256, 1000, 5376)),
                in_features=columns,
                bits=bits,
                group=rng.choice((32, 64, 128, columns) if bits == 8 else (32, 64, 128)),
                zeros=rng.choice(("none", "none", "whole", "integer", "real", "offsets")),
                bias=rng.random() < 0.5,
                dtype=rng.choice(DTYPES),
                scale_dtype=rng.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)),
                layout=rng.choice(("contiguous", "sliced", "transposed", "batched")),
                seed=i,
            )
        )
    return cases


@pytest.mark.parametrize("case", random_cases(80, (1, 2, 5, 8, 9, 16), 1), ids=str)
def test_plain_kernel_for_few_rows(case):
    problem = build(case)
    check(problem, launch_few_rows(problem.call_on("cuda")))


@pytest.mark.parametrize("case", random_cases(80, (1, 16, 17, 64, 200, 1000), 2), ids=str)
def test_plain_kernel_for_many_rows(case):
    problem = build(case)
    check(problem, launch_many_rows(problem.call_on("cuda")))


@pytest.mark.parametrize("case", random_cases(40, (0, 1, 8, 16, 17, 100), 3), ids=str)
def test_dispatch(case):
    problem = build(case)
    out = launch_linear(problem.call_on("cuda"))
    if case.rows:
        check(problem, out)
    assert out.shape == (*problem.call.x.shape[:-1], case.out_features)


# 10 (the last with 16 columns) and 42 tiles of columns; with 16,384 rows of the weight there is one split.
HOPPER = [
    Case(rows, n, k, group=group, zeros=zeros, bias=rows % 2 == 0, dtype=torch.bfloat16, layout=layout)
    for (rows, n), k, group, zeros, layout in itertools.product(
        ((1, 256), (3, 16384), (4, 5376), (5, 1024), (8, 16384), (9, 256), (16, 5376), (16, 16384)),
        (1168, 5376),
        (32, 64, 128),
        ("none", "whole"),
        ("contiguous", "sliced"),
    )
    if (layout == "contiguous" or n == 256) and (zeros == "none" or n < 16384)
]
HOPPER += [
    Case(rows, n, k, bits=8, group=group or k, bias=rows % 2 == 0, dtype=dtype, scale_dtype=dtype, layout=layout)
    for (rows, n), k, group, dtype, layout in itertools.product(
        ((1, 256), (3, 16384), (5, 1024), (9, 256), (16, 5376)),
        (1168, 5376),
        (32, 64, 128, None),
        (torch.bfloat16, torch.float16),
        ("contiguous", "sliced"),
    )
    if layout == "contiguous" or n == 256
]
# What GGUF files, HQQ, AWQ and torchao hold: offsets, zero points that are not whole, scales of any dtype.
MOVED = [
    *((4, 32, "offsets", torch.float16), (4, 32, "offsets", torch.float32), (4, 64, "offsets", torch.bfloat16)),
    *((4, 128, "offsets", torch.float32), (4, 32, "real", torch.bfloat16), (4, 128, "real", torch.float16)),
    *((4, 64, "whole", torch.float32), (4, 32, "none", torch.float16), (8, 32, "offsets", torch.float16)),
    *((8, 32, "offsets", torch.float32), (8, 0, "offsets", torch.bfloat16), (8, 0, "whole", torch.float16)),
    *((8, 128, "real", torch.float32), (8, 64, "none", torch.float32)),
]


def moved_cases(shapes: tuple[tuple[int, int, int], ...]) -> list[Case]:
    """Products of rows, N and K with each format of ``MOVED``, in both dtypes of x."""
    return [
        Case(m, n, k, bits, group or k, zeros, bias=m % 2 == 1, dtype=dtype, scale_dtype=scales, layout=layout)
        for (m, n, k), (bits, group, zeros, scales), (dtype, layout) in itertools.product(
            shapes, MOVED, ((torch.bfloat16, "contiguous"), (torch.float16, "sliced"))
        )
    ]


HOPPER += moved_cases(((1, 1536, 576), (3, 192, 576), (8, 5376, 1168), (9, 1000, 1168), (16, 4096, 1536)))


def needs_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")


@pytest.mark.parametrize("case", HOPPER, ids=str)
def test_kernel_for_hopper(case):
    needs_hopper()
    problem = build(case)
    call = problem.call_on("cuda")
    config = choose_few_rows_hopper(call.shape(), tuning.current_arch(call.x.device))
    assert config is not None
    assert serves(call, config)
    out = call.empty_output()
    launch_few_rows_hopper(call, config, Destination(out, 1))
    check(problem, out)


# Programs: one per block, fewer, as many as steps, and numbers that divide neither.
TILES = [
    *((16, 1, 1, 2), (32, 4, 2, 3, 5), (64, 2, 4, 4, 7), (128, 1, 8, 2, 1000)),
    *((16, 4, 1, 4, 11), (32, 2, 2, 3, 4), (64, 1, 4, 6, 9), (16, 2, 1, 4)),
]


@pytest.mark.parametrize("config", TILES, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernel_for_hopper_does_not_depend_on_its_tiles(config, group, dtype):
    needs_hopper()
    for rows in (1, 8, 13):
        bits = 8 if rows == 13 else 4
        for zeros, scales in (("whole" if rows == 8 else "none", dtype), ("offsets", torch.float32)):
            problem = build(
                Case(rows, 256, 1152, bits=bits, group=group, zeros=zeros, bias=True, dtype=dtype, scale_dtype=scales)
            )
            call = problem.call_on("cuda")
            out = call.empty_output()
            launch_few_rows_hopper(call, HopperFewRowsConfig(*config), Destination(out, 1))
            check(problem, out)
            again = torch.empty_like(out)
            launch_few_rows_hopper(call, HopperFewRowsConfig(*config), Destination(again, 1))
            assert torch.equal(out, again)


# Ragged rows of x and of the weight, and columns that end within a tile and within a group.
MANY_HOPPER = [
    Case(rows, n, k, group=group, zeros=zeros, bias=rows % 2 == 1, dtype=dtype, scale_dtype=dtype, layout=layout)
    for (rows, n, k), group, dtype, (zeros, layout) in itertools.product(
        ((17, 256, 1024), (64, 1000, 1168), (100, 48, 5376), (300, 640, 1040), (513, 400, 128)),
        (32, 64, 128),
        (torch.bfloat16, torch.float16),
        (("none", "contiguous"), ("whole", "sliced")),
    )
]
MANY_HOPPER += moved_cases(((17, 192, 576), (64, 1000, 1168), (300, 576, 1536)))
# Programs: one per block, more than blocks, and fewer.
MANY_TILES = [(128, 256, 4), (256, 128, 3, 132), (64, 256, 4, 3), (128, 128, 4, 7), (64, 128, 5, 2)]


@pytest.mark.parametrize("case", MANY_HOPPER, ids=str)
def test_kernel_of_many_rows_for_hopper(case):
    needs_hopper()
    problem = build(case)
    call = problem.call_on("cuda")
    assert many_rows_hopper.serves(call)
    for block_m, block_n, stages, *programs in MANY_TILES:
        out = call.empty_output().fill_(float("nan"))
        # With 8 bits, fewer stages fit.
        stages = min(stages, 2) if case.bits == 8 else stages
        config = HopperManyRowsConfig(block_m, block_n, stages, *programs)
        launch_many_rows_hopper(call, config, Destination(out, 1))
        check(problem, out)
