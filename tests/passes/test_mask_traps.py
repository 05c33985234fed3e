"""Masks that a careless proof gets wrong: in any form that the pass chooses, the results are the program's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import EdgeCompileConfig, to_edge
from programs import assert_same_attention, calls, exported, fresh_module, qkv

from flashpte.passes import ReplaceSdpaPass, replace_sdpa

K = 200
NEG_INF = float("-inf")
LEAST, MOST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
arange, full, where = torch.arange, torch.full, torch.where


def ones_with_a_hole():
    mask = torch.ones(5, K, dtype=torch.bool)
    mask[:, 3] = False
    return mask


def padded_by_hand(p, e):
    mask = torch.zeros(5, K)
    mask[:, :4] = NEG_INF
    return mask + where(arange(K) <= p[:, None], 0.0, NEG_INF)


def rows_written_by_hand(p, e):
    rows = torch.zeros(5, dtype=torch.int64)
    rows[1:3] = p[1:3]
    return arange(K) <= rows[:, None]


def bias_written_by_hand(p, e):
    bias = torch.zeros(5, K)
    bias[:, 2] = 1.5
    return where(arange(K) <= p[:, None], bias, NEG_INF)


def factor_written_by_hand(p, e):
    two = full((1,), 2)
    two.view(1)[0] = 1
    return arange(K) * two <= p[:, None]


def index_written_after(p, e):
    index = p % 5
    mask = (arange(K) <= 40 * arange(5)[:, None])[index]
    index[0:3].fill_(4)
    return mask


def selected_then_written(p, e):
    index = p % 5
    mask = (arange(K) <= 40 * arange(5)[:, None]).index_select(0, index)
    index.fill_(4)
    return mask


def written_through_unbind(p, e):
    rows = p * 1
    mask = arange(K) <= rows[:, None]
    rows.unbind(0)[1].add_(40)
    return mask


def saturating_below(p, e):
    return arange(K) > where(p > 52, MOST, p)[:, None]


def saturating_above(p, e):
    return arange(K) < where(p > 52, LEAST, p)[:, None]


def beyond_64_bits(p, e):
    return (arange(K) <= p[:, None]) & (arange(K) < LEAST)


def doubled(p, e):
    for _ in range(24):
        e = e + e
    return e <= p[:, None] * 2**24


def nested(p, e):
    mask = arange(K) <= p[:, None]
    for i in range(18):
        mask = mask & (mask & (arange(K) > p[:, None] - i - 20))
    return mask


TRAPS = {
    "padding written by hand": padded_by_hand,
    "a hole written by hand": lambda p, e: ones_with_a_hole() & (arange(K) <= p[:, None]),
    "a hole under tril": lambda p, e: ones_with_a_hole().tril(30),
    "a hole under masked_fill": lambda p, e: (arange(K) <= p[:, None]).masked_fill(~ones_with_a_hole(), False),
    "rows written by hand": rows_written_by_hand,
    "bias written by hand": bias_written_by_hand,
    "factor written by hand": factor_written_by_hand,
    "index written after": index_written_after,
    "selection written after": selected_then_written,
    "written through unbind": written_through_unbind,
    "int8 arange": lambda p, e: arange(K % 128, dtype=torch.int8).repeat(3)[:K] <= p[:, None],
    "wrapping arange": lambda p, e: arange(100, 100 + K).to(torch.uint8) <= p[:, None],
    "compared as int32": lambda p, e: (e.to(torch.int32) <= p[0] + 2**32) & (arange(K) <= p[:, None]),
    "compared as uint8": lambda p, e: (e.to(torch.uint8) >= -1) & (arange(K) <= p[:, None]),
    "compared as int8": lambda p, e: (e.to(torch.int8) <= 300) & (arange(K) <= p[:, None]),
    "constant as uint8": lambda p, e: (arange(K) <= full((1,), 300).to(torch.uint8)) & (e <= p[:, None] + 90),
    "constant as bool": lambda p, e: (arange(K) <= full((1,), 7).bool().long()) | (e <= p[:, None] + 90),
    "constant truncated": lambda p, e: torch.logical_and(e <= p[:, None] + 90, full((1, 1), 0.5).to(torch.int64)),
    "constant in bfloat16": lambda p, e: (e + 200 <= full((1,), 256, dtype=torch.bfloat16)) & (e <= p[:, None] + 90),
    "largest integer": saturating_below,
    "smallest integer": saturating_above,
    "beyond 64 bits": beyond_64_bits,
    "doubled": doubled,
    "nested": nested,
}


class Masked(torch.nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, q, k, v, p, e):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.make(p, e))


def example():
    return (*qkv(5, K), arange(5) + 50, torch.randperm(K, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.parametrize("decompose", [False, True])
def test_results_are_those_of_the_program(name, decompose):
    program, args = exported(Masked(TRAPS[name]), example()), example()
    if decompose:
        program = program.run_decompositions({})
    new, report = replace_sdpa(program)
    assert len(report.replaced) == 1
    out, expected = fresh_module(new)(*args), fresh_module(program)(*args)
    assert_same_attention(out, expected)


def test_a_chain_too_long_to_follow_is_mapped():
    def chain(p, e):
        mask = arange(K) <= p[:, None]
        for i in range(500):
            mask = mask & (e != i)
        return mask

    args = example()
    program = exported(Masked(chain), args)
    new, report = replace_sdpa(program)
    assert report.nodes[0].mask_form == "tensor"
    assert_same_attention(new.module()(*args), program.module()(*args))


def test_a_mask_without_rows_serves_attentions_of_any_length():
    class Net(torch.nn.Module):
        def forward(self, q, long_q, k, v, n):
            mask = (arange(K) < n)[None]
            attend = F.scaled_dot_product_attention
            return attend(q, k, v, attn_mask=mask), attend(long_q, k, v, attn_mask=mask)

    q, k, v = qkv(5, K)
    args = (q, qkv(40, K)[0], k, v, torch.tensor(77))
    program = exported(Net(), args)
    new, report = replace_sdpa(program)
    assert {n.mask_form for n in report.nodes} == {"positions"}
    assert_same_attention(new.module()(*args), program.module()(*args))


def test_a_mask_written_through_a_list_of_views_is_another_mask():
    class Net(torch.nn.Module):
        def forward(self, q, k, v, mask):
            mask = mask.clone()
            first = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            for row in mask.unbind(0):
                row[:70].fill_(False)
            return first + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    args = (*qkv(5, K), torch.rand(5, K) < 0.7)
    new, _ = replace_sdpa(exported(Net(), args))
    assert len(calls(new, "tile_map")) == 2
    assert_same_attention(new.module()(*args), Net()(*args))


def test_modules_whose_signatures_are_preserved():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, mask):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer(), Layer()])

        def forward(self, q, k, v, p):
            mask = arange(K) <= p[:, None]
            return self.layers[1](self.layers[0](q, k, v, mask), k, v, mask)

    args = (*qkv(5, K), arange(5) + 50)
    program = torch.export.export(Net(), args, preserve_module_call_signature=("layers.0", "layers.1"))
    new, report = replace_sdpa(program)
    assert {n.mask_form for n in report.nodes} == {"positions"}
    new.validate()
    assert_same_attention(new.module()(*args), Net()(*args))


def test_a_triangle_is_made_where_the_mask_is():
    class Net(torch.nn.Module):
        def forward(self, q, k, v):
            mask = torch.ones(5, K, dtype=torch.bool, device=q.device).tril(30)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    program = exported(Net(), tuple(t.to("meta") for t in qkv(5, K)))
    new, report = replace_sdpa(program)
    assert report.nodes[0].mask_form == "positions"
    assert {n.meta["val"].device.type for n in calls(new, "arange")} == {"meta"}


@pytest.mark.parametrize(
    "make",
    [
        lambda p, e: (arange(K) <= p[:, None]) & (arange(K) > p[:, None] - 30),
        lambda p, e: arange(K) * 3 + 2 < p[:, None] + 1,
        lambda p, e: torch.ones(400, K, dtype=torch.bool).tril(3)[p],
    ],
)
def test_bounds_with_numbers_in_the_edge_dialect(make):
    args = example()
    program = exported(Masked(make), args)
    config = EdgeCompileConfig(_skip_dim_order=True, preserve_ops=[torch.ops.aten.scaled_dot_product_attention.default])
    edge = to_edge(program, compile_config=config).transform([ReplaceSdpaPass()])
    out = edge.exported_program().module()(*args)
    assert_same_attention(out, program.module()(*args))
