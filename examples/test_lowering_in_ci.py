"""A lowering test for your CI: needs no GPU, and fails when attention no longer reaches the kernels.

pytest examples/test_lowering_in_ci.py
"""

import torch
from own_model_to_pte import HEAD_DIM, HEADS, TinyAttention

from flashpte.export.lowering import inspect_pte, lower
from flashpte.passes import replace_sdpa


def test_attention_lowers_to_the_kernels(tmp_path):
    model = TinyAttention().to(torch.bfloat16).eval().requires_grad_(False)
    inputs = (torch.randn(1, 1, HEADS * HEAD_DIM, dtype=torch.bfloat16), torch.tensor([0]))
    program, report = replace_sdpa(torch.export.export(model, inputs))
    assert [node.op for node in report.nodes] == ["flashpte::sdpa_decode"]

    lower({"decode": program}, output_dir=tmp_path / "out", arch="sm_80")
    method = inspect_pte(tmp_path / "out" / "model.pte").methods["decode"]
    kernels = {kernel for cubin in method.library.cubins for kernel in cubin.kernels}
    assert "_split_k_kernel" in kernels
    assert {cubin.arch for cubin in method.library.cubins} == {"sm_80"}
