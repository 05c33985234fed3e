"""GGUF files: config, weights and tokenizer of a model, what they become in a program, and files that are refused."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
import transformers
from eager_program import EagerProgram
from gguf_files import GEMMA3, LLAMA, QWEN3, llama3_factors, write_gguf
from tokenizers import pre_tokenizers

from flashpte.export.check.check_program import check_program, named_weights
from flashpte.export.check.eager_model import dense_model, eager_pair, rebuild, why_no_dense_model
from flashpte.export.common.errors import ExportError, UsageError
from flashpte.export.common.options import ExportOptions
from flashpte.export.models.gemma4 import GEMMA4_SMALL
from flashpte.export.models.registry import get_target
from flashpte.export.pipeline import export_programs, load_weights, plan_export
from flashpte.export.weights.gguf_config import config_fields
from flashpte.export.weights.gguf_file import GgufFile
from flashpte.export.weights.quantized import QuantizedLinear

MIXED = {
    "blk.1.ffn_down": "Q6_K",
    "attn_q.weight": "Q4_0",
    "attn_k.weight": "Q4_K",
    "attn_v": "Q8_0",
    "attn_output": "BF16",
    "ffn_gate": "Q4_1",
    "ffn_up": "Q5_K",
    "ffn_down": "Q4_K",
    "token_embd": "Q5_0",
    "output.weight": "Q8_0",
}
FORMATS = {
    "Q4_0": "int4-g32-f16",
    "Q4_1": "int4-g32-o-f16",
    "Q4_K": "int4-g32-o-f32",
    "Q5_K": "int8-g32-o-f32",
    "Q8_0": "int8-g32-f16",
    "Q6_K": "int8-g32",
}


def planned(path, target="hf", **options):
    return plan_export(ExportOptions(target, gguf_file=path, dtype="float32", max_seq_len=64, **options))


@pytest.fixture
def mixed(tmp_path):
    """A Llama file of many types, and its weights."""
    path = tmp_path / "mixed.gguf"
    return path, write_gguf(path, LLAMA, MIXED)


def weight_of(model, name):
    owner = model.get_submodule(name.rpartition(".")[0])
    return owner.dequantized() if isinstance(owner, QuantizedLinear) else model.get_parameter(name)


def test_each_weight_stands_for_what_gguf_dequantizes(mixed):
    path, held = mixed
    plan = planned(path)
    load_weights(plan)
    for name, expected in held.items():
        if name == "model.layers.1.mlp.down_proj.weight":
            assert (weight_of(plan.model, name) - expected).norm() < 0.006 * expected.norm()
        else:
            assert torch.equal(weight_of(plan.model, name), expected), name
    found = {weight.name: weight.format for weight in plan.weights}
    assert found["model.embed_tokens.weight"] == found["model.layers.0.self_attn.o_proj.weight"] == "float32"
    assert found["model.layers.0.self_attn.q_proj.weight"] == FORMATS["Q4_0"]
    assert found["model.layers.2.self_attn.k_proj.weight"] == found["model.layers.0.mlp.down_proj.weight"]
    assert found["model.layers.0.mlp.down_proj.weight"] == FORMATS["Q4_K"]
    assert found["model.layers.1.mlp.down_proj.weight"] == FORMATS["Q6_K"]
    assert found["lm_head.weight"] == FORMATS["Q8_0"]
    assert "Q4_K: 5 weights as int4-g32-o-f32 (codes kept)" in plan.weight_notes
    assert any(note.startswith("Q6_K: 1 weight as int8-g32 (rounded") for note in plan.weight_notes)


def test_logits_are_those_of_the_dequantized_model(tmp_path):
    held = write_gguf(tmp_path / "a.gguf", LLAMA, {**MIXED, "blk.1.ffn_down": "Q5_1"})
    plan = planned(tmp_path / "a.gguf")
    load_weights(plan)
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    reference.load_state_dict(held)
    plan.model.set_attn_implementation("sdpa")
    reference.set_attn_implementation("sdpa")
    ids = torch.tensor([[1, 7, 3, 90, 15]])
    with torch.no_grad():
        found, expected = (model(input_ids=ids, use_cache=False).logits for model in (plan.model, reference))
    assert torch.equal(found, expected)


def checked(plan, path, change=lambda weights: None):
    manifest = json.loads(json.dumps(plan.manifest()))
    model = rebuild(manifest, None, path)
    weights = {name: tensor.clone() for name, tensor in named_weights(plan.model).items()}
    change(weights)
    own, reference = eager_pair(model)
    dense = why_no_dense_model(None, path) or (lambda: dense_model(manifest, None, path, reference))
    given = {"weights": weights, "model_weights": named_weights(model), "dense": dense}
    return check_program(EagerProgram(plan), own, reference, **given)


def test_check_rebuilds_the_model_from_the_file(mixed):
    plan = planned(mixed[0], layers=2)
    load_weights(plan)
    report = checked(plan, mixed[0])
    assert report.passed, report.lines()
    assert report.weights_equal == len(plan.model.state_dict())
    assert report.accuracy == "mixed.gguf was quantized already"
    name = "model.model.layers.1.mlp.up_proj.offsets"
    report = checked(plan, mixed[0], lambda weights: weights[name].view(-1)[7].add_(1))
    assert (report.passed, report.weights_different) == (False, (name,))


def test_a_file_of_dense_weights_can_be_quantized_and_its_check_says_what_that_costs(tmp_path):
    write_gguf(tmp_path / "a.gguf", {**LLAMA, "num_hidden_layers": 1})
    plan = planned(tmp_path / "a.gguf", qlinear="8w", qhead="4w")
    load_weights(plan)
    assert {weight.format for weight in plan.weights} == {"int8", "int4-g32", "float32"}
    report = checked(plan, tmp_path / "a.gguf")
    assert report.passed, report.lines()
    assert 0 < report.accuracy.relative_error < 0.2


def test_a_program_holds_codes_and_calls_the_kernel(mixed):
    plan = planned(mixed[0], layers=1, method="decode")
    program = export_programs(plan)["decode"]
    calls = [node for node in program.graph.nodes if node.target is torch.ops.flashpte.quantized_linear.default]
    assert len(calls) == 7  # all of one layer and the head, but o_proj in BF16
    assert program.state_dict["model.model.layers.0.mlp.gate_proj.offsets"].dtype == torch.float16


def test_check_asks_for_the_file(mixed, tmp_path):
    manifest = planned(mixed[0], layers=1).manifest()
    assert manifest["weights"] == "gguf_file"
    with pytest.raises(ExportError, match="the export of a GGUF file: add gguf_file, the file exported"):
        rebuild(manifest, None)
    with pytest.raises(ExportError, match="this export has the weights of a GGUF file, not those of a checkpoint"):
        rebuild(manifest, tmp_path, mixed[0])
    other = tmp_path / "other.gguf"
    write_gguf(other, {**LLAMA, "rms_norm_eps": 1e-06})
    with pytest.raises(ExportError, match="is not what was exported: rms_norm_eps of its config differs"):
        rebuild(manifest, None, other)


def same_config(config, fields):
    return {name: (value, fields.get(name)) for name, value in config.items() if fields.get(name) != value}


@pytest.mark.parametrize("config", [LLAMA, QWEN3, GEMMA3], ids=lambda config: config["model_type"])
def test_the_config_is_the_one_that_was_written(config, tmp_path):
    write_gguf(tmp_path / "a.gguf", config)
    assert same_config(config, config_fields(GgufFile(tmp_path / "a.gguf"))) == {}
    facts = planned(tmp_path / "a.gguf").facts
    assert (facts.bos_id, facts.eos_ids) == (1, (2, 5))


def test_qwen3_with_a_tied_quantized_embedding(tmp_path):
    held = write_gguf(tmp_path / "a.gguf", QWEN3, {"token_embd": "Q8_0", "attn_q.": "Q4_0", "ffn": "Q4_1"})
    plan = planned(tmp_path / "a.gguf")
    load_weights(plan)
    assert "lm_head.weight" not in plan.model.state_dict()
    for name, expected in held.items():
        assert torch.equal(weight_of(plan.model, name), expected), name


def test_gemma3(tmp_path):
    held = write_gguf(
        tmp_path / "a.gguf", GEMMA3, {"attn_q.": "Q5_0", "ffn_norm": "F32", "ffn": "Q4_K", "token_embd": "Q8_0"}
    )
    plan = planned(tmp_path / "a.gguf")
    load_weights(plan)
    for name, expected in held.items():
        assert torch.equal(weight_of(plan.model, name), expected), name
    reference = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GEMMA3)).eval()
    reference.load_state_dict(held, strict=False)  # the head is the embedding
    plan.model.set_attn_implementation("sdpa")
    reference.set_attn_implementation("sdpa")
    ids = torch.arange(3, 40)[None]  # past the window
    with torch.no_grad():
        found, expected = (model(input_ids=ids, use_cache=False).logits for model in (plan.model, reference))
    assert torch.equal(found, expected)
    report = checked(plan, tmp_path / "a.gguf")
    assert report.passed, report.lines()


@pytest.mark.parametrize(
    ("keys", "changed"),
    [
        ({"gemma3.attention.sliding_window_pattern": 2}, {"layer_types": ["sliding_attention", "full_attention"] * 3}),
        ({"gemma3.final_logit_softcapping": 30.0}, {"final_logit_softcapping": 30.0}),
        (
            {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0, "gemma3.rope.freq_base_swa": 5e3},
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
                }
            },
        ),
    ],
)
def test_fields_that_some_files_of_gemma3_have(tmp_path, keys, changed):
    layers = {"num_hidden_layers": 6, "layer_types": GEMMA3["layer_types"][:6]}
    write_gguf(tmp_path / "a.gguf", {**GEMMA3, **layers}, keys=keys)
    found = config_fields(GgufFile(tmp_path / "a.gguf"))
    assert same_config(changed, found) == {}
    assert get_target("hf").build(found)


def test_the_scale_of_gemma3_27b(tmp_path):
    config = {**GEMMA3, "num_hidden_layers": 62, "intermediate_size": 32, "layer_types": None}
    write_gguf(tmp_path / "a.gguf", config)
    found = config_fields(GgufFile(tmp_path / "a.gguf"))
    assert (found["query_pre_attn_scalar"], found["layer_types"].count("full_attention")) == (256 // 4, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(keys={"gemma3.attn_logit_softcapping": 50.0}), "has gemma3.attn_logit_softcapping, which is not read"),
        (dict(extra={"rope_freqs.weight": np.ones(16, np.float32)}), "has tensor rope_freqs.weight, which is not read"),
        (dict(keys={"gemma3.rope.scaling.type": "yarn"}), r"has gemma3\.rope\.scaling\.type 'yarn'"),
    ],
)
def test_files_of_gemma3_that_are_refused(tmp_path, changes, message):
    write_gguf(tmp_path / "a.gguf", GEMMA3, **changes)
    with pytest.raises(ExportError, match=message):
        planned(tmp_path / "a.gguf")


def test_gemma4(tmp_path):
    built = get_target("gemma4-31b").build(GEMMA4_SMALL).config.to_dict()
    config = {**built, **GEMMA4_SMALL, "bos_token_id": 2, "eos_token_id": [1, 106]}
    held = write_gguf(tmp_path / "a.gguf", config, {"attn_q.": "Q4_K", "ffn": "Q4_0", "token_embd": "Q8_0"})
    plan = planned(tmp_path / "a.gguf", "gemma4-31b")
    found = get_target("gemma4-31b").build(plan.config).config.to_dict()
    assert same_config({**built, "eos_token_id": [1, 106]}, found) == {}
    load_weights(plan)
    for name, expected in held.items():
        stored = plan.model.state_dict()[name] if name.endswith("layer_scalar") else weight_of(plan.model, name)
        assert torch.equal(stored, expected), name


def test_scaled_rope_of_llama_3(tmp_path):
    for factor in (8.0, 32.0):
        factors = llama3_factors(64, 50000.0, factor)
        write_gguf(tmp_path / "a.gguf", LLAMA, extra={"rope_freqs.weight": factors})
        rope = planned(tmp_path / "a.gguf").model.config.rope_parameters
        assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", factor, 50000.0)
    write_gguf(tmp_path / "a.gguf", LLAMA, extra={"rope_freqs.weight": factors * np.float32(1.01)})
    with pytest.raises(ExportError, match=r"tensor rope_freqs\.weight of .* not those of Llama 3"):
        planned(tmp_path / "a.gguf")


def test_linear_rope(tmp_path):
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "a.gguf", LLAMA, keys=keys)
    rope = planned(tmp_path / "a.gguf").model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)


def byte_level_tokenizer(writer):
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "l l"])


def test_the_tokenizer_becomes_files(tmp_path):
    config = {**LLAMA, "vocab_size": 261}
    write_gguf(tmp_path / "a.gguf", config, tokenizer=byte_level_tokenizer)
    plan = planned(tmp_path / "a.gguf")
    assert "tokenizer.json" in plan.manifest()["tokenizer"]
    folder = plan.extra_files[0].parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("hello", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["he", "ll", "o"]
    del plan
    assert not folder.exists()


def test_a_tokenizer_that_cannot_be_converted(tmp_path):
    write_gguf(tmp_path / "a.gguf", LLAMA, tokenizer=lambda writer: writer.add_tokenizer_model("gpt2"))
    with pytest.raises(ExportError, match=r"cannot convert the tokenizer in .*a\.gguf"):
        planned(tmp_path / "a.gguf").manifest()


def test_a_file_without_a_tokenizer(mixed):
    assert planned(mixed[0]).extra_files == ()


def patched(path, name, at, value):
    """Overwrites a number behind a tensor's name: after 4 bytes for the rank come sizes of 8 bytes, then the type."""
    data = bytearray(path.read_bytes())
    place = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + 4
    data[place + at : place + at + len(value)] = value
    path.write_bytes(bytes(data))


UP = "blk.2.ffn_up.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5000]), r"cannot read tensor output\.weight of .*truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:300]), r"mixed\.gguf is truncated or not a GGUF file"),
        (lambda path: path.write_bytes(b""), r"mixed\.gguf is truncated or not a GGUF file"),
        (
            lambda path: path.write_bytes(b"PK\x03\x04" * 99),
            r"mixed\.gguf is truncated or not a GGUF file \(GGUF magic",
        ),
        (
            lambda path: patched(path, UP, 16, struct.pack("<I", 77)),
            r"tensor blk\.2\.ffn_up\.weight of .* has the unknown type 77",
        ),
        (
            lambda path: patched(path, UP, 0, struct.pack("<Q", 250)),
            r"cannot read tensor blk\.2\.ffn_up\.weight of .*250.* is not a multiple of Q5_K block size",
        ),
    ],
)
def test_damaged_files(mixed, damage, message):
    damage(mixed[0])
    with pytest.raises(ExportError, match=message) as error:
        planned(mixed[0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("types", "changes", "message"),
    [
        ({"blk.1.ffn_up": "Q2_K"}, {}, r"tensor blk\.1\.ffn_up\.weight of .* has type Q2_K; read are F32, F16"),
        ({}, dict(skip=["blk.1.ffn_up"]), r"no tensor blk\.1\.ffn_up\.weight, which is model\.layers\.1\.mlp\.up_proj"),
        ({}, dict(skip=["token_embd"]), r"has no tensor token_embd\.weight"),
        (
            {},
            dict(extra={"blk.0.attn_q.bias": np.zeros(256, np.float32)}),
            r"tensor blk\.0\.attn_q\.bias of .* no place",
        ),
        ({}, dict(keys={"llama.expert_count": 8}), r"has experts \(llama\.expert_count\)"),
        ({}, dict(keys={"llama.rope.scaling.type": "yarn"}), r"has llama\.rope\.scaling\.type 'yarn'"),
        ({}, dict(architecture="mamba"), "has the architecture 'mamba'; known: llama, qwen3, gemma3, gemma4"),
        ({}, dict(architecture="qwen3"), "has no qwen3|has no tensor blk.0.attn_q_norm"),
    ],
)
def test_files_that_are_refused(tmp_path, types, changes, message):
    write_gguf(tmp_path / "a.gguf", LLAMA, types, **changes)
    with pytest.raises(ExportError, match=message) as error:
        planned(tmp_path / "a.gguf")
    assert "\n" not in str(error.value)


def test_a_scale_that_is_not_a_number(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, LLAMA, {"blk.0.ffn_up": "Q4_0"})
    tensor = GgufFile(path).tensors["blk.0.ffn_up.weight"].stored
    data = bytearray(path.read_bytes())
    data[tensor.data_offset : tensor.data_offset + 2] = np.float16("inf").tobytes()
    path.write_bytes(bytes(data))
    with pytest.raises(
        ExportError, match=r"model\.layers\.0\.mlp\.up_proj\.weight has scales that are infinite or NaN"
    ):
        load_weights(planned(path))


def test_a_file_of_another_target(mixed):
    with pytest.raises(ExportError, match="model_type 'llama', target gemma4-31b exports gemma4"):
        planned(mixed[0], "gemma4-31b")


def test_quantized_weights_are_not_quantized_again(mixed, tmp_path):
    with pytest.raises(UsageError, match="qlinear=4w: the weights are quantized already"):
        planned(mixed[0], qlinear="4w")
    write_gguf(tmp_path / "dense.gguf", LLAMA, {"ffn": "F16"})
    plan = planned(tmp_path / "dense.gguf", qlinear="4w")
    assert {weight.format for weight in plan.weights} == {"float32", "int4-g32"}
