"""``export-model`` with an EAGLE-3 draft: its methods and flags, and drafts that cannot be exported."""

import json

import pytest
import torch
from drafts import draft_tensors, flat_config, speculators_config, write_draft
from safetensors.torch import load_file, save_file

from flashpte.export.models.gemma4 import GEMMA4_SMALL

SMALL = ("--target", "gemma4-31b", "--small", "--layers", "1", "--random-weights", "-q")
# the draft of the tiny Llama checkpoint, which has 2 layers; the draft taps both
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 40,
}


@pytest.fixture
def draft(tmp_path):
    config = flat_config(**SIZES, draft_vocab_size=20)
    return write_draft(tmp_path / "draft", config, draft_tensors(config, taps=2, target_hidden=16))


def hf(checkpoint, draft, output, *more):
    return ("--target", "hf", "--checkpoint", checkpoint, "--draft", draft, "--output-dir", output, "-q", *more)


def attention_of(program):
    attention = torch.ops.aten.scaled_dot_product_attention.default
    return sum(node.target == attention for node in program.graph.nodes)


def test_a_draft_goes_to_lower(export_model, lowered, checkpoint, draft, output):
    result = export_model(*hf(checkpoint, draft, output, "--chain", "3", "--max-prefill-chunk", "8"))
    assert result.code == 0
    (call,) = lowered
    assert list(call["programs"]) == ["prefill", "target_verify", "draft_decode"]
    assert not any(attention_of(program) for program in call["programs"].values())
    constants, manifest = call["constant_methods"], call["manifest"]
    assert (constants["get_chain_len"], constants["get_verify_window"], constants["get_taps"]) == (3, 4, [1, 2])
    assert (constants["get_min_prefill_chunk"], constants["get_max_prefill_chunk"]) == (2, 8)
    assert (constants["get_feature_size"], constants["get_draft_vocab_size"]) == (16, 20)
    assert "get_draft_decode_logits" not in constants
    assert manifest["draft"]["family"] == "flat"
    assert manifest["routing"]["target_verify"]["nodes"][0]["op"] == "flashpte::sdpa_verify"
    assert manifest["routing"]["draft_decode"]["nodes"][0]["op"] == "flashpte::sdpa_verify"  # at most 8 rows
    assert str(draft) not in json.dumps(manifest)


def test_the_default_chain_a_decode_for_comparison_and_a_cast(export_model, lowered, checkpoint, draft, output):
    assert export_model(*hf(checkpoint, draft, output, "--with-decode", "--dtype", "fp16")).code == 0
    (call,) = lowered
    assert list(call["programs"]) == ["prefill", "decode", "target_verify", "draft_decode"]
    assert call["constant_methods"]["get_chain_len"] == 4
    weights = call["programs"]["draft_decode"].state_dict
    assert {name: tensor.dtype for name, tensor in weights.items() if tensor.dtype != torch.float16} == {
        "draft.d2t": torch.int64
    }


@pytest.mark.parametrize("target", ["gemma4-31b", "hf"])
def test_random_weights_make_a_matching_draft(export_model, lowered, tmp_path, output, target):
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps({"model_type": "llama", **SIZES, "num_hidden_layers": 2, "max_position_embeddings": 64})
    )
    size = SMALL[2:] if target == "gemma4-31b" else ("--config", config, "--random-weights", "-q")
    assert export_model("--target", target, *size, "--chain", "2", "--output-dir", output).code == 0
    (call,) = lowered
    assert list(call["programs"]) == ["prefill", "target_verify", "draft_decode"]
    assert call["manifest"]["draft"]["family"] == "random"
    program = call["programs"]["draft_decode"]
    vocabulary = 512 if target == "gemma4-31b" else 40
    assert len(program.state_dict["draft.d2t"]) == call["constant_methods"]["get_draft_vocab_size"] == vocabulary // 2


def test_a_dry_run_needs_no_weights(export_model, tmp_path):
    result = export_model("--target", "gemma4-31b", "--small", "--layers", "1", "--dry-run", "-q", "--chain", "15")
    assert result.code == 0
    methods = [line for line in result.out.splitlines() if line and line[0].islower()]
    assert methods == ["prefill", "target_verify", "draft_decode"]
    assert not list(tmp_path.iterdir())


def test_no_midm_sdpa_keeps_the_attention_of_target_verify(export_model, lowered, output):
    result = export_model(*SMALL, "--verify-window", "3", "--no-midm-sdpa", "--output-dir", output)
    assert result.code == 0
    (call,) = lowered
    assert {name: attention_of(program) > 0 for name, program in call["programs"].items()} == {
        name: name == "target_verify" for name in call["programs"]
    }
    assert "target_verify" not in call["manifest"]["routing"]
    assert "target_verify: attention was not replaced (--no-midm-sdpa)" in result.out


def test_one_method_of_a_draft(export_model, lowered, output):
    flags = (*SMALL, "--chain", "2", "--method", "draft_decode", "--format", "pt2", "--output-dir", output)
    assert export_model(*flags).code == 0
    assert list(lowered[0]["programs"]) == ["draft_decode"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--chain", "16"), "--chain 16: must be 1..15 (target_verify takes one token more, its kernel 16 rows)"),
        (("--chain", "0"), "--chain 0: must be 1..15"),
        (("--chain", "2", "--verify-window", "3"), "--chain and --verify-window cannot be combined"),
        (("--with-decode",), "--with-decode belongs to --draft"),
        (("--no-midm-sdpa",), "--no-midm-sdpa belongs to target_verify: add --draft DIR or --verify-window M"),
        (("--chain", "2", "--no-midm-sdpa", "--no-replace", "math"), "--no-midm-sdpa and --no-replace cannot be"),
        (("--method", "draft_decode"), "--method draft_decode needs --draft DIR"),
        (("--chain", "2", "--method", "decode"), "--with-decode"),
        (
            ("--chain", "9", "--max-seq-len", "8"),
            "--chain 9 (a target_verify of 10 tokens): must not exceed --max-seq-len 8",
        ),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_exit_2(export_model, output, flags, named):
    result = export_model(*SMALL, *flags, "--output-dir", output)
    assert named in result.error
    assert result.code == 2
    assert not result.out


def test_a_chain_longer_than_the_sliding_window(export_model, tmp_path, output):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**GEMMA4_SMALL, "sliding_window": 8}))
    flags = ("--target", "gemma4-31b", "--config", config, "--random-weights", "-q", "--output-dir", output)
    result = export_model(*flags, "--chain", "8")
    assert "--chain 8 (a target_verify of 9 tokens): must not exceed the model's sliding window of 8" in result.error
    assert result.code == 2


def test_a_checkpoint_gets_no_random_draft(export_model, checkpoint, output):
    flags = ("--target", "hf", "--checkpoint", checkpoint, "--chain", "2", "--output-dir", output)
    result = export_model(*flags)
    assert "--chain needs --draft DIR; only --random-weights makes a random draft" in result.error
    assert result.code == 2


def test_the_draft_is_not_in_the_output_folder(export_model, checkpoint, draft, output):
    result = export_model(*hf(checkpoint, draft, draft.parent))
    assert "is in the --output-dir, which is replaced as a whole" in result.error
    assert result.code == 2


def remove(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def fields(**changes):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def vocabulary_map(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["d2t"] = tensors["d2t"] + 30
    save_file(tensors, folder / "model.safetensors")


def other_target(folder):
    config = speculators_config({**SIZES, "hidden_size": 32}, draft_vocab_size=20)
    remove(folder)
    write_draft(folder, config, draft_tensors(config, taps=2, target_hidden=32))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (remove, "--draft {} does not exist"),
        (lambda folder: (folder / "config.json").unlink(), "--draft {} has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "draft config {}/config.json is not valid JSON"),
        (truncate, "{}/model.safetensors is truncated or not a safetensors file"),
        (other_target, "draft {} was made for a target of hidden size 32, this target has 16"),
        (vocabulary_map, "{}/model.safetensors maps draft token"),
        (
            fields(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 5]}),
            "draft {} taps the output of layer 5; this target has 2 layers",
        ),
        (fields(query_bias=True), "{}/config.json has the field query_bias (True), which is not understood"),
    ],
    ids=["gone", "no-config", "json", "truncated", "hidden-size", "vocabulary", "taps", "flag"],
)
def test_drafts_that_cannot_be_exported_exit_1(export_model, checkpoint, draft, output, damage, named):
    damage(draft)
    result = export_model(*hf(checkpoint, draft, output))
    assert named.format(draft) in result.error
    assert result.code == 1
    assert not result.out
    assert not output.exists()
