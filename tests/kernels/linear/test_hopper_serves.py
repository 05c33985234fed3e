"""Which calls the kernels in Gluon take; the others get the plain kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from linear_cases import Case, build

from flashpte.kernels import tuning
from flashpte.kernels.linear import few_rows_hopper, many_rows_hopper
from flashpte.kernels.linear.tuning import choose_few_rows_hopper, choose_many_rows_hopper

HOPPER = tuning.limits("sm_90")


def served(case: Case, **changes) -> tuple[bool, bool]:
    """Whether the kernel for few and the one for many rows take a call."""
    call = dataclasses.replace(build(case).call, **changes)
    config = choose_few_rows_hopper(call.shape(), HOPPER)
    assert config is not None
    return few_rows_hopper.serves(call, config), many_rows_hopper.serves(call)


SERVED = Case(3, 48, 256, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (True, True)),
        (dict(group=64, zeros="whole"), (True, True)),
        (dict(group=128, in_features=400), (True, True)),  # 400 is a multiple of 16, but not of 128
        (dict(dtype=torch.float16), (True, True)),
        (dict(dtype=torch.float16, scale_dtype=torch.float16), (True, True)),
        (dict(scale_dtype=torch.float32), (True, True)),
        (dict(dtype=torch.float32), (False, False)),
        (dict(bits=8), (True, True)),
        (dict(bits=8, zeros="whole"), (True, True)),
        (dict(bits=8, zeros="offsets", scale_dtype=torch.float32), (True, True)),
        (dict(zeros="integer"), (True, True)),
        (dict(zeros="real"), (True, True)),
        (dict(zeros="offsets", scale_dtype=torch.float16), (True, True)),
        (dict(zeros="offsets", scale_dtype=torch.float32), (True, True)),
        (dict(in_features=264), (False, False)),  # rows of x begin between multiples of 32 bytes
        (dict(layout="batched"), (True, True)),
    ],
    ids=str,
)
def test_formats_and_shapes(changes, expected):
    assert served(dataclasses.replace(SERVED, **changes)) == expected


@pytest.mark.parametrize(
    ("bits", "zeros", "expected"),
    [(4, "none", False), (4, "whole", False), (4, "real", True), (4, "offsets", True), (8, "whole", True)],
)
def test_which_formats_need_sums_of_x(bits, zeros, expected):
    assert build(dataclasses.replace(SERVED, bits=bits, zeros=zeros)).call.shape().sums_x == expected


@pytest.mark.parametrize(
    ("name", "zeros"), [("weight", "whole"), ("scales", "whole"), ("zeros", "whole"), ("offsets", "offsets")]
)
def test_memory_between_multiples_of_16_bytes(name, zeros):
    case = dataclasses.replace(SERVED, zeros=zeros)
    tensor = getattr(build(case).call, name)
    memory = torch.zeros(tensor.numel() + 8, dtype=tensor.dtype)
    first = next(i for i in range(1, 9) if memory[i:].data_ptr() % 16)
    assert served(case, **{name: memory[first : first + tensor.numel()].view(tensor.shape)}) == (False, False)


def test_other_archs_have_no_tiles():
    shape = build(SERVED).call.shape()
    for arch in ("sm_80", "sm_89", "sm_100", "sm_120"):
        assert choose_few_rows_hopper(shape, tuning.limits(arch)) is None
        assert choose_many_rows_hopper(shape, tuning.limits(arch)) is None


@pytest.mark.parametrize("out_features", [1, 16, 48, 528, 1000, 4096, 5376, 16384, 43008, 262144])
@pytest.mark.parametrize("rows", [1, 4, 8, 16, None])
@pytest.mark.parametrize("sums_x", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_divide_the_rows_of_the_weight(rows, out_features, sums_x, bits):
    changes = dict(rows=rows, out_features=out_features, in_features=21504, sums_x=sums_x, bits=bits)
    config = choose_few_rows_hopper(dataclasses.replace(build(SERVED).call.shape(), **changes), HOPPER)
    assert config is not None
    assert -(-out_features // 16) % (config.block_n // 16) == 0
    assert config.block_n >= 16 * config.row_warps


def test_blocks_that_fill_their_waves_are_not_shared():
    shape = build(SERVED).call.shape()

    def programs(rows, out_features):
        config = choose_many_rows_hopper(dataclasses.replace(shape, rows=rows, out_features=out_features), HOPPER)
        return config.num_programs

    assert programs(256, 16384) == 0  # 128 blocks on 132 multiprocessors
    assert programs(512, 5376) == 132  # 84 blocks
    assert programs(2048, 5376) == 132  # 336 blocks are two waves and a half
    assert programs(None, 16384) == 132
