"""A method that takes a range of sizes is compiled for the whole range."""

import copy
import re

import pytest
import torch
from dynamic_attention import LONGEST, dynamic_program
from wrappers import kernel_sources

from flashpte.export.lowering.cross_compile import cross_compile, find_arch
from flashpte.export.lowering.describe_methods import describe_method
from flashpte.passes import replace_sdpa


@pytest.fixture
def program():
    """A program whose mask maps have a row per 128 of up to 500 rows, so that strides depend on the number of rows."""
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


class Wide(torch.nn.Module):
    """Attention whose map has a row per 128 rows, and a tensor that is large only for long calls."""

    def forward(self, q, k, v, input_pos, wide):
        mask = (torch.arange(k.shape[2])[None] <= input_pos[:, None])[None, None]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask), wide * 2 + 1


@pytest.mark.lowering
def test_indices_are_wide_enough_for_the_longest_call(tmp_path, monkeypatch):
    """The example is one tile of rows with 2**20 elements; the longest call has 2**32 elements."""
    q, k, v = (torch.randn(1, 1, length, 64, dtype=torch.bfloat16) for length in (8, 1024, 1024))
    example = (q, k, v, torch.arange(8), torch.randn(8, 2**17))
    length = torch.export.Dim("length", min=1, max=2**15)
    program = torch.export.export(Wide(), example, dynamic_shapes=({2: length}, None, None, {0: length}, {0: length}))
    source = kernel_sources(replace_sdpa(program)[0], tmp_path, monkeypatch)
    widths = re.findall(r"def (triton_\w+)\(|'xnumel': '(i\d+)'", source)
    assert [width for _, width in widths if width].count("i64") == 1, widths
