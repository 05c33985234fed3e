"""Attention by other operators: PyTorch's own kernels, ExecuTorch's Triton operators, and those that are only named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import assert_same_attention, calls, exported, qkv

from flashpte.passes import replace_sdpa

aten = torch.ops.aten


class Operator(torch.nn.Module):
    """``forward(q, k, v, *more)`` calls one operator and may return only its first result."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, q, k, v, *more):
        out = self.call(q, k, v, *more)
        return out[0] if isinstance(out, tuple) else out


def rewrite(call, args):
    new, report = replace_sdpa(exported(Operator(call), args))
    (entry,) = report.nodes
    assert entry.replaced, entry.reason
    assert len(calls(new, "flashpte.sdpa_")) == 1
    assert not calls(new, "_scaled_dot_product")
    assert not calls(new, "triton.")
    return new, entry


def test_pytorch_kernels():
    mask = torch.randn(2, 1, 20, 64)
    flash_for_cpu = aten._scaled_dot_product_flash_attention_for_cpu
    for call, more, options in (
        (flash_for_cpu, (), {}),
        (lambda q, k, v: flash_for_cpu(q, k, v, 0.0, True), (), {"is_causal": True}),
        (lambda q, k, v, m: flash_for_cpu(q, k, v, attn_mask=m, scale=0.3), (mask,), {"attn_mask": mask, "scale": 0.3}),
        (lambda q, k, v, m: aten._scaled_dot_product_attention_math(q, k, v, m), (mask,), {"attn_mask": mask}),
    ):
        args = qkv(20, 64, batch=2)
        new, _ = rewrite(call, (*args, *more))
        expected = F.scaled_dot_product_attention(*args, **options)
        assert_same_attention(new.module()(*args, *more), expected)


def test_pytorch_kernels_of_a_gpu():
    """Operators in a trace for a GPU: the programs cannot run here, but their replacements can."""
    bias = torch.randn(2, 4, 64, 64)
    args = qkv(64, 64, batch=2)
    for call, options in (
        (lambda q, k, v, m: aten._scaled_dot_product_efficient_attention(q, k, v, m, False, scale=0.3)[0],
         {"attn_mask": bias, "scale": 0.3}),
        (lambda q, k, v, m: aten._scaled_dot_product_cudnn_attention(q, k, v, m, False)[0], {"attn_mask": bias}),
        (lambda q, k, v, m: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0], {"is_causal": True}),
    ):  # fmt: skip
        new, _ = rewrite(call, (*args, bias))
        expected = F.scaled_dot_product_attention(*args, **options)
        assert_same_attention(new.module()(*args, bias), expected)


def test_more_than_the_result_is_used():
    class Both(torch.nn.Module):
        def forward(self, q, k, v):
            out, log_sum_exp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
            return out + log_sum_exp.mean()

    _, report = replace_sdpa(exported(Both(), qkv(20)))
    assert "more than one result" in report.declined[0].reason


@pytest.fixture(scope="module")
def triton_sdpa():
    pytest.importorskip("executorch.backends.cuda.triton.kernels.sdpa")
    return torch.ops.triton


def bfloat16(*tensors):
    return tuple(t.bfloat16() for t in tensors)


@pytest.mark.parametrize(
    ("rows", "name", "options"),
    [
        (20, "sdpa", {}),
        (20, "sdpa", {"enable_gqa": True, "scale": 0.3}),
        (64, "sdpa", {"is_causal": True}),
        (1, "sdpa_decode_splitk", {}),
        (3, "sdpa_small_query_splitk", {}),
    ],
)
def test_executorch_operators(triton_sdpa, rows, name, options):
    heads_kv = 2 if options.get("enable_gqa") else 6
    args = bfloat16(*qkv(rows, 64, heads=6, heads_kv=heads_kv))
    new, _ = rewrite(lambda q, k, v: getattr(triton_sdpa, name)(q, k, v, **options), args)
    expected = F.scaled_dot_product_attention(*args, **options)
    torch.testing.assert_close(new.module()(*args), expected, atol=2e-2, rtol=2e-2)


def test_one_row_of_executorch_decode_sees_all_keys(triton_sdpa):
    """ExecuTorch's decode takes ``is_causal`` but ignores it, because the row is the last of the context."""
    args = bfloat16(*qkv(1, 64))
    new, _ = rewrite(lambda q, k, v: triton_sdpa.sdpa_decode_splitk(q, k, v, is_causal=True), args)
    expected = F.scaled_dot_product_attention(*args)
    torch.testing.assert_close(new.module()(*args), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_length_of_the_context(triton_sdpa, masked, dtype):
    def call(q, k, v, length, positions):
        mask = (torch.arange(64)[None] <= positions[:, None])[None, None] if masked else None
        for _ in range(2):
            q = triton_sdpa.sdpa(q, k, v, mask, kv_len=length)
        return q

    args = bfloat16(*qkv(20, 64))
    positions, length = torch.arange(20) + 7, torch.tensor(27, dtype=dtype)
    new, report = replace_sdpa(exported(Operator(call), (*args, length, positions)))
    assert [entry.mask_form for entry in report.nodes] == ["positions"] * 2
    assert [entry.map_users for entry in report.nodes] == [2] * 2
    visible = torch.arange(64)[None] < length
    visible = visible & (torch.arange(64)[None] <= positions[:, None]) if masked else visible
    expected = args[0]
    for _ in range(2):
        expected = F.scaled_dot_product_attention(expected, *args[1:], visible.expand(20, -1)[None, None])
    torch.testing.assert_close(new.module()(*args, length, positions), expected, atol=2e-2, rtol=2e-2)


def test_causal_of_other_lengths_is_left_alone(triton_sdpa):
    """ExecuTorch's operator raises an error for it."""
    call = Operator(lambda q, k, v: triton_sdpa.sdpa(q, k, v, is_causal=True))
    _, report = replace_sdpa(exported(call, bfloat16(*qkv(20, 64))))
    assert "causal for 20 rows and 64 keys" in report.declined[0].reason


def test_operators_that_are_more_than_attention_are_named():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

        def forward(self, x):
            weights = (self.qkv.weight, self.qkv.bias, self.out.weight, self.out.bias)
            return aten._native_multi_head_attention(x, x, x, 16, 2, *weights, None, False)[0]

    try:
        program = exported(Layer(), (torch.randn(2, 5, 16),))
    except Exception:
        pytest.skip("this torch exports no such call")
    _, report = replace_sdpa(program)
    assert [entry.op for entry in report.nodes] == [None]
