"""The pass on ExecuTorch's edge dialect, where ``transform_passes=`` runs it."""

from __future__ import annotations

import torch
from executorch.exir import EdgeCompileConfig, to_edge
from programs import assert_same_attention, cached_program, exported, qkv

from flashpte.passes import ReplaceSdpaPass


def test_edge_programs_are_rewritten_and_stay_valid():
    for q_len, dynamic in ((1, None), (5, None), (8, (2, 16)), (20, (1, 60)), (20, (17, 60))):
        program, args = cached_program(q_len, dynamic, layers=2)
        expected = program.module()(*args)
        keep = [torch.ops.aten.scaled_dot_product_attention.default]
        edge = to_edge(program, compile_config=EdgeCompileConfig(_skip_dim_order=True, preserve_ops=keep))
        names = [str(n.target) for n in edge.exported_program().graph.nodes]
        assert sum("scaled_dot_product_attention" in n for n in names) == 2
        rewrite = ReplaceSdpaPass()
        edge = edge.transform([rewrite])
        names = [str(n.target) for n in edge.exported_program().graph.nodes]
        assert sum("flashpte.sdpa_" in n for n in names) == 2
        assert sum("flashpte.interval_map" in n for n in names) == 1
        assert not any("scaled_dot_product_attention" in n for n in names)
        assert len(rewrite.report.replaced) == 2
        out = edge.exported_program().module()(*args)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_an_attention_that_is_the_output():
    class Bare(torch.nn.Module):
        def forward(self, q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    args = qkv(5)
    keep = [torch.ops.aten.scaled_dot_product_attention.default]
    config = EdgeCompileConfig(_skip_dim_order=True, preserve_ops=keep)
    edge = to_edge(exported(Bare(), args), compile_config=config).transform([ReplaceSdpaPass()])
    out = edge.exported_program().module()(*args)
    assert_same_attention(out, Bare()(*args))
