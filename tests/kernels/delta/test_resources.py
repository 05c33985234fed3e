"""Registers and shared memory of the delta rule's kernels, read from cubins."""

import dataclasses

import pytest
import torch
from compile_only import compiling_for
from delta_cases import Case, build

from flashpte.kernels.delta.recurrent import launch_recurrent
from flashpte.kernels.delta.scan import launch_chunked

MODEL = dict(heads_k=16, heads=32, k_dim=128, v_dim=128, dtype=torch.bfloat16, layout="contiguous")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nothing_spills_in_the_sizes_of_the_models(arch):
    with compiling_for(arch) as compiled:
        launch_recurrent(build(Case(4, **MODEL)))
        launch_chunked(build(Case(100, **MODEL)))
    assert [kernel.name for kernel in compiled] == [
        "_delta_recurrent_kernel",
        "_delta_prepare_kernel",
        "_delta_scan_kernel",
    ]
    for kernel in compiled:
        assert kernel.spilled == 0, kernel
    if arch == "sm_90":
        assert all("wgmma" in kernel.ptx for kernel in compiled[1:])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize(("dim", "dtype"), [(96, torch.float16), (128, torch.float32)], ids=str)
def test_other_sizes_fit_in_shared_memory(arch, dim, dtype):
    """Compiling fails if they do not."""
    with compiling_for(arch) as compiled:
        launch_recurrent(build(Case(4, k_dim=dim, v_dim=dim, dtype=dtype)))
        launch_chunked(build(Case(100, k_dim=dim, v_dim=dim, dtype=dtype)))
    assert len(compiled) == 3


def test_the_scan_copies_its_operands_in_16_bytes():
    """Whatever the layout: other operands gave wrong results (``_why_not_chunked``)."""
    for layout in ("split", "contiguous"):
        with compiling_for("sm_90", to_the_end=False) as compiled:
            launch_chunked(build(dataclasses.replace(Case(100, **MODEL), layout=layout)))
        (code,) = (code for name, code in compiled if name == "_delta_scan_kernel")
        loop = code[code.index("scf.for") : code.index("scf.yield")]
        assert "tt.load" not in loop
