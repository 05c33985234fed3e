"""Reductions over a row: in registers up to 8,192 elements, in a loop beyond."""

import pytest
import torch
from wrappers import wrapper_source

pytestmark = [pytest.mark.lowering, pytest.mark.xdist_group("reductions")]


class Norms(torch.nn.Module):
    """A norm, the residual, and the norm after it, as in a decoder layer."""

    def forward(self, x, residual):
        def norm(values):
            wide = values.float()
            return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(values.dtype)

        total = norm(x) + residual
        return total, norm(total)


@pytest.mark.parametrize(("rows", "width", "persistent"), [(1, 5376, True), (64, 8192, True), (512, 8200, False)])
def test_rows_in_registers(tmp_path, rows, width, persistent):
    row = torch.ones(rows, width, dtype=torch.bfloat16)
    source = wrapper_source(torch.export.export(Norms(), (row, row)), tmp_path)
    # Inductor names kernels by their kind: "per" for persistent reductions, "red" for loops.
    assert ("triton_per_fused" in source) == persistent
    assert ("triton_red_fused" in source) != persistent
