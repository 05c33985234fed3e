"""Softcaps and sinks that are not served: the graph stays as it is, and the report says why."""

from __future__ import annotations

import pytest
import torch
from eager_scores import HEADS, Model, scored
from programs import exported, qkv

from flashpte.passes import replace_sdpa


def cap_after_the_mask(q, k, v, mask, sinks):
    scores, v = scored(q, k, v, torch.arange(64) / 64.0)
    return torch.softmax(torch.tanh(scores / 2.0) * 2.0, -1) @ v


def two_caps(q, k, v, mask, sinks):
    scores, v = scored(q, k, v, None, 2.0)
    return torch.softmax(torch.tanh(scores), -1) @ v


def cap_of_a_tensor(q, k, v, mask, sinks):
    scores, v = scored(q, k, v)
    return torch.softmax(torch.tanh(scores / sinks[0]) * sinks[0], -1) @ v


def cap_of_each_head(q, k, v, mask, sinks):
    scores, v = scored(q, k, v)
    cap = sinks.exp()[:, None, None]
    return torch.softmax(torch.tanh(scores / cap) * cap, -1) @ v


def sinks_of_the_query(q, k, v, mask, sinks):
    scores, v = scored(q, k, v)
    joined = torch.cat([scores, q.mean(-1, keepdim=True)], -1)
    return torch.softmax(joined, -1)[..., :-1] @ v


def sinks_of_the_batch(q, k, v, mask, sinks):
    scores, v = scored(q, k, v)
    column = (sinks[None] * torch.arange(1, 3)[:, None])[:, :, None, None]
    return torch.softmax(torch.cat([scores, column.expand(-1, -1, q.shape[2], -1)], -1), -1)[..., :-1] @ v


def sinks_that_are_masked(q, k, v, mask, sinks):
    scores, v = scored(q, k, v)
    joined = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1) + torch.arange(65) / 65.0
    return torch.softmax(joined, -1)[..., :-1] @ v


def sinks_that_are_capped(q, k, v, mask, sinks):
    scores, v = scored(q, k, v)
    joined = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return torch.softmax(torch.tanh(joined / 2.0) * 2.0, -1)[..., :-1] @ v


def two_columns(q, k, v, mask, sinks):
    scores, v = scored(q, k, v)
    joined = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 2)], -1)
    return torch.softmax(joined, -1)[..., :-2] @ v


def dropped_from_the_wrong_side(q, k, v, mask, sinks):
    scores, v = scored(q, k, v)
    joined = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return torch.softmax(joined, -1)[..., 1:] @ v


def sinks_with_a_value(q, k, v, mask, sinks):
    scores, v = scored(q, k, v)
    joined = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return torch.softmax(joined, -1) @ torch.cat([v, v.mean(2, keepdim=True)], 2)


def weights_of_sinks(q, k, v, mask, sinks):
    scores, v = scored(q, k, v)
    weights = torch.softmax(torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1), -1)
    return weights[..., :-1] @ v + weights[..., -1:]


def dropout_of_sinks(q, k, v, mask, sinks):
    scores, v = scored(q, k, v)
    joined = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return torch.dropout(torch.softmax(joined, -1)[..., :-1], 0.5, True) @ v


def another_maximum(q, k, v, mask, sinks):
    scores, v = scored(q, k, v)
    return torch.softmax(scores - scores.amax(-2, keepdim=True), -1) @ v


def a_maximum_that_is_read(q, k, v, mask, sinks):
    scores, v = scored(q, k, v)
    largest = scores.amax(-1, keepdim=True)
    return torch.softmax(scores - largest, -1) @ v + largest


def a_maximums_place_that_is_read(q, k, v, mask, sinks):
    scores, v = scored(q, k, v)
    largest, place = scores.max(-1, keepdim=True)
    return torch.softmax(scores - largest, -1) @ v + place


def every_second_weight(q, k, v, mask, sinks):
    """65 weights, of which a step keeps as many as there are values."""
    scores, v = scored(q, k[:, :, :2], v[:, :, :2])
    joined = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return torch.softmax(joined, -1)[..., ::2] @ v


NAMED = {
    cap_after_the_mask: "softcap (tanh) is applied to its masked scores",
    two_caps: "several softcaps",
    cap_of_a_tensor: "scaled by a tensor",
    cap_of_each_head: "scaled by a tensor",
    sinks_of_the_query: "the same for every row",
    sinks_of_the_batch: "not one number for each head",
    sinks_that_are_masked: "applied to its sinks as well",
    sinks_that_are_capped: "applied to its sinks as well",
    two_columns: "columns are joined to the scores",
    dropped_from_the_wrong_side: "",
    sinks_with_a_value: "columns are joined to the scores and have values",
    weights_of_sinks: "used elsewhere",
    dropout_of_sinks: "dropout",
    another_maximum: "is applied to the scores",
    a_maximum_that_is_read: "used elsewhere",
    a_maximums_place_that_is_read: "used elsewhere",
    every_second_weight: "",
}


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("attention", NAMED, ids=lambda f: f.__name__)
def test_what_is_not_served_is_named(attention, decompose):
    if attention is dropout_of_sinks and decompose:
        pytest.skip("a decomposed dropout multiplies by random numbers")
    program = exported(Model(attention), qkv(5, heads=HEADS, heads_kv=2, batch=2))
    program = program.run_decompositions() if decompose else program
    new, report = replace_sdpa(program)
    (entry,) = report.nodes
    assert not entry.replaced
    assert NAMED[attention] in entry.reason
    assert str(new.graph) == str(program.graph)


def test_three_dimensions_do_not_tell_heads_from_a_batch():
    class Flat(torch.nn.Module):
        def forward(self, q, k, v, sinks):
            joined = torch.cat([q @ k.transpose(1, 2), sinks[:, None, None].expand(-1, q.shape[1], 1)], -1)
            return torch.bmm(torch.softmax(joined, -1)[..., :-1], v)

    args = (*(t[0] for t in qkv(5, heads=HEADS, heads_kv=HEADS)), torch.randn(HEADS))
    _, report = replace_sdpa(exported(Flat(), args))
    assert "not told from their batch" in report.nodes[0].reason


def test_sinks_that_are_written_after_they_are_joined():
    class Late(torch.nn.Module):
        def forward(self, q, k, v, sinks):
            column = sinks.reshape(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)
            joined = torch.cat([q @ k.transpose(2, 3), column], -1)
            sinks.zero_()
            return torch.softmax(joined, -1)[..., :-1] @ v

    args = (*qkv(5, heads=HEADS, heads_kv=HEADS), torch.randn(HEADS))
    program = exported(Late(), args)
    new, report = replace_sdpa(program)
    assert "written to" in report.nodes[0].reason
    copies = [tuple(t.clone() for t in args) for _ in range(2)]
    torch.testing.assert_close(new.module()(*copies[0]), program.module()(*copies[1]))
