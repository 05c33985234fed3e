"""A program with a linear layer of 4 bits lowers, for any number of rows, and copies no weight."""

from __future__ import annotations

import re

import pytest
import torch
from linear_cases import Case, build
from wrappers import wrapper_source

from flashpte.kernels import quantized_linear


class Layer(torch.nn.Module):
    def __init__(self, arguments):
        super().__init__()
        self.numbers = {name: value for name, value in arguments.items() if isinstance(value, int)}
        for name in ("weight", "scales", "zeros", "offsets", "bias"):
            self.register_buffer(name, arguments[name])

    def forward(self, x):
        tensors = (self.weight, self.scales, self.zeros, self.offsets, self.bias)
        return quantized_linear(x, *tensors, **self.numbers).cos()


@pytest.mark.lowering
@pytest.mark.parametrize("zeros", ["real", "offsets", "none"])
def test_a_program_of_dynamic_rows_lowers(zeros, tmp_path):
    arguments = build(Case(5, 256, 2048, zeros=zeros, bias=True, dtype=torch.bfloat16)).arguments
    rows = torch.export.Dim("rows", min=1, max=512)
    x = arguments.pop("x")[None]
    program = torch.export.export(Layer(arguments), (x,), dynamic_shapes=({1: rows},))
    source = wrapper_source(program, tmp_path)
    launched = re.findall(r"^\s*launch\w*\(kernels_\._linear_(\w+)_kernel_\d", source, re.M)
    assert launched == ["few_rows", "sum_splits", "many_rows"]
    # Memory for the sums of splits, the layer's result and its cosine, but for no copy of x or the weight.
    assert len(re.findall(r"aoti_torch_empty_strided\(", source)) == 3
