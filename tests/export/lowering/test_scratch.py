"""Scratch memory for kernels of a lowered program."""

import re
from types import SimpleNamespace

import pytest
import torch
from wrappers import wrapper_source

from flashpte.export.lowering.cross_compile import scratch
from flashpte.passes import replace_sdpa


class Prefill(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.lowering
def test_every_program_has_memory_for_its_tensor_maps(tmp_path):
    """Each program has its own place: with memory for only one program, the others would overwrite other tensors."""
    example = tuple(torch.randn(1, heads, 600, 128, dtype=torch.bfloat16) for heads in (8, 2, 2))
    program, report = replace_sdpa(torch.export.export(Prefill(), example))
    assert report.declined == ()
    source = wrapper_source(program, tmp_path, name="sm_90")
    found = re.findall(r"int64_t global_scratch_\w+_size\[\] = \{(.*)\};", source)
    assert found == ["static_cast<int64_t>(256) * grid_0 * grid_1 * grid_2"]


def inductor(size: str):
    """Inductor's code for memory named ``x``, with its size written as ``size``."""
    return lambda self, idx, workspace, prefix=None: (
        ([f"int64_t x_size[] = {{{size}}};", "..."], "x") if workspace.size > 0 else (["CUdeviceptr x = 0;"], "x")
    )


@pytest.mark.parametrize("size", ["256", "static_cast<int64_t>(256) * grid_0 * grid_1 * grid_2"])
def test_what_inductor_allocates_for_one_program_becomes_that_of_all(size):
    lines, name = scratch.cpp_scratch(inductor(size))(None, 3, SimpleNamespace(size=256), "global_scratch")
    assert lines == ["int64_t x_size[] = {static_cast<int64_t>(256) * grid_0 * grid_1 * grid_2};", "..."]
    assert name == "x"


def test_a_kernel_without_memory_is_left_alone():
    assert scratch.cpp_scratch(inductor("0"))(None, 3, SimpleNamespace(size=0)) == (["CUdeviceptr x = 0;"], "x")


def test_other_code_of_inductor_stops_the_lowering():
    with pytest.raises(RuntimeError, match="is not what was expected"):
        scratch.cpp_scratch(inductor("size_of_scratch"))(None, 3, SimpleNamespace(size=256))
