"""Views bring attention of any rank, with broadcasting, to [B, H, L, D] and restore its result's shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import assert_same_attention, calls, check_maps, exported
from torch.export import Dim

from flashpte.passes import replace_sdpa


class Plain(torch.nn.Module):
    """``scaled_dot_product_attention`` alone, with views of its arguments and of its result."""

    def __init__(self, key=lambda t: t, value=lambda t: t, result=lambda t: t, **options):
        super().__init__()
        self.key, self.value, self.result, self.options = key, value, result, options

    def forward(self, q, k, v, mask=None):
        key, value = self.key(k), self.value(v)
        return self.result(F.scaled_dot_product_attention(q, key, value, attn_mask=mask, **self.options))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rewrite(module, args, shapes=None, decompose=False):
    """Rewrites a program with one attention; asserts that it is replaced and that results and strides are unchanged."""
    program = exported(module, args, shapes)
    if decompose:
        program = program.run_decompositions({})
    new, report = replace_sdpa(program)
    (entry,) = report.nodes
    assert entry.replaced, entry.reason
    assert not calls(new, "scaled_dot_product_attention")
    assert new.graph_signature.output_specs[0].arg.name == program.graph_signature.output_specs[0].arg.name
    before, after = (list(p.graph.nodes)[-1].args[0][0].meta["val"] for p in (program, new))
    assert str(before.shape) == str(after.shape)
    kept = [d for d, size in enumerate(before.shape) if size != 1]
    assert [str(before.stride(d)) for d in kept] == [str(after.stride(d)) for d in kept]
    assert_same_attention(new.module()(*args), program.module()(*args))
    return new, entry


def operands(new):
    (node,) = calls(new, "flashpte.sdpa_")
    return [tuple(n.meta["val"].shape) for n in node.args[:3]]


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(
    ("lead", "four"),
    [((), (1, 1)), ((3,), (3, 1)), ((1,), (1, 1)), ((2, 3), (2, 3)), ((2, 3, 4), (6, 4)), ((2, 1, 3, 4), (6, 4))],
)
def test_ranks(lead, four, rows, decompose):
    args = (randn(*lead, rows, 16), randn(*lead, 64, 16, seed=1), randn(*lead, 64, 24, seed=2))
    new, entry = rewrite(Plain(), args, decompose=decompose)
    assert operands(new) == [(*four, rows, 16), (*four, 64, 16), (*four, 64, 24)]
    assert entry.query == (*four, rows, 16)
    assert not calls(new, "clone")


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(
    ("lead", "mask"),
    [
        ((), (5, 64)),
        ((3,), (5, 64)),
        ((3,), (3, 5, 64)),
        ((3,), (3, 1, 64)),
        ((3,), (1, 5, 64)),
        ((2, 3, 4), (5, 64)),
        ((2, 3, 4), (4, 5, 64)),
        ((2, 3, 4), (1, 1, 5, 64)),
        ((2, 3, 4), (3, 1, 5, 64)),
        ((2, 3, 4), (3, 4, 5, 1)),
        ((2, 3, 4), (2, 1, 1, 5, 64)),
        ((2, 3, 4), (1, 1, 1, 5, 64)),
        ((2, 3, 4), (2, 3, 4, 5, 64)),
    ],
)
def test_masks_of_every_broadcast(lead, mask, kind):
    generator = torch.Generator().manual_seed(3)
    given = torch.rand(mask, generator=generator) < 0.6 if kind == "bool" else torch.randn(mask, generator=generator)
    args = (randn(*lead, 5, 16), randn(*lead, 64, 16, seed=1), randn(*lead, 64, 16, seed=2), given)
    new, entry = rewrite(Plain(), args)
    assert entry.mask == kind
    assert check_maps(new, args) == 1


@pytest.mark.parametrize(
    ("query", "key", "value", "four"),
    [
        ((2, 4, 5, 16), (1, 4, 64, 16), (1, 4, 64, 16), (2, 4)),
        ((1, 4, 5, 16), (3, 4, 64, 16), (3, 4, 64, 16), (3, 4)),
        ((2, 4, 5, 16), (2, 4, 64, 16), (1, 4, 64, 16), (2, 4)),
        ((2, 4, 5, 16), (1, 1, 64, 16), (1, 1, 64, 16), (2, 1)),
        ((2, 4, 5, 16), (2, 1, 64, 16), (2, 4, 64, 16), (2, 4)),
        ((2, 4, 5, 16), (64, 16), (64, 16), (2, 1)),
        ((2, 4, 5, 16), (4, 64, 16), (2, 4, 64, 16), (2, 4)),
        ((2, 1, 5, 16), (2, 4, 64, 16), (2, 4, 64, 16), (2, 4)),
        ((4, 5, 16), (1, 64, 16), (1, 64, 16), (1, 1)),
        ((2, 3, 4, 5, 16), (1, 3, 4, 64, 16), (1, 3, 4, 64, 16), (6, 4)),
    ],
)
def test_broadcasts(query, key, value, four):
    args = (randn(*query), randn(*key, seed=1), randn(*value, seed=2))
    if len(query) == 5:
        # An expanded batch does not merge with windows; a copy does not pay for a few rows.
        program = exported(Plain(), args)
        new, report = replace_sdpa(program)
        assert "do not merge" in report.declined[0].reason
        assert str(new.graph) == str(program.graph)
        args = (randn(2, 3, 4, 20, 16), *args[1:])
    new, _ = rewrite(Plain(), args)
    assert operands(new)[1] == (*four, 64, 16)


def test_a_batch_that_broadcasts_is_not_copied():
    args = (randn(8, 4, 1, 16), randn(1, 4, 64, 16, seed=1), randn(1, 4, 64, 16, seed=2))
    new, _ = rewrite(Plain(), args)
    (node,) = calls(new, "sdpa_decode")
    for operand in node.args[1:3]:
        assert operand.meta["val"].stride(0) == 0
        assert operand.args[0].op == "placeholder"
    assert not calls(new, "clone")


@pytest.mark.parametrize("rows", [40, 64])
def test_channel_first_keys_of_many_rows_are_copied(rows):
    """Keys are a feature map [B, H, D, L], as timm and YOLO write them."""
    module = Plain(key=lambda t: t.transpose(2, 3), value=lambda t: t.transpose(2, 3))
    args = (randn(1, 4, rows, 16), randn(1, 4, 16, 64, seed=1), randn(1, 4, 16, 64, seed=2))
    new, _ = rewrite(module, args)
    (node,) = calls(new, "sdpa_prefill")
    assert [operand.meta["val"].stride(3) for operand in node.args[1:3]] == [1, 1]
    assert len(calls(new, "clone")) == 2


def test_channel_first_keys_as_new_as_the_rows():
    module = Plain(key=lambda t: t.transpose(2, 3))
    args = (randn(1, 4, 9, 16), randn(1, 4, 16, 9, seed=1), randn(1, 4, 9, 16, seed=2))
    rewrite(module, args)


def test_a_channel_first_cache_is_not_copied_for_a_few_rows():
    module = Plain(key=lambda t: t.transpose(2, 3))
    args = (randn(1, 4, 5, 16), randn(1, 4, 16, 64, seed=1), randn(1, 4, 64, 16, seed=2))
    program = exported(module, args)
    new, report = replace_sdpa(program)
    assert "key has stride 64 in the head dim" in report.declined[0].reason
    assert str(new.graph) == str(program.graph)


def windows(batch, count, rows, heads=2, dim=8):
    """Queries, keys and values as Hiera cuts them: [B, H, windows, L, D] of one projection."""

    class Windows(torch.nn.Module):
        def forward(self, x):
            qkv = x.reshape(batch, rows, count, 3, heads, dim).permute(3, 0, 4, 2, 1, 5)
            out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
            return out.transpose(1, 3).reshape(batch, rows * count, heads * dim)

    return Windows(), (randn(batch, rows * count, 3 * heads * dim),)


@pytest.mark.parametrize(("batch", "copies"), [(1, 0), (2, 3)])
def test_windows_of_a_projection(batch, copies):
    """A batch of one merges with the heads. For larger batches, the parts that do not merge are copied."""
    module, args = windows(batch, 4, 9)
    program = exported(module, args)
    new, report = replace_sdpa(program)
    assert report.replaced
    assert operands(new) == [(batch * 2, 4, 9, 8)] * 3
    assert len(calls(new, "clone")) == copies
    assert_same_attention(new.module()(*args), program.module()(*args))


@pytest.mark.parametrize("decompose", [False, True])
def test_dynamic_sizes_of_three_dimensions(decompose):
    batch, rows, keys = Dim("batch", min=2, max=9), Dim("rows", min=2, max=99), Dim("keys", min=2, max=500)
    shapes = {"q": {0: batch, 1: rows}, "k": {0: batch, 1: keys}, "v": {0: batch, 1: keys}, "mask": {1: rows, 2: keys}}
    args = (randn(3, 30, 16), randn(3, 77, 16, seed=1), randn(3, 77, 16, seed=2), randn(1, 30, 77, seed=3) < 0.5)
    new, entry = rewrite(Plain(), args, shapes, decompose)
    assert entry.op == "flashpte::sdpa_dispatch"
    for sizes in ((2, 2, 3), (9, 99, 500)):
        b, m, n = sizes
        args = (randn(b, m, 16), randn(b, n, 16, seed=1), randn(b, n, 16, seed=2), randn(1, m, n, seed=3) < 0.5)
        assert_same_attention(new.module()(*args), Plain()(*args))


def test_dynamic_sizes_of_five_dimensions():
    batch, count, rows = Dim("batch", min=2, max=9), Dim("count", min=2, max=9), Dim("rows", min=2, max=99)
    dims = {0: batch, 1: count, 3: rows}
    args = tuple(randn(3, 4, 2, 30, 16, seed=s) for s in range(3))
    new, _ = rewrite(Plain(), args, {"q": dims, "k": dims, "v": dims})
    assert not calls(new, "clone")
    args = tuple(randn(2, 5, 2, 3, 16, seed=s) for s in range(3))
    assert_same_attention(new.module()(*args), Plain()(*args))


def test_grouped_heads_of_three_dimensions():
    args = (randn(6, 5, 16), randn(2, 64, 16, seed=1), randn(2, 64, 16, seed=2))
    new, _ = rewrite(Plain(enable_gqa=True), args)
    assert operands(new) == [(1, 6, 5, 16), (1, 2, 64, 16), (1, 2, 64, 16)]


def test_layers_of_three_dimensions_share_a_map():
    class Layers(torch.nn.Module):
        def forward(self, q, k, v, mask):
            for _ in range(3):
                q = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(3, -1, -1))
            return q

    args = (randn(3, 5, 16), randn(3, 64, 16, seed=1), randn(3, 64, 16, seed=2), randn(3, 1, 64, seed=3) < 0.5)
    new, report = replace_sdpa(exported(Layers(), args))
    assert [entry.map_users for entry in report.nodes] == [3] * 3
    assert check_maps(new, args) == 3
    assert_same_attention(new.module()(*args), Layers()(*args))


def test_a_mask_that_is_proven_in_three_dimensions():
    class Padded(torch.nn.Module):
        def forward(self, q, k, v, lengths):
            keys = torch.arange(k.shape[1])
            causal = keys[None] <= torch.arange(q.shape[1])[:, None]
            return F.scaled_dot_product_attention(q, k, v, causal[None] & (keys < lengths[:, None])[:, None])

    args = (randn(3, 20, 16), randn(3, 20, 16, seed=1), randn(3, 20, 16, seed=2), torch.tensor([5, 20, 9]))
    new, report = replace_sdpa(exported(Padded(), args))
    assert report.nodes[0].mask_form == "positions"
    assert_same_attention(new.module()(*args), Padded()(*args))


class Past(torch.nn.Module):
    """Attention over past keys and values that are inputs, each with its own length."""

    def forward(self, x, past_k, past_v, mask=None):
        q = x.view(x.shape[0], x.shape[1], 4, 16).transpose(1, 2)
        key, value = torch.cat([past_k, q], 2), torch.cat([past_v, q], 2)
        return F.scaled_dot_product_attention(q, key, value, attn_mask=mask)


def past(batch=2, rows=3, keys=7, values=7, mask=None):
    given = () if mask is None else (randn(*mask, seed=3) < 0.5,)
    return (randn(batch, rows, 64), randn(batch, 4, keys, 16, seed=1), randn(batch, 4, values, 16, seed=2), *given)


@pytest.mark.parametrize("decompose", [False, True])
def test_lengths_that_attention_requires_to_be_equal(decompose):
    auto = Dim.AUTO
    shapes = ({0: auto, 1: auto}, {0: auto, 2: auto}, {0: auto, 2: auto})
    program = exported(Past(), past(), shapes)
    if decompose:
        program = program.run_decompositions({})
    new, report = replace_sdpa(program)
    assert report.replaced, report.nodes[0].reason
    for sizes in ((2, 3, 7, 7), (5, 40, 11, 11)):
        args = past(*sizes)
        assert_same_attention(new.module()(*args), program.module()(*args))
    # PyTorch's CPU kernel reads past the end; others raise an error.
    with pytest.raises(RuntimeError, match="attention needs equal sizes"):
        new.module()(*past(values=8))


def test_a_mask_of_a_length_of_its_own():
    auto = Dim.AUTO
    shapes = ({0: auto, 1: auto}, {0: auto, 2: auto}, {0: auto, 2: auto}, {2: auto, 3: auto})
    program = exported(Past(), past(mask=(1, 1, 3, 10)), shapes)
    new, report = replace_sdpa(program)
    assert report.replaced, report.nodes[0].reason
    args = past(5, 4, 8, 8, mask=(1, 1, 4, 12))
    assert_same_attention(new.module()(*args), program.module()(*args))
    # The program's own guard raises, or the operator if there is none.
    with pytest.raises((RuntimeError, AssertionError, ValueError)):
        new.module()(*past(5, 4, 8, 8, mask=(1, 1, 4, 11)))


def test_lengths_that_are_known_to_differ():
    """A program that cannot run stays unchanged; the reason names both lengths."""

    class Longer(torch.nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v[:, :, 1:])

    keys = Dim("keys", min=4, max=99)
    shapes = {"q": None, "k": {2: keys}, "v": {2: keys}}
    args = (randn(1, 4, 5, 16), randn(1, 4, 64, 16), randn(1, 4, 64, 16))
    with torch.no_grad():
        try:
            program = torch.export.export(Longer(), args, dynamic_shapes=shapes)
        except Exception:
            pytest.skip("this torch refuses to export it")
    _, report = replace_sdpa(program)
    assert "key has length" in report.declined[0].reason


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_absorbed_latents(rows):
    """Multi-head latent attention with absorbed projections: D = 576, D_v = 512; the values are columns of the keys."""

    class Latent(torch.nn.Module):
        def forward(self, q, latent):
            return F.scaled_dot_product_attention(q, latent, latent[..., :512], scale=192**-0.5, enable_gqa=True)

    new, _ = rewrite(Latent(), (randn(1, 4, rows, 576), randn(1, 1, 64, 576, seed=1)))
    assert operands(new) == [(1, 4, rows, 576), (1, 1, 64, 576), (1, 1, 64, 512)]
