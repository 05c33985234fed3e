"""Registers of the dense few-rows kernels, read from cubins: nothing spills, and weights are read in 16 bytes."""

import re

import pytest
import torch
from compile_only import compiling_for

from flashpte.kernels.dense.few_rows import launch_few_rows

SHAPES = [(960, 576), (49152, 576), (576, 1536), (43008, 5376)]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_nothing_spills(arch, n, k):
    with compiling_for(arch) as compiled:
        for rows in (1, 4, 16):
            for activation in ("", "silu"):
                x, weight = (torch.empty(size, k, dtype=torch.bfloat16) for size in (rows, n))
                launch_few_rows(x, weight, None, activation)
    assert len(compiled) == 6
    for kernel in compiled:
        assert kernel.spilled == 0, kernel.name
        loads = re.findall(r"ld\.global\S*", kernel.ptx)
        assert any(".v4.b32" in load for load in loads), (kernel.name, loads)
