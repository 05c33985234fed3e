"""Every family that target ``hf`` names as tested gives transformers' own logits, whatever its layers are like."""

import json

import pytest
import torch
from programs import calls
from sessions import COMMON, LENGTH, TOLERANCE, VERIFY, reference_model, run_session

from flashpte.export.common.errors import ExportError
from flashpte.export.common.options import ExportOptions
from flashpte.export.models import hugging_face
from flashpte.export.models.build import decoder_layers
from flashpte.export.models.probe import probe_attention
from flashpte.export.pipeline import export_programs, plan_export, replace_attention
from flashpte.export.state.kv_cache import CHUNKED, FULL, SLIDING

WIDE, WINDOW = {"head_dim": 16}, {"sliding_window": 8}  # a head dim that is not hidden_size / heads
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1}
OWN = {
    "afmoe": {**EXPERTS, **WINDOW},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2},
    "cohere2_moe": {**EXPERTS, **WIDE, **WINDOW},
    "dots1": {**ROUTED_EXPERTS, **WIDE, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "exaone_moe": {**EXPERTS, **WINDOW},
    "flex_olmo": EXPERTS,
    "glm4_moe": {**ROUTED_EXPERTS, "first_k_dense_replace": 1},
    "gpt_oss": {**LOCAL_EXPERTS, **WIDE, **WINDOW},
    "granitemoe": LOCAL_EXPERTS,
    "granitemoeshared": {**LOCAL_EXPERTS, "shared_intermediate_size": 32},
    "hunyuan_v1_moe": {**WIDE, "num_experts": 4, "moe_topk": 2},
    "hy_v3": EXPERTS,
    "llama4_text": {
        **LOCAL_EXPERTS,
        **WIDE,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 8,
        "floor_scale": 6,
        "intermediate_size_mlp": 64,
        "moe_layers": [1, 3],
    },
    "kolibri1": {**EXPERTS, **WINDOW},
    "laguna": EXPERTS,
    "mellum": EXPERTS,
    "minimax_m2": LOCAL_EXPERTS,
    "mixtral": {**LOCAL_EXPERTS, **WINDOW},
    "olmoe": EXPERTS,
    "phimoe": LOCAL_EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": {**EXPERTS, **WIDE, "norm_topk_prob": True},
    "solar_open": ROUTED_EXPERTS,
    "cohere2": {**WIDE, **WINDOW},
    "cwm": {**WIDE, **WINDOW},
    "ernie4_5": WIDE,
    "exaone4": {**WIDE, **WINDOW, "sliding_window_pattern": 4},
    "gemma": WIDE,
    "gemma2": {**WIDE, **WINDOW, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**WIDE, **WINDOW, "sliding_window_pattern": 2},
    "glm": WIDE,
    "glm4": WIDE,
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "granite_swa": WINDOW,
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": WIDE,
    "internlm3": WIDE,
    "iquestcoder": WIDE,
    "ministral": {**WIDE, **WINDOW},
    "ministral3": WIDE,
    "mistral": WINDOW,
    "olmo3": {**WIDE, **WINDOW},
    "phi3": WINDOW,
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": WIDE,
    "seed_oss": WIDE,
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "starcoder2": WINDOW,
    "vaultgemma": {**WIDE, **WINDOW, "attn_logit_softcapping": 2.0},
}
"""Fields of a small config of each family besides those that all share."""

SCORES = {"gemma2": (2.0, False), "gpt_oss": (0.0, True), "granite_swa": (0.0, True), "vaultgemma": (2.0, False)}
"""Families with softcapped scores or sinks: what the report says of both. SDPA has no arguments for them."""


MASKS = {FULL: "causal", SLIDING: "window", CHUNKED: "window"}
"""What the report calls the masks of each kind of layer: a chunk is a window whose start does not move by one."""


def tiny(model_type):
    return {**COMMON, **OWN.get(model_type, {}), "model_type": model_type}


@pytest.mark.parametrize("model_type", hugging_face.TESTED)
def test_a_session_gives_the_logits_of_transformers(tmp_path, model_type):
    model = reference_model(tiny(model_type), "eager" if model_type in SCORES else "sdpa")
    model.save_pretrained(tmp_path)
    options = ExportOptions("hf", checkpoint=tmp_path, dtype="float32", max_seq_len=64, verify_window=VERIFY)
    plan = plan_export(options)
    if plan.facts.window is None:  # several prefill calls, as with a window
        plan = plan_export(ExportOptions(**{**vars(options), "max_prefill_chunk": 8}))
    tokens = torch.randint(3, 96, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    assert expected.std() > 0.05  # the logits differ enough for an error to show (Cohere's are scaled by 1/16)
    replaced, reports = replace_attention(export_programs(plan))
    assert run_session(replaced, tokens, expected) < TOLERANCE * min(1.0, float(expected.std()))
    for method, report in reports.items():
        assert len(report.replaced) == len(plan.facts.states)
        assert not report.declined
        assert {route.mask_form for route in report.replaced} == {"positions"}
        windows = {MASKS[state.mask_name] for state in plan.facts.states}
        assert {route.mask for route in report.replaced} == windows
        scores = {(route.softcap, route.sinks) for route in report.replaced}
        assert scores == {SCORES.get(model_type, (0.0, False))}
        # Keys and values are read where the caches hold them.
        if model_type in SCORES:
            assert {route.key[1] for route in report.replaced} == {COMMON["num_key_value_heads"]}
            assert {route.bytes_copied for route in report.replaced} == {0}
            orders = {tuple(dim for dim in node.args[8] if dim) for node in calls(replaced[method], "flashpte.sdpa_")}
            assert method == "decode" or orders == {(2, 1, 3)}  # the layout that the next view needs; one row has any
            assert not calls(replaced[method], "clone")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "no_such"}, "no causal language model of model_type 'no_such'"),
        ({"model_type": "bert"}, r"bert.*self \(BertSelfAttention\) is not causal"),
        ({"model_type": "qwen3_next"}, "layers of type linear_attention"),
        ({"model_type": "deepseek_v3", "first_k_dense_replace": 4}, "values of 128 elements and keys of 192"),
        ({"model_type": "diffllama"}, "second attention of its layer"),
        ({"model_type": "bloom"}, "Bloom"),
        ({"model_type": "mamba"}, "Mamba"),
        ({"model_type": "t5"}, "no causal language model of model_type 't5'"),
    ],
)
def test_what_cannot_be_served_is_named(tmp_path, fields, reason):
    (tmp_path / "config.json").write_text(json.dumps({**COMMON, **fields}))
    with pytest.raises(ExportError, match=reason) as error:
        plan_export(ExportOptions("hf", config=tmp_path / "config.json", random_seed=0))
    assert "\n" not in str(error.value)


def test_a_model_that_no_test_compares_is_said_to_be_one(tmp_path):
    def notes(model_type):
        (tmp_path / "config.json").write_text(json.dumps(tiny(model_type)))
        return plan_export(ExportOptions("hf", config=tmp_path / "config.json", random_seed=0)).model_notes

    assert notes("llama") == ()
    assert notes("moshi") == (
        "no test compares moshi with transformers; run-model --check compares this export on a GPU",
    )


def test_a_type_of_layer_that_its_window_contradicts():
    model = hugging_face.build({**tiny("cohere2")})
    model.config.layer_types = ["full_attention", *["sliding_attention"] * 3]
    with pytest.raises(ExportError, match=r"layer 0 of Cohere2ForCausalLM is of type full_attention, .* window of 8"):
        probe_attention(model, decoder_layers(model))
