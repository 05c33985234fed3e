"""The report gives the bytes that a program copies before a kernel, whoever wrote the copy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import assert_same_attention, cached_program, exported, qkv
from torch.export import Dim

from flashpte.passes import format_table, replace_sdpa

ENTRIES = 2 * 64 * 16  # entries of keys with two heads
ITEM = 4


class Prepared(torch.nn.Module):
    def __init__(self, prepare, **options):
        super().__init__()
        self.prepare, self.options = prepare, options

    def forward(self, q, k, v):
        key, value = self.prepare(k), self.prepare(v)
        return F.scaled_dot_product_attention(q, key, value, **self.options)


def copied(module, args, decompose, shapes=None):
    program = exported(module, args, shapes)
    program = program.run_decompositions({}) if decompose else program
    new, report = replace_sdpa(program)
    assert_same_attention(new.module()(*args), program.module()(*args))
    assert [entry.replaced for entry in report.nodes] == [True]
    return report.nodes[0].bytes_copied


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize(
    ("prepare", "entries"),
    [
        (lambda t: t, 0),
        (lambda t: t.transpose(1, 2).transpose(1, 2)[:, :, :], 0),
        (lambda t: t[:, :, :32], 0),
        (lambda t: t.repeat_interleave(3, 1), 0),  # undone
        (lambda t: t.repeat(1, 3, 1, 1), 3 * ENTRIES),  # heads in another order
        (lambda t: (t * 2).repeat(1, 3, 1, 1), 3 * ENTRIES),
        (lambda t: t.flip(2).repeat(1, 3, 1, 1), 3 * ENTRIES),
        (lambda t: t.clone(), ENTRIES),
        (lambda t: (t * 2).clone(), 0),  # a copy of a value that was just computed
        (lambda t: torch.cat([t, t[:, :, :1] * 2], 2), ENTRIES + ENTRIES // 64),
        (lambda t: torch.cat([t * 2, t[:, :, :1] * 2], 2), 0),
        (lambda t: t.transpose(2, 3).contiguous().transpose(2, 3).contiguous(), 2 * ENTRIES),
        (lambda t: t.transpose(1, 2).reshape(1, 64, 32).view(1, 64, 2, 16).transpose(1, 2), ENTRIES),
    ],
)
def test_copies_of_keys_and_values(prepare, entries, decompose):
    q, k, v = qkv(5, heads=6, heads_kv=2)
    options = {"enable_gqa": True}
    assert copied(Prepared(prepare, **options), (q, k, v), decompose) == 2 * entries * ITEM


def test_copies_that_the_pass_inserts_are_named():
    module = Prepared(lambda t: t.transpose(2, 3))
    q, k, v = qkv(40, heads=2, heads_kv=2)
    args = (q, k.transpose(2, 3).contiguous(), v.transpose(2, 3).contiguous())
    assert copied(module, args, False) == 2 * ENTRIES * ITEM


def test_a_dynamic_length_counts_at_its_largest():
    keys = Dim("keys", min=2, max=500)
    shapes = {"q": None, "k": {2: keys}, "v": {2: keys}}
    module = Prepared(lambda t: t.repeat(1, 3, 1, 1))
    assert copied(module, qkv(5, heads=6, heads_kv=2), False, shapes) == 2 * 500 * 6 * 16 * ITEM


def test_a_copy_that_two_nodes_use_counts_once():
    class Twice(torch.nn.Module):
        def forward(self, q, k, v):
            key = k.clone()
            q = F.scaled_dot_product_attention(q, key, v)
            return F.scaled_dot_product_attention(q, key, v)

    _, report = replace_sdpa(exported(Twice(), qkv(5, heads=2, heads_kv=2)))
    assert [entry.bytes_copied for entry in report.nodes] == [ENTRIES * ITEM, 0]
    table = format_table({"decode": report})
    assert "copies" in table
    assert "8.19 kB" in table
    assert report.to_dict()["nodes"][0]["bytes_copied"] == ENTRIES * ITEM


def test_caches_that_are_written_in_place_are_not_copied():
    program, _ = cached_program(5)
    for given in (program, program.run_decompositions({})):
        _, report = replace_sdpa(given)
        assert {entry.bytes_copied for entry in report.nodes} == {0}
