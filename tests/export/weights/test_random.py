"""Random weights depend only on the seed and the tensor's name."""

import json

import pytest
import torch

from flashpte.export.common.options import ExportOptions
from flashpte.export.pipeline import load_weights, plan_export
from flashpte.export.weights.random import random_tensor


def weights(**options):
    plan = plan_export(ExportOptions("gemma4-31b", small=True, **options))
    load_weights(plan)
    return plan.model.state_dict()


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_same_seed_gives_the_same_bytes_whatever_ran_before():
    first = weights(random_seed=3)
    torch.manual_seed(99)
    torch.rand(5)
    second = weights(random_seed=3)
    assert first.keys() == second.keys()
    assert all(as_bytes(first[name]) == as_bytes(second[name]) for name in first)


def test_another_seed_changes_every_tensor():
    first, second = weights(random_seed=0), weights(random_seed=1)
    assert all(as_bytes(first[name]) != as_bytes(second[name]) for name in first)


def test_cut_layers_do_not_change_the_kept_ones():
    whole, cut = weights(random_seed=0), weights(random_seed=0, layers=2)
    assert cut.keys() < whole.keys()
    assert all(as_bytes(cut[name]) == as_bytes(whole[name]) for name in cut)


def test_no_two_tensors_are_alike_and_none_is_left_on_meta():
    tensors = weights(random_seed=0)
    assert not any(tensor.is_meta for tensor in tensors.values())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert len({as_bytes(t) for t in tensors.values() if t.numel() > 8}) == sum(t.numel() > 8 for t in tensors.values())


@pytest.mark.parametrize(
    ("name", "shape", "low", "high"),
    [
        ("a.weight", (64, 300), -0.125, 0.125),
        ("norm.weight", (4096,), 0.5, 1.5),
        ("a.bias", (4096,), -0.125, 0.125),
    ],
)
def test_ranges(name, shape, low, high):
    tensor = random_tensor(name, torch.Size(shape), torch.float32, 0)
    assert low <= tensor.min() < low + 0.05 * (high - low)
    assert high - 0.05 * (high - low) < tensor.max() <= high


def test_known_values():
    """The values are the same on every machine and in every torch release."""
    tensor = random_tensor("model.norm.weight", torch.Size([4]), torch.float32, 0)
    assert tensor.tolist() == [1.0630356073379517, 0.6489343643188477, 0.9562625885009766, 0.6192308068275452]


def test_scores_and_heads_are_scaled():
    """Factors are powers of two; an untied head leans towards the embedding of the previous token."""
    tied = weights(random_seed=0)
    name = "model.layers.0.self_attn.q_norm.weight"
    assert torch.equal(tied[name], random_tensor(name, tied[name].shape, torch.bfloat16, 0) / 4)
    embedding = "model.embed_tokens.weight"
    assert torch.equal(tied[embedding], random_tensor(embedding, tied[embedding].shape, torch.bfloat16, 0))


def test_a_head_of_its_own(tmp_path):
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 256,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    plan = plan_export(ExportOptions("hf", config=path, random_seed=0, dtype="float32"))
    load_weights(plan)
    state = plan.model.state_dict()
    rows = random_tensor("model.embed_tokens.weight", torch.Size([64, 256]), torch.float32, 0)
    noise = random_tensor("lm_head.weight", torch.Size([64, 256]), torch.float32, 0)
    assert torch.equal(state["model.embed_tokens.weight"], rows * 16)
    assert torch.equal(state["lm_head.weight"], noise + rows.roll(1, 0))
    # so that a greedy continuation counts upwards
    logits = plan.model(torch.arange(20)[None], use_cache=False, attention_mask=torch.ones(1, 1, 20, 20).tril().bool())
    assert (logits.logits[0].argmax(-1) == torch.arange(1, 21)).float().mean() > 0.9
