"""Configs of draft heads that are refused, each with one line that names the field."""

import json

import pytest
import torch
from drafts import HIDDEN, LAYER, VOCAB, draft_tensors, flat_config, speculators_config, write_draft
from safetensors.torch import load_file, save_file

from flashpte.export.common.errors import ExportError, UsageError
from flashpte.export.common.options import ExportOptions
from flashpte.export.models.build import ModelFacts
from flashpte.export.models.eagle3_config import parse_draft_config
from flashpte.export.models.registry import TargetSpec, default_taps
from flashpte.export.pipeline.draft_plan import plan_draft
from flashpte.export.state.kv_cache import attention_state

SPEC = TargetSpec("stub", "", (), build=lambda fields: None)
FACTS = ModelFacts((attention_state(1, 8, None),) * 8, VOCAB, HIDDEN, 128, None, None, ())


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (flat_config(gist_conditioning=False), "has the field gist_conditioning (False), which is not understood"),
        (speculators_config(extra_norm=True), "has the field extra_norm (True), which is not understood"),
        (speculators_config({"qk_clip": 5}), "has the field transformer_layer_config.qk_clip (5)"),
        (flat_config(eagle_config={"surprise": 1}), "has the field eagle_config.surprise (1)"),
        (flat_config(quantization_config={"bits": 4}), "has the field quantization_config"),
        (flat_config(num_hidden_layers=2), "num_hidden_layers is 2; only 1 is implemented"),
        (flat_config(logit_scale=0.5), "logit_scale is 0.5; only 1.0 is implemented"),
        (
            flat_config(eagle_config={"use_last_layernorm": False}),
            "eagle_config.use_last_layernorm is False; only True",
        ),
        (flat_config(eagle_config={"parallel_draft_step": 4}), "eagle_config.parallel_draft_step is 4; only 1"),
        (flat_config(eagle_config=[1]), "eagle_config is a list, not an object"),
        (flat_config(norm_output=1), "norm_output is 1, must be true or false"),
        (
            flat_config(norm_output=False, eagle_config={"norm_output": True}),
            "norm_output and eagle_config.norm_output",
        ),
        (speculators_config(norm_before_residual=None), "does not say norm_before_residual"),
        (speculators_config(fc_norm=True, norm_before_fc=True), "norm_before_fc and fc_norm exclude each other"),
        (speculators_config(speculators_model_type="dflash"), "speculators_model_type is 'dflash'"),
        (speculators_config(speculators_config={"algorithm": "eagle"}), "names the algorithm 'eagle'"),
        (speculators_config({"model_type": "mamba"}), "has model_type 'mamba'; exported are llama, qwen3"),
        (speculators_config(eagle_aux_hidden_state_layer_ids=[1, 1, 2]), "must be a list of different layer numbers"),
        (speculators_config(eagle_aux_hidden_state_layer_ids=[-1, 2]), "must be a list of different layer numbers"),
        (speculators_config(eagle_aux_hidden_state_layer_ids=3), "must be a list of different layer numbers"),
        (
            flat_config(
                eagle_aux_hidden_state_layer_ids=[1, 2], eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2]}
            ),
            "name different layers",
        ),
        (
            flat_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
            "RoPE of type 'dynamic' is not implemented",
        ),
        (flat_config(rope_scaling={"type": "mrope"}), "RoPE of type 'mrope' is not implemented"),
        (speculators_config({"rope_parameters": {"full_attention": {}}}), "differs between kinds of layers"),
        (speculators_config({"rope_parameters": {"partial_rotary_factor": 0.5}}), "partial_rotary_factor is not 1"),
        (flat_config(sliding_window=8, use_sliding_window=True), "sliding_window is 8, but neither layer_types nor"),
        (speculators_config({"layer_types": ["sliding_attention"]}), "there is no sliding_window"),
        (speculators_config({"layer_types": ["linear_attention"]}), "layer_types is ['linear_attention']"),
        (flat_config(draft_vocab_size=0), "draft_vocab_size is 0, must be a whole number"),
        (flat_config(draft_vocab_size=None, vocab_size=None), "has neither draft_vocab_size nor vocab_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, config, named):
    path = tmp_path / "config.json"
    with pytest.raises(ExportError) as error:
        parse_draft_config(config, path)
    assert str(path) in str(error.value)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_no_layers_to_tap_means_the_targets_default():
    for nested in ({}, {"eagle_aux_hidden_state_layer_ids": []}):
        assert parse_draft_config(flat_config(eagle_config=nested), None).taps is None


def test_a_window_that_is_switched_off():
    config = flat_config(sliding_window=512, use_sliding_window=False)
    assert parse_draft_config(config, None).window is None


def change(**fields):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def replace(**tensors):
    def damage(folder):
        path = folder / "model.safetensors"
        stored = load_file(path)
        for name, tensor in tensors.items():
            name = name.replace("__", ".")
            if tensor is None:
                del stored[name]
            else:
                stored[name] = tensor(stored.get(name)).contiguous()
        save_file(stored, path)

    return damage


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def lose(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (change(target_hidden_size=64), "was made for a target of hidden size 64, this target has 48"),
        (change(vocab_size=100), "was made for a vocabulary of 100 tokens, this target has 96"),
        (
            change(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 3, 8]}),
            "taps the output of layer 8; this target has 8 layers (0..7)",
        ),
        (change(intermediate_size=72), "has shape [64, 48], the draft's config and the target ask for [72, 48]"),
        (change(num_key_value_heads=3), "4 attention heads, must be a multiple of its 3 key heads"),
        (change(hidden_act="sqrelu"), "'sqrelu'"),
        (change(head_dim=0), "head_dim is 0, must be a whole number of at least 1"),
        (change(fc_norm=True), "has no tensor fc_norm.0.weight (shape [48])"),
        (change(draft_vocab_size=41), "must be I64 [41]"),
        (truncate, "is truncated or not a safetensors file"),
        (lose("model.safetensors"), "only safetensors are read"),
        (lose("config.json"), "has no config.json: give the folder of an EAGLE-3 draft head"),
        (replace(d2t=lambda t: t + 60), "maps draft token"),
        (replace(d2t=lambda t: t - 5), "outside of the target's vocabulary of 96"),
        (replace(d2t=lambda t: torch.arange(96)[:40] // 2 - torch.arange(40), t2d=None), "two draft tokens to one"),
        (replace(d2t=lambda t: t.float()), "tensor d2t in"),
        (replace(d2t=None), "has no tensor d2t, which a draft vocabulary of 40 of 96 tokens needs"),
        (replace(t2d=lambda t: ~t), "does not mark the target tokens that d2t leads to"),
        (replace(lm_head__weight=None), "has no tensor lm_head.weight, and its config does not tie one"),
        (replace(midlayer__hidden_norm__weight=None), "has no tensor midlayer.hidden_norm.weight"),
        (replace(fc__weight=lambda t: t[:, :96]), "tensor fc.weight in"),
        (replace(fc__weight=lambda t: t.to(torch.int8)), "has dtype I8; only floats are read"),
        (replace(fc__bias=lambda t: torch.zeros(48)), "tensor fc.bias in"),
        (replace(embed_tokens__weight=lambda t: torch.zeros(64, 48)), "tensor embed_tokens.weight in"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_drafts_that_do_not_fit(tmp_path, damage, named):
    config = flat_config()
    folder = write_draft(tmp_path / "draft", config, draft_tensors(config))
    plan_draft(ExportOptions("stub", draft=folder), SPEC, FACTS)
    damage(folder)
    with pytest.raises(ExportError) as error:
        plan_draft(ExportOptions("stub", draft=folder), SPEC, FACTS)
    assert named in str(error.value)
    assert not isinstance(error.value, UsageError)
    assert "\n" not in str(error.value)


def test_another_hidden_size_needs_an_embedding_of_its_own(tmp_path):
    config = flat_config(hidden_size=32, head_dim=8, target_hidden_size=HIDDEN)
    folder = write_draft(tmp_path, config, draft_tensors(config))
    with pytest.raises(ExportError, match=r"has no tensor embed_tokens\.weight, and the target's embedding has 48"):
        plan_draft(ExportOptions("stub", draft=folder), SPEC, FACTS)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"chain": 16, "random_seed": 0}, r"chain=16: must be 1..15 \(target_verify takes one token more"),
        ({"chain": 0, "random_seed": 0}, "chain=0: must be 1..15"),
        ({"with_decode": True}, "with_decode belongs to draft"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, named):
    with pytest.raises(UsageError, match=named):
        plan_draft(ExportOptions("stub", **options), SPEC, FACTS)


def test_default_taps_are_different_and_in_range():
    assert default_taps(60) == (2, 30, 57)
    for layers in range(1, 100):
        taps = default_taps(layers)
        assert list(taps) == sorted(set(taps))
        assert 1 <= taps[0] <= taps[-1] <= layers
        assert len(taps) == min(3, layers)


def test_sizes_left_out_have_the_layers_defaults(tmp_path):
    """speculators writes only fields that differ from the defaults of the layer's config class."""
    layer = {name: value for name, value in LAYER.items() if name not in ("num_key_value_heads", "hidden_act")}
    config = speculators_config()
    config["transformer_layer_config"] = layer
    parsed = parse_draft_config(config, tmp_path)
    assert "num_key_value_heads" not in parsed.layer
    from flashpte.export.models.eagle3 import layer_config

    assert layer_config(parsed).num_key_value_heads == 4
