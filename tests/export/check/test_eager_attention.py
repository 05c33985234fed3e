"""The model that ``run-model --check`` compares with, if SDPA cannot compute its attention."""

import json

import pytest
import torch

from flashpte.export.check.eager_model import EagerModel, rebuild
from flashpte.export.common.options import ExportOptions
from flashpte.export.pipeline import plan_export

FIELDS = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "max_position_embeddings": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "attn_logit_softcapping": 0.5,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("claims_sdpa", [False, True])  # Gemma 2 does in transformers 5.17, and not in 5.24
@pytest.mark.parametrize("model_type", ["gemma2", "vaultgemma", "gpt_oss", "granite_swa"])
def test_softcaps_and_sinks_have_a_model_to_compare_with(tmp_path, monkeypatch, model_type, claims_sdpa):
    (tmp_path / "config.json").write_text(json.dumps({**FIELDS, "model_type": model_type}))
    plan = plan_export(ExportOptions("hf", config=tmp_path / "config.json", random_seed=0, dtype="float32"))
    monkeypatch.setattr(type(plan.model), "_supports_sdpa", claims_sdpa)
    model = rebuild(json.loads(json.dumps(plan.manifest())), None)
    assert model.config._attn_implementation == "eager"
    tokens = torch.randint(3, 96, (20,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens[None], use_cache=False).logits[0]
    found = EagerModel(model, "cpu").evaluate(tokens.tolist(), range(20)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
