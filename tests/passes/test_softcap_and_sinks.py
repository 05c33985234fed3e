"""Softcapped scores and learned sinks, in anybody's eager attention, become operands of the kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from eager_scores import HEADS, MIN, Model, gpt_oss, repeat_kv, scored, window
from programs import assert_same_attention, calls, exported, qkv
from torch.export import Dim

from flashpte.passes import replace_sdpa
from flashpte.passes.attention.table import format_table


def gemma2(q, k, v, mask, sinks):
    scores, v = scored(q, k, v, mask, 1.5)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, 0.1, training=False), v)


def both(q, k, v, mask, sinks):
    scores, v = scored(q * 2.0, k, v, None, 2.0)
    scores = scores if mask is None else scores.masked_fill(mask < 0, float("-inf"))
    column = sinks.view(-1, 1, 1).repeat(q.shape[0], 1, q.shape[2], 1)
    joined = torch.cat((scores, column), 3)
    return torch.softmax(joined - joined.amax(-1, keepdim=True), -1).narrow(-1, 0, k.shape[2]) @ v


def in_front(q, k, v, mask, sinks):
    scores, v = scored(q, k, v, mask)
    joined = torch.cat((sinks[None, :, None, None].expand(*scores.shape[:3], 1), scores), -1)
    return torch.softmax(joined, -1)[..., 1:] @ v


def in_place(q, k, v, mask, sinks):
    scores, v = scored(q, k, v)
    scores /= 3.0
    scores.tanh_()
    scores *= 3.0
    joined = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    joined.sub_(joined.amax(-1, keepdim=True))
    return torch.softmax(joined, -1)[..., :-1] @ v


def softmax_of_one_more(q, k, v, mask, sinks):
    """exp(s) / (1 + sum exp(s)): a sink of 0."""
    scores, v = scored(q, k, v, mask)
    joined = torch.cat([scores, scores.new_zeros(*scores.shape[:3], 1)], -1)
    return torch.softmax(joined, -1)[..., :-1] @ v


def shifted_only(q, k, v, mask, sinks):
    scores, v = scored(q, k, v, mask)
    return torch.softmax(scores - scores.max(-1, keepdim=True).values, -1) @ v


def negative_cap(q, k, v, mask, sinks):
    scores, v = scored(q, k, v, scale=-0.25)
    return torch.softmax(torch.tanh(scores / 1.5) * -1.5, -1) @ v


# attention -> scale, softcap, whether there are sinks
FORMS = {
    gemma2: (0.25, 1.5, False),
    gpt_oss: (0.25, 0.0, True),
    both: (0.5, 2.0, True),
    in_front: (0.25, 0.0, True),
    in_place: (0.25, 3.0, True),
    softmax_of_one_more: (0.25, 0.0, True),
    shifted_only: (0.25, 0.0, False),
    negative_cap: (0.25, 1.5, False),
}


def rewrite(module, args, decompose=False, shapes=None):
    """Rewrites a program with one attention; asserts that it is replaced and that the results are unchanged."""
    program = exported(module, args, shapes)
    program = program.run_decompositions() if decompose else program
    new, report = replace_sdpa(program)
    (entry,) = report.nodes
    assert entry.replaced, entry.reason
    for gone in ("softmax", "bmm", "matmul", "tanh", "amax", "max_dim", "repeat"):
        assert not calls(new, gone)
    expected, out = program.module()(*args), new.module()(*args)
    loose = 2e-2 if out.dtype == torch.bfloat16 else 3e-3 if out.dtype == torch.float16 else 2e-6
    torch.testing.assert_close(out, expected, atol=loose, rtol=10 * loose)
    (node,) = calls(new, "flashpte.sdpa_")
    return node, entry


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("attention", FORMS, ids=lambda f: f.__name__)
def test_forms(attention, rows, decompose):
    args = (*qkv(rows, heads=HEADS, heads_kv=2, batch=2), window(rows))
    args = args[:3] if attention in (in_place, negative_cap) else args
    node, entry = rewrite(Model(attention), args, decompose)
    scale, softcap, sinks = FORMS[attention]
    assert [n.name for n in node.args[:3]] == ["q", "k", "v"]
    assert node.args[7] == pytest.approx(scale)
    assert node.kwargs.get("softcap", 0.0) == pytest.approx(softcap)
    assert ("sinks" in node.kwargs) == sinks
    if sinks and attention is not softmax_of_one_more:
        assert node.kwargs["sinks"].name == "p_sinks"
    assert (entry.softcap, entry.sinks) == (pytest.approx(softcap), sinks)
    assert entry.key == (2, 2, 64, 16)


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype, decompose):
    args = tuple(t.to(dtype) for t in qkv(5, heads=HEADS, heads_kv=2))

    def upcast(q, k, v, mask, sinks):
        scores = (q @ repeat_kv(k, 3).transpose(2, 3)).float() * 0.25
        scores = torch.tanh(scores / 2.0) * 2.0
        column = sinks.float().view(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)
        return torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1].to(v.dtype) @ repeat_kv(v, 3)

    for attention in (gemma2, gpt_oss, upcast):
        node, entry = rewrite(Model(attention).to(dtype), args, decompose)
        assert entry.dtype == str(dtype).removeprefix("torch.")
        if attention is not gemma2:
            # The kernel reads the parameter itself, in its own dtype.
            assert node.kwargs["sinks"].name == "p_sinks"


def test_sinks_from_a_table_of_layers():
    def of_layer(q, k, v, mask, sinks):
        return gpt_oss(q, k, v, mask, sinks[1])

    table = torch.randn(3, HEADS, generator=torch.Generator().manual_seed(5))
    node, _ = rewrite(Model(of_layer, table), qkv(5, heads=HEADS, heads_kv=2))
    assert "select" in node.kwargs["sinks"].name


@pytest.mark.parametrize("spread", [lambda s: s.repeat(3), lambda s: s.repeat_interleave(3)], ids=["repeat", "each"])
def test_heads_that_share_sinks(spread):
    def grouped(q, k, v, mask, sinks):
        return gpt_oss(q, k, v, mask, spread(sinks))

    program = exported(Model(grouped, torch.tensor([-0.4, 0.7])), args := qkv(5, heads=HEADS, heads_kv=2))
    new, report = replace_sdpa(program)
    assert report.nodes[0].sinks
    assert_same_attention(new.module()(*args), program.module()(*args))


def test_one_sink_for_all_heads():
    def shared(q, k, v, mask, sinks):
        return gpt_oss(q, k, v, mask, sinks.expand(HEADS))

    rewrite(Model(shared, torch.tensor([0.7])), qkv(5, heads=HEADS, heads_kv=2))
    rewrite(Model(shared, torch.tensor(0.7)), qkv(20, heads=HEADS, heads_kv=2))


def test_dynamic_sizes():
    rows, keys = Dim("rows", min=2, max=99), Dim("keys", min=2, max=500)
    shapes = {"q": {2: rows}, "k": {2: keys}, "v": {2: keys}}
    for attention in (both, gpt_oss, in_front):
        module = Model(attention)
        args = qkv(30, 77, heads=HEADS, heads_kv=2)
        program = exported(module, args, shapes)
        new, report = replace_sdpa(program)
        assert [entry.op for entry in report.nodes] == ["flashpte::sdpa_dispatch"], report.nodes[0].reason
        for sizes in ((2, 3), (99, 500)):
            args = qkv(*sizes, heads=HEADS, heads_kv=2)
            assert_same_attention(new.module()(*args), module(*args))


class Positions(torch.nn.Module):
    """Two layers over one mask made from positions, one with sinks and one without; row 2 sees no key."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.sinks = torch.nn.Parameter(torch.randn(HEADS, generator=torch.Generator().manual_seed(3)))

    def forward(self, q, k, v, pos):
        shown = torch.arange(k.shape[2]) <= pos[:, None]
        mask = torch.zeros(shown.shape).masked_fill(~shown, MIN)[None, None]

        def attend(name):
            if name == "sinks":
                return gpt_oss(q, k, v, mask, self.sinks)
            scores, values = scored(q, k, v, mask, 2.0)
            return torch.softmax(scores, -1) @ values

        return tuple(attend(name) for name in self.order)


@pytest.mark.parametrize("order", [("sinks", "plain"), ("plain", "sinks", "plain", "sinks")], ids="-".join)
def test_a_row_of_minima_is_0_with_sinks_and_the_mean_of_the_values_without(order):
    """Both layers compare positions, but a row that sees nothing differs, so they do not share their bounds."""
    pos = torch.arange(5) + 10
    pos[2] = -1
    args = (*qkv(5, heads=HEADS, heads_kv=2), pos)
    program = exported(Positions(order), args)
    new, report = replace_sdpa(program)
    assert [entry.mask_form for entry in report.nodes] == ["positions"] * len(order)
    for name, out, expected in zip(order, new.module()(*args), program.module()(*args), strict=True):
        assert_same_attention(out, expected)
        assert (out[:, :, 2] == 0).all() == (name == "sinks")


def test_caches_that_are_written_in_place_before_they_are_read():
    """A program straight from ``torch.export``: the write to the values comes after the first node that is a cache."""

    class Cached(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.sinks = torch.nn.Parameter(torch.randn(HEADS))
            self.register_buffer("k", torch.zeros(1, 2, 64, 16))
            self.register_buffer("v", torch.zeros(1, 2, 64, 16))

        def forward(self, q, k, v, pos):
            keys, values = self.k.index_copy_(2, pos, k), self.v.index_copy_(2, pos, v)
            hidden = torch.arange(64) > pos[:, None]
            mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))[None, None]
            return gpt_oss(q, keys, values, mask, self.sinks)

    args = (*qkv(5, 5, heads=HEADS, heads_kv=2), torch.arange(5) + 7)
    program = exported(Cached(), args)
    new, report = replace_sdpa(program)
    (entry,) = report.nodes
    assert (entry.op, entry.key, entry.mask) == ("flashpte::sdpa_verify", (1, 2, 64, 16), "causal"), entry.reason
    assert_same_attention(new.module()(*args), program.module()(*args))


@pytest.mark.parametrize("written", ["keys", "values", "mask"])
def test_what_is_written_between_the_products(written):
    class Between(torch.nn.Module):
        def forward(self, q, k, v, mask):
            scores = torch.tanh(q @ k.transpose(2, 3)) + mask
            {"keys": k, "values": v, "mask": mask}[written].mul_(0.5)
            return (torch.softmax(scores, -1) @ v) * 2.0

    args = (*qkv(5, heads=HEADS, heads_kv=HEADS), window(5))
    program = exported(Between(), args)
    new, report = replace_sdpa(program)
    # The values are read after they were written, so the kernel may read them there as well.
    assert report.nodes[0].replaced == (written == "values"), report.nodes[0].reason
    copies = [tuple(t.clone() for t in args) for _ in range(2)]
    assert_same_attention(new.module()(*copies[0]), program.module()(*copies[1]))


def test_the_report_names_them():
    _, report = replace_sdpa(exported(Model(both), (*qkv(5, heads=HEADS, heads_kv=2), window(5))))
    assert "bool, mapped, softcap 2, sinks" in format_table({"decode": report})
    (entry,) = report.to_dict()["nodes"]
    assert (entry["softcap"], entry["sinks"]) == (2.0, True)
    _, report = replace_sdpa(exported(Model(shifted_only), qkv(5, heads=HEADS, heads_kv=2)))
    assert "softcap" not in format_table({"decode": report})
