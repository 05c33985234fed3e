"""A method that admits a range of sizes is compiled for all of it."""

import copy

import pytest
from dynamic_attention import LONGEST, dynamic_program

from flashpte.export.lowering.cross_compile import cross_compile, find_arch
from flashpte.export.lowering.manifest import describe_method
from flashpte.passes import replace_sdpa


@pytest.fixture
def program():
    """Its maps of masks have a row for each 128 of up to 500 rows: strides that depend on how many there are."""
    return replace_sdpa(dynamic_program(layers=1))[0]


def rows(program):
    return describe_method(program)["inputs"][0]["shape"][1]


def test_moving_to_the_device_keeps_the_range(program, tmp_path):
    from torch.export import passes

    before = rows(program)
    assert before[1] >= LONGEST
    with cross_compile(find_arch("sm_90"), tmp_path, "pt2", True, lambda source: None):
        passes.move_to_device_pass(copy.deepcopy(program), "cuda")
    assert rows(program) == before
