"""repeat_kv in front of keys and values is undone, and nothing else is taken for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import calls, exported, qkv
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
LOOKS_ALIKE = {
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
    torch.testing.assert_close(new.module()(*args), program.module()(*args), atol=2e-6, rtol=2e-5)
    (node,) = calls(new, "sdpa_")
    return new, node, report.nodes[0]


@pytest.mark.parametrize("name", REPEAT)
@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("q_len", [1, 5, 40])
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


def test_keys_alone_are_not_enough():
    class KeysOnly(torch.nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k.repeat_interleave(3, 1), v)

    q, k, _ = qkv(5, heads=6, heads_kv=2)
    new, report = replace_sdpa(exported(KeysOnly(), (q, k, torch.randn(1, 6, 64, 16))))
    assert report.nodes[0].key == (1, 6, 64, 16)
    assert calls(new, "repeat_interleave")


def test_a_repetition_that_is_also_the_copy_that_fits():
    """Keys kept as [B, H, D, L]: the repetition makes them contiguous, so it stays."""

    class Transposed(torch.nn.Module):
        def forward(self, q, k, v):
            repeat = REPEAT["hugging face"]
            return F.scaled_dot_product_attention(q, repeat(k.transpose(2, 3), 3), repeat(v, 3))

    q, k, v = qkv(5, heads=6, heads_kv=2)
    args = (q, k.transpose(2, 3).contiguous(), v)
    program = exported(Transposed(), args)
    new, report = replace_sdpa(program)
    assert report.nodes[0].key == (1, 6, 64, 16)
    torch.testing.assert_close(new.module()(*args), program.module()(*args), atol=2e-6, rtol=2e-5)


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
