"""Calls that the kernels cannot take stay unchanged, and the report gives the reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import Attention, calls, exported, qkv

from flashpte.passes import replace_sdpa
from flashpte.passes.attention.call import SdpaCall
from flashpte.passes.attention.route import route


def declined(module, args) -> str:
    """The reason for declining; asserts that the node and the results are unchanged."""
    program = exported(module, args)
    new, report = replace_sdpa(program)
    assert len(calls(new, "scaled_dot_product_attention")) == 1
    assert not calls(new, "flashpte")
    (entry,) = report.declined
    assert entry.op is None
    if "dropout" not in entry.reason:
        torch.testing.assert_close(new.module()(*args), program.module()(*args))
    return entry.reason


class Transposed(torch.nn.Module):
    """Keys with a non-contiguous head dim."""

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k.transpose(2, 3), v)


def test_dropout():
    assert "dropout_p is 0.5" in declined(Attention(dropout_p=0.5), qkv(4))


def test_layout():
    q, k, v = qkv(4)
    assert "key has stride 64 in the head dim" in declined(Transposed(), (q, k.transpose(2, 3).contiguous(), v))


def test_dtype():
    assert "torch.float64" in declined(Attention(), tuple(t.double() for t in qkv(4)))


def test_double_mask_on_float_tensors_is_not_silently_rounded():
    reason = declined(Attention(), (*(t.double() for t in qkv(4)), torch.randn(4, 64).double()))
    assert "float64" in reason


@pytest.mark.parametrize("dim", [577, 1024])
def test_head_dim(dim):
    assert f"head dim {dim} is above 576" in declined(Attention(), qkv(4, 8, dim=dim))


def test_value_head_dim():
    q, k, v = qkv(4, 8, dim=520)
    assert "value head dim 520 is above 512" in declined(Attention(), (q, k, v))


def test_run_time_scale():
    program = exported(Attention(scale=0.5), qkv(4))
    (node,) = calls(program, "scaled_dot_product_attention")
    node.kwargs = {**node.kwargs, "scale": node.args[0]}
    assert "computed at run time" in route(SdpaCall.from_node(node)).reason


def test_autocast():
    class Autocast(torch.nn.Module):
        def forward(self, q, k, v):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return F.scaled_dot_product_attention(q, k, v)

    program = exported(Autocast(), qkv(4))
    new, report = replace_sdpa(program)
    assert "autocast" in report.declined[0].reason
    assert new.module()(*qkv(4)).dtype == program.module()(*qkv(4)).dtype == torch.bfloat16


def test_a_program_without_attention_is_returned_as_it_was():
    program = exported(torch.nn.Linear(4, 4), (torch.randn(1, 4),))
    new, report = replace_sdpa(program)
    assert report.nodes == ()
    assert str(new.graph) == str(program.graph)


def test_one_declined_node_does_not_stop_the_others():
    class Both(torch.nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)

    new, report = replace_sdpa(exported(Both(), qkv(4)))
    assert [n.replaced for n in report.nodes] == [True, False]
    assert len(calls(new, "sdpa_verify")) == 1
