"""Programs with ``torch.vmap``: masks that it makes are proven, and its levels stay open around its nodes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from programs import assert_same_attention, calls, check_maps, exported, fresh_module, qkv
from torch.export import Dim

from flashpte.passes import replace_sdpa, rewrite_graph
from flashpte.passes.attention.rewrite import AttentionRewrite

KEYS = 200


def by_pairs(visible, rows, keys):
    """``visible(row, key)`` for every pair, as Hugging Face and flex attention make masks."""
    return torch.vmap(torch.vmap(visible, (None, 0)), (0, None))(rows, keys)


class Causal(torch.nn.Module):
    form = "positions"

    def forward(self, q, k, v, pos):
        mask = by_pairs(lambda row, key: (key <= row) & (key > row - 30), pos, torch.arange(KEYS))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Remainders(torch.nn.Module):
    form = "tensor"

    def forward(self, q, k, v, pos):
        mask = by_pairs(lambda row, key: (key + row) % 3 == 0, pos, torch.arange(KEYS))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def same_results(program, new, args) -> None:
    out, expected = fresh_module(new)(*args), fresh_module(program)(*args)
    assert_same_attention(out, expected)


@pytest.mark.parametrize("module", [Causal, Remainders])
@pytest.mark.parametrize("dynamic", [False, True])
def test_masks_made_by_vmap(module, dynamic):
    rows = Dim("rows", min=17, max=300)
    args = (*qkv(20, KEYS), torch.arange(20) * 7)
    program = exported(module(), args, ({2: rows}, None, None, {0: rows}) if dynamic else None)
    new, report = replace_sdpa(program)
    assert [entry.mask_form for entry in report.nodes] == [module.form]
    assert calls(program, "vmap"), "the caller's program has changed"
    same_results(program, new, args)
    assert check_maps(new, args) == 1


@pytest.mark.parametrize("module", [Causal, Remainders])
def test_levels_stay_open_in_a_graph_that_keeps_its_vmap(module):
    args = (*qkv(20, KEYS), torch.arange(20) * 7)
    program = exported(module(), args)
    new = copy.deepcopy(program.graph_module)
    assert len(rewrite_graph(new, AttentionRewrite()).replaced) == 1
    assert_same_attention(new(*args)[0], program.module()(*args))


def test_attention_inside_of_a_vmap_is_declined():
    class Net(torch.nn.Module):
        def forward(self, many, q, k, v):
            inside = torch.vmap(lambda query: F.scaled_dot_product_attention(query, k, v))(many)
            return inside + F.scaled_dot_product_attention(q, k, v)

    q, k, v = qkv(20, KEYS)
    args = (torch.stack([q, q + 1, q + 2]), q, k, v)
    program = exported(Net(), args)
    new, report = replace_sdpa(program)
    assert [entry.op for entry in report.nodes] == [None, "flashpte::sdpa_prefill"]
    assert "vmap" in report.nodes[0].reason
    same_results(program, new, args)
