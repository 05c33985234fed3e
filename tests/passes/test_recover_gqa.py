"""repeat_kv before keys and values is undone, and nothing else is mistaken for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import assert_same_attention, calls, exported, qkv
from small_models import hugging_face
from torch.export import Dim

from flashpte.passes import replace_sdpa

REPEAT = {
    "hugging face": lambda t, g: t[:, :, None, :, :].expand(-1, -1, g, -1, -1).reshape(t.shape[0], -1, *t.shape[2:]),
    "unsqueeze": lambda t, g: t.unsqueeze(2).expand(-1, -1, g, -1, -1).flatten(1, 2),
    "clone": lambda t, g: t.unsqueeze(2).expand(-1, -1, g, -1, -1).clone().view(t.shape[0], -1, *t.shape[2:]),
    "repeat_interleave": lambda t, g: t.repeat_interleave(g, 1),
    "repeat_interleave, negative dim": lambda t, g: t.repeat_interleave(g, dim=-3),
}


def index(t, g):
    return torch.arange(t.shape[1] * g) // g


# On [B, S, H, D], before the heads are moved before the length.
REPEAT_HEADS_LAST = {
    "meta's llama": lambda t, g: t[:, :, :, None, :].expand(-1, -1, -1, g, -1).reshape(*t.shape[:2], -1, t.shape[3]),
    "repeat_interleave": lambda t, g: t.repeat_interleave(g, dim=2),
    "torchtune": lambda t, g: t.view(*t.shape[:3], 1, t.shape[3]).expand(-1, -1, -1, g, -1).flatten(2, 3),
}
REPEAT |= {
    "broadcast_to": lambda t, g: torch.broadcast_to(t.unsqueeze(2), (*t.shape[:2], g, *t.shape[2:])).reshape(
        t.shape[0], -1, *t.shape[2:]
    ),
    "repeat in five dimensions": lambda t, g: t.unsqueeze(2).repeat(1, 1, g, 1, 1).flatten(1, 2),
    "tile": lambda t, g: torch.tile(t.unsqueeze(2), (g, 1, 1)).flatten(1, 2),
    "stack": lambda t, g: torch.stack([t] * g, dim=2).flatten(1, 2),
    "cat": lambda t, g: torch.cat([t.unsqueeze(2)] * g, dim=2).flatten(1, 2),
    "index": lambda t, g: t[:, index(t, g)],
    "index_select": lambda t, g: t.index_select(1, index(t, g)),
    "constant index": lambda t, g: t[:, torch.tensor([h // g for h in range(t.shape[1] * g)])],
    "contiguous": lambda t, g: t.contiguous().repeat_interleave(g, 1).contiguous(),
    "in two steps": lambda t, g: t[:, :, None, None].expand(-1, -1, 1, g, -1, -1).flatten(2, 3).flatten(1, 2),
    "heads last": lambda t, g: t.transpose(1, 2).repeat_interleave(g, 2).transpose(1, 2),
    **{
        f"{name}, on the length first": lambda t, g, repeat=repeat: repeat(t.transpose(1, 2), g).transpose(1, 2)
        for name, repeat in REPEAT_HEADS_LAST.items()
    },
}
LOOKS_ALIKE = {
    "stack in front": lambda t, g: torch.stack([t] * g, dim=1).flatten(1, 2),
    "five dimensions in front": lambda t, g: t.unsqueeze(1).repeat(1, g, 1, 1, 1).flatten(1, 2),
    "index modulo": lambda t, g: t[:, torch.arange(t.shape[1] * g) % t.shape[1]],
    "constant index": lambda t, g: t[:, torch.tensor([h // g for h in range(t.shape[1] * g)][::-1])],
    "stack of two": lambda t, g: torch.stack([t, *[t + 0] * (g - 1)], dim=2).flatten(1, 2),
    "heads and lengths mixed": lambda t, g: (
        t.repeat_interleave(g, 1).transpose(1, 2).reshape(t.shape[0], -1, *t.shape[2:])
    ),
    "lengths flipped": lambda t, g: t.repeat_interleave(g, 1).flip(2),
    "random index": lambda t, g: (
        t[:, torch.randint(t.shape[1], (1,)).expand(t.shape[1] * g)] * 0 + t.repeat(1, g, 1, 1)
    ),
    "repeat": lambda t, g: t.repeat(1, g, 1, 1),
    "expanded in front": lambda t, g: t.unsqueeze(1).expand(-1, g, -1, -1, -1).reshape(t.shape[0], -1, *t.shape[2:]),
    "lengths repeated": lambda t, g: t.repeat_interleave(g, 2).reshape(t.shape[0], -1, *t.shape[2:]),
    "cat": lambda t, g: torch.cat([t] * g, 1),
}


class Repeated(torch.nn.Module):
    """Attention over keys and values whose heads are repeated by ``repeat``."""

    def __init__(self, repeat, groups=3):
        super().__init__()
        self.repeat, self.groups = repeat, groups

    def forward(self, q, k, v, mask=None):
        return F.scaled_dot_product_attention(
            q, self.repeat(k, self.groups), self.repeat(v, self.groups), attn_mask=mask
        )


def rewritten(repeat, args, decompose, shapes=None):
    program = exported(Repeated(repeat), args, shapes)
    if decompose:
        program = program.run_decompositions({})
    new, report = replace_sdpa(program)
    assert_same_attention(new.module()(*args), program.module()(*args))
    (node,) = calls(new, "sdpa_")
    return new, node, report.nodes[0]


@pytest.mark.parametrize(
    ("name", "q_len"), [(name, q_len) for i, name in enumerate(REPEAT) for q_len in ((1, 5, 40) if i < 5 else (5,))]
)
@pytest.mark.parametrize("decompose", [False, True])
def test_repeated_heads_become_groups(name, decompose, q_len):
    new, node, entry = rewritten(REPEAT[name], qkv(q_len, heads=6, heads_kv=2), decompose)
    assert [n.name for n in node.args[1:3]] == ["k", "v"]
    assert entry.key == (1, 2, 64, 16)
    for gone in ("expand", "clone", "repeat_interleave", "unsqueeze"):
        assert not calls(new, gone)


@pytest.mark.parametrize("name", LOOKS_ALIKE)
@pytest.mark.parametrize("decompose", [False, True])
def test_other_repetitions_are_not_taken_for_groups(name, decompose):
    _, node, entry = rewritten(LOOKS_ALIKE[name], qkv(5, heads=6, heads_kv=2), decompose)
    assert node.args[1].meta["val"].shape[1] == 6
    assert entry.key == (1, 6, 64, 16)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_repeated_heads_of_a_cache_with_the_length_first(rows):
    """Meta's Llama, torchtune, Voxtral: a cache [B, S, H, D] is repeated, then transposed."""

    class Model(torch.nn.Module):
        def __init__(self, repeat):
            super().__init__()
            self.repeat = repeat

        def forward(self, q, k, v):
            key, value = (self.repeat(t, 3).transpose(1, 2) for t in (k, v))
            return F.scaled_dot_product_attention(q, key, value)

    q, k, v = qkv(rows, heads=6, heads_kv=2, batch=2)
    args = (q, k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous())
    for name, repeat in REPEAT_HEADS_LAST.items():
        for decompose in (False, True):
            program = exported(Model(repeat), args)
            program = program.run_decompositions({}) if decompose else program
            new, report = replace_sdpa(program)
            assert report.nodes[0].key == (2, 2, 64, 16), name
            for gone in ("expand", "clone", "repeat_interleave", "reshape", "flatten"):
                assert not calls(new, gone), name
            (node,) = calls(new, "sdpa_")
            assert node.args[1].meta["val"].stride()[1:] == (16, 32, 1)
            assert_same_attention(new.module()(*args), program.module()(*args))


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "repeat",
    [
        lambda t, g: t.expand(-1, g, -1, -1),
        lambda t, g: t.expand(-1, g, -1, -1).contiguous(),
        lambda t, g: t.repeat(1, g, 1, 1),
        lambda t, g: torch.cat([t] * g, 1),
    ],
)
def test_one_head_for_all(repeat, batch, decompose):
    """With one key/value head, all orders of repetitions are the same."""
    args = qkv(5, heads=6, heads_kv=1, batch=batch)
    program = exported(Repeated(repeat, 6), args)
    program = program.run_decompositions({}) if decompose else program
    new, report = replace_sdpa(program)
    assert report.nodes[0].key == (batch, 1, 64, 16)
    assert [n.name for n in calls(new, "sdpa_")[0].args[1:3]] == ["k", "v"]
    assert_same_attention(new.module()(*args), program.module()(*args))


def test_a_batch_that_is_copied():
    """A prefix of all requests is copied for each; the kernel reads it with a stride of 0 instead."""

    class Shared(torch.nn.Module):
        def forward(self, q, k, v):
            key, value = (t.expand(4, -1, -1, -1).contiguous().repeat_interleave(3, 1) for t in (k, v))
            return F.scaled_dot_product_attention(q, key, value)

    q, _, _ = qkv(5, heads=6, batch=4)
    args = (q, *qkv(1, heads_kv=2)[1:])
    new, report = replace_sdpa(exported(Shared(), args))
    assert report.nodes[0].key == (4, 2, 64, 16)
    (node,) = calls(new, "sdpa_")
    assert [n.args[0].name for n in node.args[1:3]] == ["k", "v"]
    assert [n.meta["val"].stride(0) for n in node.args[1:3]] == [0, 0]
    assert_same_attention(new.module()(*args), Shared()(*args))


def test_an_index_that_is_a_buffer_may_change():
    class Buffer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("index", torch.arange(6) // 3)

        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k[:, self.index], v[:, self.index])

    args = qkv(5, heads=6, heads_kv=2)
    new, report = replace_sdpa(exported(Buffer(), args))
    assert report.nodes[0].key == (1, 6, 64, 16)
    assert_same_attention(new.module()(*args), Buffer()(*args))


def test_an_index_that_is_written_to():
    class Written(torch.nn.Module):
        def forward(self, q, k, v):
            index = torch.arange(6) // 3
            index.mul_(0)
            return F.scaled_dot_product_attention(q, k[:, index], v[:, index])

    args = qkv(5, heads=6, heads_kv=2)
    new, report = replace_sdpa(exported(Written(), args))
    assert report.nodes[0].key == (1, 6, 64, 16)
    assert_same_attention(new.module()(*args), Written()(*args))


def test_keys_alone_are_not_enough():
    class KeysOnly(torch.nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k.repeat_interleave(3, 1), v)

    q, k, _ = qkv(5, heads=6, heads_kv=2)
    new, report = replace_sdpa(exported(KeysOnly(), (q, k, torch.randn(1, 6, 64, 16))))
    assert report.nodes[0].key == (1, 6, 64, 16)
    assert calls(new, "repeat_interleave")


def test_a_repetition_that_is_also_the_copy_that_fits():
    """Keys are kept as [B, H, D, L]; the repetition makes them contiguous, so it stays."""

    class Transposed(torch.nn.Module):
        def forward(self, q, k, v):
            repeat = REPEAT["hugging face"]
            return F.scaled_dot_product_attention(q, repeat(k.transpose(2, 3), 3), repeat(v, 3))

    q, k, v = qkv(5, heads=6, heads_kv=2)
    args = (q, k.transpose(2, 3).contiguous(), v)
    program = exported(Transposed(), args)
    new, report = replace_sdpa(program)
    assert report.nodes[0].key == (1, 6, 64, 16)
    assert_same_attention(new.module()(*args), program.module()(*args))


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="torch 2.11 refuses to export it: it adds a guard on the length, then rejects it"
)
def test_dynamic_lengths():
    rows, keys = Dim("rows", min=17, max=99), Dim("keys", min=2, max=500)
    shapes = {"q": {2: rows}, "k": {2: keys}, "v": {2: keys}, "mask": {2: rows, 3: keys}}
    args = (*qkv(30, 77, heads=6, heads_kv=2), torch.rand(1, 1, 30, 77) < 0.5)
    for decompose in (False, True):
        _, node, _ = rewritten(REPEAT["hugging face"], args, decompose, shapes)
        assert [n.name for n in node.args[1:3]] == ["k", "v"]


def test_stock_hugging_face_attention():
    model = hugging_face("Llama", hidden_size=64, num_hidden_layers=2)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens, mask):
            return self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits

    tokens = torch.randint(0, 64, (1, 20))
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    program = exported(Logits(), (tokens, mask))
    for decompose in (False, True):
        given = program.run_decompositions({}) if decompose else program
        new, report = replace_sdpa(given)
        assert [n.key for n in report.nodes] == [(1, 2, 20, 16)] * 2
        assert len(calls(new, "sdpa_prefill")) == 2
        for node in calls(new, "sdpa_prefill"):
            assert all("expand" not in str(n.target) and "clone" not in str(n.target) for n in node.args[1:3])
        torch.testing.assert_close(
            new.module()(tokens, mask), model(tokens, attention_mask=mask).logits, atol=1e-5, rtol=1e-4
        )
