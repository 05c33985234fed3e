"""Declined attention is compiled as plain math, never by ExecuTorch's own replacement."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flashpte.export.lowering import inspect_pte, lower
from flashpte.export.lowering.self_check import executorch_kernels
from flashpte.passes import replace_sdpa

pytestmark = pytest.mark.lowering


class Declined(torch.nn.Module):
    """One attention with dropout, and one on keys with a non-contiguous head dim."""

    def forward(self, q, k, v):
        dropped = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
        return dropped + F.scaled_dot_product_attention(q, k.transpose(2, 3).contiguous().transpose(2, 3), v)


@pytest.mark.host_code
def test_declined_attention_still_lowers_by_a_compiler_of_two_words(cxx, tmp_path):
    # Few rows, so that copying the keys does not pay.
    args = tuple(torch.randn(1, 4, rows, 64, dtype=torch.bfloat16) for rows in (4, 64, 64))
    program, report = replace_sdpa(torch.export.export(Declined(), args))
    assert [("dropout" in n.reason, "stride" in n.reason) for n in report.declined] == [(True, False), (False, True)]
    lower({"forward": program}, output_dir=tmp_path / "out", arch="sm_90")
    (method,) = inspect_pte(tmp_path / "out" / "model.pte").methods.values()
    kernels = {kernel for cubin in method.library.cubins for kernel in cubin.kernels}
    assert kernels
    assert not kernels & (executorch_kernels() | {"_tiled_kernel", "_hopper_kernel", "_split_k_kernel"})
    assert (tmp_path / "calls").read_text().count("g++") >= 2
