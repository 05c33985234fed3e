"""Hugging Face folders: every naming scheme in use, and every way in which a folder can be broken."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flashpte.export.common.errors import ExportError
from flashpte.export.common.options import ExportOptions
from flashpte.export.pipeline import load_weights, plan_export
from flashpte.export.weights.safetensors import text_name

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
UP = "model.layers.1.mlp.up_proj.weight"


def save_llama(folder, shard_size="50GB", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes})).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model.state_dict()


def load(folder, target="hf", **options):
    plan = plan_export(ExportOptions(target, checkpoint=folder, **{"dtype": "float32", **options}))
    load_weights(plan)
    return plan


def rewrite(folder, change):
    """Loads the folder's only file, lets ``change`` edit the tensors in place, and saves them."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def assert_same(model, saved):
    loaded = model.state_dict()
    assert loaded.keys() <= saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in loaded)


@pytest.mark.parametrize("shard_size", ["50GB", "2KB"])
def test_one_or_many_files(tmp_path, shard_size):
    saved = save_llama(tmp_path, shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "2KB")
    plan = load(tmp_path)
    assert plan.model.state_dict().keys() == saved.keys()
    assert_same(plan.model, saved)
    assert not any(p.requires_grad for p in plan.model.parameters())


def test_weights_are_mapped_and_not_read(tmp_path):
    """A tensor in the file's dtype lies in the mapping, at the address of a page of the file."""
    save_llama(tmp_path)
    plan = load(tmp_path)
    address = plan.model.get_parameter(UP).data_ptr()
    with open("/proc/self/maps") as maps:
        lines = [line.split() for line in maps if "model.safetensors" in line]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    assert any(low <= address < high for low, high in ranges)


def test_cast_to_the_asked_dtype(tmp_path):
    saved = save_llama(tmp_path)
    loaded = load(tmp_path, dtype="bfloat16").model.state_dict()
    assert torch.equal(loaded[UP], saved[UP].bfloat16())
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}


def test_cut_layers_are_not_asked_for(tmp_path):
    saved = save_llama(tmp_path)
    plan = load(tmp_path, layers=2)
    assert (len(plan.facts.states), plan.total_layers) == (2, 3)
    assert_same(plan.model, saved)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    load(tmp_path, layers=2)
    with pytest.raises(ExportError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        load(tmp_path)


def test_tied_embedding_has_no_head_of_its_own(tmp_path):
    saved = save_llama(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    plan = load(tmp_path)
    hidden = torch.randn(2, 16)
    torch.testing.assert_close(plan.model.lm_head(hidden), hidden @ saved["model.embed_tokens.weight"].T)
    assert "lm_head.weight" not in plan.model.state_dict()


def test_tied_embedding_stored_twice(tmp_path):
    save_llama(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(tmp_path)
    rewrite(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ExportError, match=r"lm_head\.weight.*tie_word_embeddings"):
        load(tmp_path)


def test_missing_head_says_how_to_tie_it(tmp_path):
    save_llama(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ExportError, match=r"no tensor lm_head\.weight.*tie_word_embeddings"):
        load(tmp_path)


def test_multimodal_gemma4_as_transformers_saves_it(tmp_path):
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": 1,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 8,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "max_position_embeddings": 64,
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16}
    tokens = {"image_token_id": 60, "video_token_id": 61, "audio_token_id": 62}
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **tokens)
    torch.manual_seed(0)
    transformers.Gemma4ForConditionalGeneration(config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert any("vision_tower" in name for name in stored)
    plan = load(tmp_path, "gemma4-31b")
    for name, tensor in plan.model.state_dict().items():
        assert torch.equal(tensor, stored[name.replace("model.", "model.language_model.", 1)]), name


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.vision_tower.encoder.layers.0.mlp.up_proj.weight", None),
        ("vision_tower.patch_embedder.input_proj.weight", None),
        ("model.audio_tower.layers.0.norm_out.weight", None),
        ("model.embed_vision.embedding_projection.weight", None),
        ("model.embed_audio.embedding_projection.weight", None),
        ("multi_modal_projector.mm_input_projection_weight", None),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
    ],
)
def test_names(stored, expected):
    assert text_name(stored) == expected


def wrong_shape(tensors):
    tensors[UP] = torch.zeros(24, 15)


def integer(tensors):
    tensors[UP] = torch.zeros(24, 16, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(UP), rf"no tensor {UP} \(shape \[24, 16\]\)"),
        (lambda t: t.update({"model.layers.1.extra.weight": torch.zeros(1)}), r"model\.layers\.1\.extra\.weight"),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(1)}), r"model\.layers\.3\.mlp"),
        (wrong_shape, rf"{UP} in .*model\.safetensors has shape \[24, 15\].*\[24, 16\]"),
        (integer, rf"{UP} in .*model\.safetensors has dtype I8"),
        (lambda t: t.update({UP.replace("model.", "language_model.model."): t[UP].clone()}), "same weight twice"),
    ],
    ids=["missing", "extra", "layer-too-many", "shape", "dtype", "twice"],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, named):
    save_llama(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ExportError, match=named) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-64])


def break_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def lose_a_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def move_a_tensor(folder):
    first = sorted(folder.glob("*.safetensors"))[0].name
    break_index(folder, lambda weight_map: weight_map.update({UP: first}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: truncate(sorted(f.glob("*.safetensors"))[1]), "model-00002-of-.* is truncated"),
        (lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes(b"not it"), "model-00001-of-.* is truncated or not"),
        (lose_a_shard, r"names model-00002-of-.*, which .* does not have"),
        (move_a_tensor, rf"puts tensor {UP} into model-00001-of"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json is not valid JSON"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json has no weight_map"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "neither model.safetensors nor"),
        (lambda f: (f / "config.json").write_text("{]"), "config.json is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "generation_config.json").write_text("x"), "generation_config.json is not valid JSON"),
    ],
    ids=[
        "truncated",
        "not-safetensors",
        "shard-missing",
        "index-wrong",
        "index-json",
        "index-empty",
        "no-weights",
        "config-json",
        "config-list",
        "no-config",
        "generation-config",
    ],
)
def test_broken_folders_are_named(tmp_path, damage, named):
    save_llama(tmp_path, "2KB")
    damage(tmp_path)
    with pytest.raises(ExportError, match=named) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "model_type", "named"),
    [
        ("hf", "t5", "no causal language model of model_type 't5'$"),
        ("hf", "gemma4", "use target=gemma4-31b"),
        ("gemma4-31b", "llama", "use target=hf"),
        ("hf", None, "model_type None"),
    ],
)
def test_model_type_of_another_target(tmp_path, target, model_type, named):
    save_llama(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": model_type}))
    with pytest.raises(ExportError, match=named):
        load(tmp_path, target)


def test_token_ids_of_the_generation_config_win(tmp_path):
    save_llama(tmp_path, bos_token_id=5, eos_token_id=6)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    facts = load(tmp_path).facts
    assert (facts.bos_id, facts.eos_ids) == (5, (7, 8))
    (tmp_path / "generation_config.json").unlink()
    assert load(tmp_path).facts.eos_ids == (6,)


def test_tokenizer_files_are_found(tmp_path):
    save_llama(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"):
        (tmp_path / name).write_text("{}")
    names = {path.name for path in load(tmp_path).extra_files}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
