"""Models as their authors wrote them: Hugging Face's with stock attention, and ExecuTorch's own Gemma 4."""

from __future__ import annotations

import copy

import pytest
import torch
from programs import calls, check_maps, exported
from small_models import SMALL, hugging_face
from torch.export import Dim

from flashpte.passes import replace_sdpa

# Gemma 4: sliding layers, and full layers with other heads.
GLOBAL_LAYERS = {"head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1, "sliding_window": 8}


def executorch_gemma4(layers: int):
    """ExecuTorch's ``examples.models.gemma4_31b`` before its CUDA source transformations, at small widths."""
    from executorch.examples.models.gemma4_31b.model import Gemma4_31B, Gemma4_31BConfig

    torch.manual_seed(0)
    sizes = {**SMALL, **GLOBAL_LAYERS, "num_hidden_layers": layers, "max_seq_len": 64}
    return Gemma4_31B(Gemma4_31BConfig(**sizes)).eval()


@pytest.mark.parametrize(("rows", "layers"), [(1, 12), (5, 12), (None, 12), (None, 60)])
def test_executorch_gemma4_has_two_masks_in_all_layers(rows, layers):
    """Both masks are proven: one map for the sliding layers, one for every sixth (full) layer, and no mask tensor."""
    model, length = executorch_gemma4(layers), rows or 6
    shapes = None
    if rows is None:
        dim = Dim("rows", min=2, max=8)
        shapes = ({1: dim}, {0: dim}, None)
    example = (torch.zeros(1, length, dtype=torch.int64), torch.arange(length), torch.ones(1))
    program = exported(model, example, shapes)
    new, report = replace_sdpa(program)
    assert len(report.replaced) == layers
    assert len(calls(new, "interval_map")) == 2
    assert not calls(new, "tile_map")
    assert sorted({(n.mask, n.mask_form, n.map_users) for n in report.nodes}) == [
        ("causal", "positions", layers // 6),
        ("window", "positions", layers - layers // 6),
    ]
    assert len({n.args[9] for n in calls(new, "sdpa_")}) == 2
    generator = torch.Generator().manual_seed(0)  # the same near ties of logits in every order of tests
    for start in (0, 3, 30):
        args = (
            torch.randint(64, (1, length), generator=generator),
            torch.arange(length) + start,
            torch.full((1,), 1e-4),
        )
        results = []
        for module in (program.module(), new.module()):
            torch.manual_seed(1)  # the model samples
            results.append(copy.deepcopy(module)(*args))
        assert torch.equal(*results)
    assert check_maps(new, args) == layers


def dynamic_rows(arguments: int):
    """Shapes with one dynamic length; torch 2.11 cannot export these models so: it adds a guard, then rejects it."""
    return None if torch.__version__ < "2.13" else ({1: Dim("rows", min=2, max=100)},) * arguments


class Tokens(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, attention_mask=None):
        return self.model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.parametrize("layers", [12, 60])
def test_hugging_face_gemma4_has_two_masks_in_all_layers(layers):
    gemma4 = hugging_face(
        "Gemma4", "Gemma4Text", **GLOBAL_LAYERS, num_hidden_layers=layers, attention_k_eq_v=True,
        hidden_size_per_layer_input=0, num_kv_shared_layers=0, vocab_size_per_layer_input=64,
    )  # fmt: skip
    model = Tokens(gemma4)
    tokens = torch.randint(64, (1, 30), generator=torch.Generator().manual_seed(0))
    new, report = replace_sdpa(exported(model, (tokens,), dynamic_rows(1)))
    assert len(report.replaced) == layers
    assert len(calls(new, "_map.")) == 2
    # Releases of transformers write the parts of the mask in different orders.
    kinds = {("+".join(sorted(n.mask.split("+"))), n.mask_form, n.map_users, n.key[1]) for n in report.nodes}
    assert kinds == {
        ("causal+documents", "positions", layers // 6, 1),
        ("documents+window", "positions", layers - layers // 6, 2),
    }
    torch.testing.assert_close(new.module()(tokens), model(tokens), atol=1e-4, rtol=1e-3)


WINDOWED = dict(sliding_window=8)


@pytest.mark.parametrize(
    ("name", "fields", "masks"),
    [("Llama", {}, 1), ("Mistral", WINDOWED, 1), ("Qwen3", dict(head_dim=16), 1)],
)
@pytest.mark.parametrize("padded", [False, True])
def test_hugging_face_models_as_they_are(name, fields, masks, padded):
    model = Tokens(hugging_face(name, **fields))
    tokens = torch.randint(64, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[0, :7] = 0
    mask[1, 25:] = 0
    args = (tokens, mask) if padded else (tokens,)
    program = exported(model, args, dynamic_rows(len(args)))
    new, report = replace_sdpa(program)
    assert len(report.replaced) == 4
    assert len(report.declined) == 0
    maps = calls(new, "_map.")
    assert len(maps) in (0, masks)
    assert {n.mask_form for n in report.nodes} <= {"positions", "is_causal"}
    # Keys and values stay grouped.
    assert {n.key[1] for n in report.nodes} == {2}
    torch.testing.assert_close(new.module()(*args), model(*args), atol=1e-5, rtol=1e-4)
    assert check_maps(new, args) == (4 if maps else 0)


@pytest.mark.parametrize(
    ("name", "fields", "scores"),
    [
        ("Gemma2", dict(head_dim=16, attn_logit_softcapping=1.5), (1.5, False)),
        ("GptOss", dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2), (0.0, True)),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_hugging_face_eager_attention_as_it_is(name, fields, scores, padded):
    """Softcaps and sinks, and a window in every other layer, in transformers' own eager functions."""
    model = Tokens(hugging_face(name, attention="eager", **fields, **WINDOWED))
    tokens = torch.randint(64, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[0, :7] = 0
    args = (tokens, mask) if padded else (tokens,)
    program = exported(model, args)
    new, report = replace_sdpa(program)
    attention = [node for node in report.nodes if node.replaced]
    assert [(node.softcap, node.sinks) for node in attention] == [scores] * 4, [n.reason for n in report.declined]
    assert not report.declined
    assert {node.key[1] for node in attention} == {2}
    assert {node.mask_form for node in attention} == {"positions"}
    torch.testing.assert_close(new.module()(*args), model(*args), atol=1e-5, rtol=1e-4)
