import pytest

from flashpte.export.lowering import inspect_pte, lower
from flashpte.export.lowering.self_check import executorch_kernels


def kernels(model):
    return {kernel for cubin in inspect_pte(model).methods["decode"].library.cubins for kernel in cubin.kernels}


@pytest.mark.lowering
def test_executorch_brings_its_own_kernels_and_math_brings_none(programs, tmp_path):
    only = {"decode": programs["decode"]}
    theirs = lower(only, output_dir=tmp_path / "theirs", arch="sm_90", attention="executorch")
    assert any("sdpa" in name for name in kernels(theirs.model) & executorch_kernels())
    plain = lower(only, output_dir=tmp_path / "plain", arch="sm_90", attention="math")
    assert not any("sdpa" in name for name in kernels(plain.model))
    assert any("softmax" in name for name in kernels(plain.model))
