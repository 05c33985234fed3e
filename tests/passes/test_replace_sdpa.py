"""replace_sdpa on exported programs: what it replaces, with which arguments, and that results do not change."""

from __future__ import annotations

import json

import pytest
import torch
from programs import Attention, CachedLayers, assert_same_attention, cached_program, calls, check_maps, exported, qkv
from torch.export import Dim

from flashpte.passes import format_table, replace_sdpa


def rewrite(module, args, dynamic_shapes=None, decompose=False):
    """Exports and rewrites, checks that results are unchanged, and returns (new program, the only report entry)."""
    program = exported(module, args, dynamic_shapes)
    if decompose:
        program = program.run_decompositions({})
    new, report = replace_sdpa(program)
    expected, out = program.module()(*args), new.module()(*args)
    assert_same_attention(out, expected)
    assert len(report.nodes) == 1
    return new, report.nodes[0]


@pytest.mark.parametrize(
    ("q_len", "op"), [(1, "decode"), (2, "verify"), (16, "verify"), (17, "prefill"), (40, "prefill")]
)
@pytest.mark.parametrize("decompose", [False, True])
def test_static_lengths_choose_the_kernel(q_len, op, decompose):
    new, entry = rewrite(Attention(), qkv(q_len), decompose=decompose)
    assert entry.op == f"flashpte::sdpa_{op}"
    (node,) = calls(new, "flashpte")
    assert node.target is getattr(torch.ops.flashpte, f"sdpa_{op}").default
    query, key, value, mask, tiles, counts, is_causal, scale, dim_order, *bounds = node.args
    assert (mask, tiles, counts, is_causal, *bounds) == (None, None, None, False, None, None)
    assert [n.name for n in (query, key, value)] == ["q", "k", "v"]
    assert scale == 16**-0.5
    assert sorted(dim_order) == [0, 1, 2, 3]
    assert not calls(new, "scaled_dot_product_attention")


def test_causal_and_scale_are_passed_on():
    new, entry = rewrite(Attention(is_causal=True, scale=0.3), qkv(40))
    node = calls(new, "sdpa_prefill")[0]
    assert node.args[6:8] == (True, 0.3)
    assert entry.mask == "causal"


def test_negative_scale_and_zero_scale():
    for scale in (-0.5, 0.0, 2):
        new, _ = rewrite(Attention(scale=scale), qkv(4))
        assert calls(new, "sdpa_verify")[0].args[7] == scale


@pytest.mark.parametrize("q_len", [1, 5, 40])
@pytest.mark.parametrize(
    "shape",
    [
        (64,),
        (1, 1),
        (1, 64),
        ("m", 64),
        (1, "m", 64),
        (4, "m", 64),
        (1, 1, "m", 64),
        (2, 1, 1, 64),
        (2, 4, "m", 64),
        (2, 4, "m", 1),
    ],
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_every_broadcast(q_len, shape, kind):
    shape = tuple(q_len if s == "m" else s for s in shape)
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(shape, generator=generator) < 0.6 if kind == "bool" else torch.randn(shape, generator=generator)
    if len(shape) == 1:
        mask = mask.expand(q_len, 64)  # a mask has at least two dimensions
    args = (*qkv(q_len, batch=2), mask)
    new, entry = rewrite(Attention(), args)
    assert entry.mask == kind
    assert check_maps(new, args) == 1
    node = calls(new, "sdpa_")[0]
    assert node.args[3].meta["val"].dim() == 4
    assert len(calls(new, "_map.")) == 1
    assert [n.args[0].target for n in node.args[4:6]] == [torch.ops.flashpte.tile_map.default] * 2


def test_grouped_heads():
    new, entry = rewrite(Attention(enable_gqa=True), qkv(3, heads=6, heads_kv=2))
    assert entry.op == "flashpte::sdpa_verify"
    assert calls(new, "sdpa_verify")[0].args[1].meta["val"].shape[1] == 2


def test_value_head_dim_may_differ():
    q, k, _ = qkv(3)
    rewrite(Attention(), (q, k, torch.randn(1, 4, 64, 24)))


@pytest.mark.parametrize(("bounds", "op"), [((2, 16), "verify"), ((1, 16), "verify"), ((17, 100), "prefill")])
def test_dynamic_query_length(bounds, op):
    length = Dim("length", min=bounds[0], max=bounds[1])
    module, args = Attention(), qkv(bounds[1] - 1)
    new, entry = rewrite(module, args, {"q": {2: length}, "k": None, "v": None})
    assert entry.op == f"flashpte::sdpa_{op}"
    assert entry.lq_range == bounds
    assert isinstance(entry.query[2], str)
    for q_len in {bounds[0], bounds[0] + 1, bounds[1]}:
        q, k, v = qkv(q_len, seed=q_len)
        assert_same_attention(new.module()(q, k, v), module(q, k, v))


def test_dynamic_key_length_with_a_mask():
    keys, rows = Dim("keys", min=2, max=500), Dim("rows", min=2, max=300)
    module = Attention()
    q, k, v = qkv(30, 77)
    shapes = {"q": {2: rows}, "k": {2: keys}, "v": {2: keys}, "mask": {2: rows, 3: keys}}
    new, entry = rewrite(module, (q, k, v, torch.rand(1, 1, 30, 77) < 0.5), shapes)
    assert entry.branches == ("flashpte::sdpa_verify", "flashpte::sdpa_prefill")
    for rows_, keys_ in ((2, 2), (300, 3), (5, 500)):
        q, k, v = qkv(rows_, keys_)
        mask = torch.rand(1, 1, rows_, keys_) < 0.5
        assert_same_attention(new.module()(q, k, v, mask), module(q, k, v, mask))


@pytest.mark.parametrize(("q_len", "dynamic"), [(1, None), (5, None), (8, (2, 16)), (20, (17, 60))])
@pytest.mark.parametrize("decompose", [False, True])
def test_one_map_for_layers_that_share_a_mask(q_len, dynamic, decompose):
    program, args = cached_program(q_len, dynamic)
    if decompose:
        program = program.run_decompositions({})
    new, report = replace_sdpa(program)
    assert len(report.replaced) == 3
    assert len(calls(new, "_map.")) == 1
    users = calls(new, "sdpa_")
    assert len({n.args[9:] for n in users}) == 1
    assert {n.args[3] for n in users} == {None}
    assert users[0].args[9].meta["val"].shape[:2] == (2, 1)
    assert check_maps(new, args) == 3
    torch.testing.assert_close(new.module()(*args), program.module()(*args), atol=1e-4, rtol=1e-4)


def test_two_masks_get_two_maps():
    class TwoMasks(torch.nn.Module):
        def forward(self, q, k, v, a, b):
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(attend(q, k, v, attn_mask=a), k, v, attn_mask=b) + attend(q, k, v, attn_mask=a)

    masks = [torch.rand(1, 1, 5, 64) < 0.5 for _ in range(2)]
    new, _ = replace_sdpa(exported(TwoMasks(), (*qkv(5), *masks)))
    assert len(calls(new, "_map.")) == 2


def test_a_shared_mask_gets_a_map_for_each_tile_shape():
    class TwoWidths(torch.nn.Module):
        def forward(self, q, k, wide_q, wide_k, mask):
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(q, k, k, attn_mask=mask).sum() + attend(wide_q, wide_k, wide_k, attn_mask=mask).sum()

    q, k, _ = qkv(40)
    wide_q, wide_k, _ = qkv(40, dim=256)
    new, _ = replace_sdpa(exported(TwoWidths(), (q, k, wide_q, wide_k, torch.rand(1, 1, 40, 64) < 0.5)))
    assert len({n.args[3:5] for n in calls(new, "_map.")}) == 2


def test_the_input_program_is_untouched_and_weights_are_shared():
    program, args = cached_program(5)
    before, expected = str(program.graph), program.module()(*args)
    new, _ = replace_sdpa(program)
    assert str(program.graph) == before
    assert new.graph_signature.buffers_to_mutate == program.graph_signature.buffers_to_mutate
    assert all(new.state_dict[k] is program.state_dict[k] for k in program.state_dict)
    assert torch.equal(program.module()(*args), expected)
    again, report = replace_sdpa(new)
    assert not report.nodes
    assert str(again.graph) == str(new.graph)


def test_mutated_caches_are_still_written():
    program, _ = cached_program(1, layers=1)
    new = replace_sdpa(program)[0].module()
    old = program.module()
    for pos in (0, 3, 63):
        x = torch.randn(1, 1, 64)
        torch.testing.assert_close(new(x, torch.tensor([pos])), old(x, torch.tensor([pos])), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(new.k0, old.k0)
    assert (new.k0[0, :, 3] != CachedLayers(1).k0[0, :, 3]).all()


def test_the_result_keeps_the_memory_layout_of_the_node():
    for q_len in (1, 5, 40):
        program = exported(Attention(), qkv(q_len, batch=2))
        (node,) = calls(program, "scaled_dot_product_attention")
        new, _ = replace_sdpa(program)
        (replaced,) = calls(new, "sdpa_")
        assert replaced.meta["val"].stride() == node.meta["val"].stride()
        assert replaced.meta["val"].shape == node.meta["val"].shape


def test_branches_of_control_flow_are_rewritten():
    class Branches(torch.nn.Module):
        def forward(self, q, k, v):
            attend = torch.nn.functional.scaled_dot_product_attention
            return torch.cond(q.sum() > 0, lambda q, k, v: attend(q, k, v), lambda q, k, v: q + 0, (q, k, v))

    args = qkv(5)
    new, report = replace_sdpa(exported(Branches(), args))
    assert report.nodes[0].op == "flashpte::sdpa_verify"
    for sign in (1, -1):
        q = args[0].abs() * sign
        assert_same_attention(new.module()(q, *args[1:]), Branches()(q, *args[1:]))


def test_report_names_the_module_and_is_json_ready():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Attention(), Attention(dropout_p=0.1)])

        def forward(self, q, k, v):
            return self.layers[0](q, k, v) + self.layers[1](q, k, v)

    _, report = replace_sdpa(exported(Block(), qkv(1)))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["version"] == 1
    assert [n["module_path"] for n in data["nodes"]] == ["layers.0", "layers.1"]
    assert set(data["nodes"][0]) == {
        "node",
        "module_path",
        "op",
        "reason",
        "query",
        "key",
        "value",
        "lq_range",
        "dtype",
        "mask",
        "branches",
        "softcap",
        "sinks",
        "mask_form",
        "mask_note",
        "map_users",
        "bytes_saved",
        "bytes_copied",
    }
    table = format_table({"forward": report})
    assert "sdpa_decode" in table
    assert "(left as it was)" in table
    assert format_table({}) == "no scaled_dot_product_attention node was found"


def test_only_exported_programs_are_taken():
    with pytest.raises(TypeError, match=r"takes a torch\.export\.ExportedProgram, got Attention"):
        replace_sdpa(Attention())


def test_preserved_module_signatures():
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Bare()

        def forward(self, q, k, v):
            return self.inner(q, k, v) + 1

    class Bare(torch.nn.Module):
        def forward(self, q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    args = qkv(5)
    program = torch.export.export(Outer(), args, preserve_module_call_signature=("inner",))
    new, report = replace_sdpa(program)
    assert report.replaced
    assert_same_attention(torch.export.unflatten(new)(*args), Outer()(*args))


def test_lengths_that_depend_on_data():
    class Cut(torch.nn.Module):
        def forward(self, q, k, v, n):
            length = n.item()
            torch._check(length >= 1)
            torch._check(length <= q.shape[2])
            return torch.nn.functional.scaled_dot_product_attention(q[:, :, :length], k, v)

    args = (*qkv(40), torch.tensor(7))
    new, report = replace_sdpa(exported(Cut(), args))
    assert report.nodes[0].op == "flashpte::sdpa_dispatch"
    assert_same_attention(new.module()(*args), Cut()(*args))
