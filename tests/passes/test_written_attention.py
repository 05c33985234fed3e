"""Attention written as plain operators is replaced like a call, or named in the report with a reason."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from programs import CachedLayers, assert_same_attention, calls, check_maps, exported, qkv
from torch.export import Dim

from flashpte.passes import replace_sdpa

MIN = torch.finfo(torch.float32).min


class Written(torch.nn.Module):
    """``forward(q, k, v, mask)`` calls a function and returns the result as models do."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, q, k, v, mask=None):
        out = self.attention(q, k, v) if mask is None else self.attention(q, k, v, mask)
        return out.transpose(1, 2).contiguous().reshape(q.shape[0], q.shape[2], -1)


def rewrite(module, args, decompose, shapes=None):
    """Rewrites a program with one attention; asserts that it is replaced and that the results are unchanged."""
    program = exported(module, args, shapes)
    program = program.run_decompositions() if decompose else program
    new, report = replace_sdpa(program)
    (entry,) = report.nodes
    assert entry.replaced, entry.reason
    for gone in ("softmax", "bmm", "matmul"):
        assert not calls(new, gone)
    expected, out = program.module()(*args), new.module()(*args)
    assert out.dtype == expected.dtype
    loose = {torch.float32: (2e-6, 2e-5), torch.bfloat16: (2e-2, 2e-2), torch.float16: (3e-3, 3e-3)}[out.dtype]
    torch.testing.assert_close(out, expected, atol=loose[0], rtol=loose[1])
    return new, entry


def declined(module, args, decompose=False):
    """The reason for declining a program's only attention; asserts that the graph is unchanged."""
    program = exported(module, args)
    program = program.run_decompositions() if decompose else program
    new, report = replace_sdpa(program)
    (entry,) = report.nodes
    assert not entry.replaced
    assert str(new.graph) == str(program.graph)
    return entry.reason


def hugging_face(q, k, v, mask=None, dtype=torch.float32):
    groups = q.shape[1] // k.shape[1]
    k, v = (
        t[:, :, None].expand(-1, -1, groups, -1, -1).reshape(t.shape[0], -1, *t.shape[2:]) if groups > 1 else t
        for t in (k, v)
    )
    weights = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    if mask is not None:
        weights = weights + mask[:, :, :, : k.shape[-2]]
    weights = F.softmax(weights, dim=-1, dtype=dtype).to(q.dtype)
    weights = F.dropout(weights, p=0.1, training=False)
    return torch.matmul(weights, v)


def gpt2(q, k, v, mask=None):
    weights = torch.matmul(q, k.transpose(-1, -2)) / torch.full([], q.shape[-1] ** 0.5, dtype=q.dtype)
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()[None, None]
    weights = torch.where(causal, weights, torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype))
    if mask is not None:
        weights = weights + mask
    return torch.matmul(F.softmax(weights, -1).type(v.dtype), v)


def bloom(q, k, v, mask=None):
    batch, heads, rows, dim = q.shape
    slopes = -torch.arange(1, heads + 1).repeat(batch)[:, None, None] * torch.arange(k.shape[2]) / 7.0
    q3, k3, v3 = (t.reshape(batch * heads, -1, dim) for t in (q, k, v))
    scores = slopes.baddbmm(q3, k3.transpose(-1, -2), beta=1.0, alpha=dim**-0.5).view(batch, heads, rows, -1)
    weights = F.softmax(scores if mask is None else scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights.view(batch * heads, rows, -1), v3).view(batch, heads, rows, dim)


def mpt(q, k, v, mask):
    scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores + (torch.arange(k.shape[2]) / 9.0)[None, None]
    scores = scores.masked_fill(mask, torch.finfo(q.dtype).min)
    return torch.matmul(F.softmax(scores.float(), dim=-1).to(v.dtype), v)


def llama(q, k, v, mask=None):
    """Meta's Llama: a softmax in float32 and a mask of -inf."""
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1])
    scores = scores if mask is None else scores + mask
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)


def scaled_queries(q, k, v):
    return torch.matmul(torch.softmax((q * 0.2) @ (k * 1.5).transpose(-2, -1), -1), v)


def falcon(q, k, v, mask):
    """Scales and masks the scores in place, as some models do."""
    scores = q @ k.transpose(-1, -2)
    scores /= math.sqrt(q.shape[-1])
    scores.masked_fill_(mask, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def keys_hidden(q, k, v, mask):
    scores = (q @ k.transpose(-2, -1)).masked_fill(mask == 0, float("-inf")) if q.shape[2] else q
    return torch.softmax(scores, -1) @ v


def padding(kind="bool", rows=1):
    hidden = torch.arange(64) >= torch.tensor([40, 64])[:, None, None, None]
    hidden = hidden.expand(-1, 1, rows, -1).clone()
    if kind == "bool":
        return hidden
    return torch.zeros(hidden.shape).masked_fill(hidden, MIN if kind == "min" else float("-inf"))


CASES = {
    "hugging face": (hugging_face, None),
    "hugging face, min": (hugging_face, "min"),
    "hugging face, inf": (hugging_face, "inf"),
    "gpt2": (gpt2, None),
    "gpt2, padded": (gpt2, "min"),
    "bloom": (bloom, None),
    "bloom, padded": (bloom, "min"),
    "mpt": (mpt, "bool"),
    "llama": (llama, "inf"),
    "falcon": (falcon, "bool"),
    "scaled queries": (scaled_queries, None),
    "keys hidden": (keys_hidden, "bool"),
}


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_attention_as_models_write_it(name, decompose):
    attention, mask = CASES[name]
    masks = () if mask is None else ((~padding() if name == "keys hidden" else padding(mask)),)
    new, entry = rewrite(Written(attention), (*qkv(5, batch=2), *masks), decompose)
    assert entry.op == "flashpte::sdpa_verify"
    (node,) = calls(new, "flashpte.sdpa_")
    query, key, value = node.args[:3]
    if query.op == "call_function" and "where" in str(
        query.target
    ):  # a row that sees only a finite minimum averages all values
        query = query.args[1]
    assert [n.name for n in (query, key, value)] == ["q", "k", "v"]


def test_scales():
    for attention, scale in ((hugging_face, 0.25), (scaled_queries, 0.3), (llama, 0.25), (bloom, 0.25)):
        new, _ = rewrite(Written(attention), qkv(5), True)
        assert calls(new, "sdpa_verify")[0].args[7] == pytest.approx(scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decompose", [False, True])
def test_16_bits(dtype, decompose):
    args = tuple(t.to(dtype) for t in qkv(20, heads=6, heads_kv=2))
    for attention in (hugging_face, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)):
        new, entry = rewrite(Written(attention), args, decompose)
        assert entry.dtype == str(dtype).removeprefix("torch.")
        assert entry.key == (1, 2, 64, 16)
        (node,) = calls(new, "flashpte.sdpa_")
        assert [n.name for n in node.args[:3]] == ["q", "k", "v"]


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"enable_gqa": True}, {"scale": 0.3}], ids=str)
def test_default_decompositions(rows, options):
    args = qkv(rows, 64, heads=6, heads_kv=2 if options.get("enable_gqa") else 6, batch=2)
    new, _entry = rewrite(Written(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)), args, True)
    (node,) = calls(new, "flashpte.sdpa_")
    assert [n.name for n in node.args[:3]] == ["q", "k", "v"]
    # The decomposition copies its result to this memory layout; the other copy is the module's own.
    assert len(calls(new, "clone")) <= 1


@pytest.mark.parametrize("kind", ["bool", "min", "inf"])
def test_default_decompositions_with_a_mask(kind):
    mask = ~padding(rows=5) if kind == "bool" else padding(kind, rows=5)
    args = (*qkv(5, batch=2), mask)
    new, entry = rewrite(Written(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m)), args, True)
    assert entry.mask_form == "tensor"
    assert check_maps(new, args) == 1


@pytest.mark.parametrize("decompose", [False, True])
def test_rows_that_see_nothing(decompose):
    """With a safe softmax the results are 0; with a row of minima they are the mean of the values."""
    mask = torch.ones(2, 1, 5, 64, dtype=torch.bool)
    mask[0, 0, 2] = False
    args = (*qkv(5, batch=2), mask)
    rewrite(Written(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m)), args, True)
    for number in (MIN, -1e9, -65504.0):

        def chosen(q, k, v, m, number=number):
            return torch.softmax(torch.where(m, q @ k.transpose(-1, -2), number), -1) @ v

        rewrite(Written(chosen), args, decompose)
    for kind in ("gpt2", "mpt"):
        given = (~mask) if kind == "mpt" else torch.where(mask, 0.0, MIN)
        rewrite(Written(CASES[kind][0]), (*qkv(5, batch=2), given), decompose)


def test_a_causal_mask_is_proven():
    _new, entry = rewrite(
        Written(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)), qkv(20, 20), True
    )
    assert (entry.mask, entry.mask_form) == ("causal", "positions")


def test_layers_over_caches():
    args = (torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1)), torch.arange(5))
    program = exported(CachedLayers(), args).run_decompositions()
    new, report = replace_sdpa(program)
    assert [entry.op for entry in report.nodes] == ["flashpte::sdpa_verify"] * 3
    assert {entry.key for entry in report.nodes} == {(1, 2, 64, 16)}
    assert {entry.bytes_copied for entry in report.nodes} == {0}
    assert not calls(new, "softmax")
    # Each layer's rounding passes through the layers after it.
    torch.testing.assert_close(new.module()(*args), program.module()(*args), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decompose", [False, True])
def test_dynamic_sizes(decompose):
    batch, rows, keys = Dim("batch", min=2, max=9), Dim("rows", min=2, max=99), Dim("keys", min=2, max=500)
    shapes = {"q": {0: batch, 2: rows}, "k": {0: batch, 2: keys}, "v": {0: batch, 2: keys}}
    module = Written(llama)
    new, entry = rewrite(module, qkv(30, 77, batch=3), decompose, shapes)
    assert entry.op == "flashpte::sdpa_dispatch"
    for sizes in ((2, 3), (99, 500)):
        args = qkv(*sizes, batch=4)
        assert_same_attention(new.module()(*args), module(*args))


def test_three_dimensions():
    class Flat(torch.nn.Module):
        def forward(self, q, k, v):
            return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)

    rewrite(Flat(), tuple(t[0] for t in qkv(5)), False)


def dropout(q, k, v):
    return torch.dropout(torch.softmax(q @ k.transpose(2, 3), -1), 0.5, True) @ v


def returned(q, k, v):
    weights = torch.softmax(q @ k.transpose(2, 3), -1)
    return weights @ v + weights.mean()


def masked_then_scaled(q, k, v):
    return torch.softmax((q @ k.transpose(2, 3) + torch.arange(64) / 64.0) * 0.5, -1) @ v


def hidden_by_a_small_number(q, k, v):
    return torch.softmax((q @ k.transpose(2, 3)).masked_fill(torch.arange(64) > 50, -5.0), -1) @ v


def hidden_twice(q, k, v):
    scores = (q @ k.transpose(2, 3)).masked_fill(torch.arange(64) > 50, -65504.0) + torch.arange(64) / 64.0
    return torch.softmax(scores, -1) @ v


def over_rows(q, k, v):
    return torch.softmax(q @ k.transpose(2, 3), -2) @ v


def values_first(q, k, v):
    weights = torch.softmax(q @ k.transpose(2, 3), -1)
    return (v.transpose(2, 3) @ weights.transpose(2, 3)).transpose(2, 3)


def normalised_again(q, k, v):
    weights = torch.softmax(q @ k.transpose(2, 3), -1)
    return torch.nan_to_num(weights) @ v


def mask_in_place(q, k, v):
    """The scores are added to the mask in place and read again, so the operator cannot do without them."""
    mask = torch.arange(64) / 64.0 + q[..., :1] * 0
    mask.add_(q @ k.transpose(2, 3))
    return torch.softmax(mask, -1) @ v + mask.mean()


def einsum(q, k, v):
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k), -1), v)


def scaled_by_a_tensor(q, k, v):
    return torch.softmax((q @ k.transpose(2, 3)) * q.amax(), -1) @ v


NAMED = {
    dropout: "dropout",
    returned: "used elsewhere",
    masked_then_scaled: "scaled after the mask",
    hidden_by_a_small_number: "the score -5.0",
    hidden_twice: "several masks",
    over_rows: "not over the last dimension",
    values_first: "to the left of the weights",
    normalised_again: "nan_to_num is applied to its weights",
    mask_in_place: "",
    einsum: "einsum",
    scaled_by_a_tensor: "scaled by a tensor",
}


@pytest.mark.parametrize("attention", NAMED, ids=lambda f: f.__name__)
def test_what_is_not_served_is_named(attention):
    assert NAMED[attention] in declined(Written(attention), qkv(5))


def test_weights_of_a_module_are_named():
    class Weights(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=True)

    assert "used elsewhere" in declined(Weights(), (torch.randn(2, 5, 16),))


def test_a_softmax_that_is_no_attention_is_not_in_the_report():
    class Router(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = torch.nn.Linear(16, 4), torch.nn.Parameter(torch.randn(4, 16, 16))

        def forward(self, x):
            weights = torch.softmax(self.gate(x), -1)
            out = torch.einsum("btd,edf->btef", x, self.experts)
            return torch.softmax((weights[..., None] * out).sum(2), -1)

    for decompose in (False, True):
        program = exported(Router(), (torch.randn(2, 5, 16),))
        program = program.run_decompositions() if decompose else program
        _, report = replace_sdpa(program)
        assert report.nodes == ()


def test_a_cache_that_is_written_after_it_is_read():
    class Late(torch.nn.Module):
        def forward(self, q, k, v):
            weights = torch.softmax(q @ k.transpose(2, 3), -1)
            k.zero_()
            return weights @ v

    args = qkv(5)
    program = exported(Late(), args)
    new, report = replace_sdpa(program)
    assert "written to" in report.nodes[0].reason
    copies = [tuple(t.clone() for t in args) for _ in range(2)]
    torch.testing.assert_close(new.module()(*copies[0]), program.module()(*copies[1]))


def test_flex_attention_is_named():
    from torch.nn.attention.flex_attention import flex_attention

    class Flex(torch.nn.Module):
        def forward(self, q, k, v):
            return flex_attention(q, k, v)

    reason = declined(Flex(), qkv(16, 128))
    assert "flex_attention is a higher-order operator" in reason
