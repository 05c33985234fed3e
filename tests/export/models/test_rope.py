"""RoPE that depends on the length: an export has transformers' frequencies for a sequence of its own length."""

import json

import pytest
import torch
from sessions import COMMON, LENGTH, TOLERANCE, VERIFY, reference_model, run_session

from flashpte.export.common.options import ExportOptions
from flashpte.export.models import hugging_face
from flashpte.export.models.build import describe
from flashpte.export.models.rope import FixedRope, fix_rope, longest
from flashpte.export.pipeline import export_programs, plan_export, replace_attention

HALF = COMMON["hidden_size"] // COMMON["num_attention_heads"] // 2
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + i for i in range(HALF)],
    "long_factor": [3.0 + 2 * i for i in range(HALF)],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def config(model_type, rope, **more):
    return {**COMMON, "model_type": model_type, "rope_parameters": dict(rope), **more}


def planned(tmp_path, fields, length, **more):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return plan_export(ExportOptions("hf", config=tmp_path / "config.json", max_seq_len=length, **more))


def tokens_of(length):
    return torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("fields", "length", "original"),
    [
        (config("llama", DYNAMIC, max_position_embeddings=16), LENGTH, False),  # 44 of 16 x 4 tokens
        (config("llama", DYNAMIC, max_position_embeddings=64), LENGTH, True),
        (config("phi3", LONG, original_max_position_embeddings=40), LENGTH, False),
        (config("phi3", LONG, original_max_position_embeddings=LENGTH), LENGTH, True),
    ],
)
def test_a_session_gives_the_logits_of_a_sequence_as_long_as_the_caches(tmp_path, fields, length, original):
    model = reference_model(fields)
    model.save_pretrained(tmp_path)
    # transformers saves what it needs, so the model that it reads back is the same
    options = ExportOptions(
        "hf", checkpoint=tmp_path, dtype="float32", max_seq_len=length, verify_window=VERIFY, max_prefill_chunk=8
    )
    plan = plan_export(options)
    tokens = tokens_of(length)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    replaced, reports = replace_attention(export_programs(plan))
    assert run_session(replaced, tokens, expected) < TOLERANCE
    assert {route.mask_form for report in reports.values() for route in report.replaced} == {"positions"}
    (fixed,) = plan.rope
    assert (fixed.length, "the original ones" in fixed.note) == (length, original)
    assert fixed.note in plan.model_notes
    assert plan.manifest()["fixed_rope"] == [
        {"kind": fields["rope_parameters"]["rope_type"], "length": length, "original": fixed.original}
    ]


def test_other_lengths_have_other_frequencies():
    model = hugging_face.build(config("phi3", LONG, original_max_position_embeddings=40))
    rotary = model.model.rotary_emb
    assert fix_rope(model, 41) == (FixedRope("longrope", 41, 40),)
    long = rotary.inv_freq.clone()
    assert fix_rope(model, 40) == (FixedRope("longrope", 40, 40),)
    short = rotary.inv_freq.clone()
    assert torch.allclose(short / long, torch.tensor(LONG["long_factor"]) / torch.tensor(LONG["short_factor"]))
    assert fix_rope(model, 41)
    assert torch.equal(rotary.inv_freq, long)
    assert fix_rope(hugging_face.build({**COMMON, "model_type": "llama"}), 41) == ()


def test_dynamic_rope_has_as_many_positions_as_its_factor_gives(tmp_path):
    fields = config("llama", DYNAMIC, max_position_embeddings=16)
    model = hugging_face.build(fields)
    assert longest(model.config) == describe(model).max_positions == 64
    assert planned(tmp_path, fields, 64).max_seq_len == 64
    mixed = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": dict(DYNAMIC)}
    mixed = config("gemma3_text", mixed, max_position_embeddings=16, head_dim=16, sliding_window_pattern=2)
    assert longest(hugging_face.build(mixed).config) == 16  # the other layers were made for no more


def test_rope_of_each_layer_type_is_fixed(tmp_path):
    """Gemma 3 has one RoPE for windows and one for full attention, in one module."""
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": dict(DYNAMIC)}
    fields = config(
        "gemma3_text", rope, max_position_embeddings=48, head_dim=16, sliding_window=8, sliding_window_pattern=2
    )
    plan = planned(tmp_path, fields, 48, random_seed=0)
    # Dynamic RoPE would go on to 192 positions; the layers with windows were made for 48.
    assert plan.rope == (FixedRope("dynamic", 48, 48),)
    rotary = plan.model.model.rotary_emb
    expected = rotary.rope_type
    assert expected == {"sliding_attention": "default", "full_attention": "default"}
    assert len(export_programs(plan)) == 2
