"""Options that quantize: which weights get which format, and what a program then holds."""

from __future__ import annotations

import json
import re

import pytest
import torch

from flashpte.export.common.errors import ExportError, UsageError
from flashpte.export.common.options import ExportOptions, check_options
from flashpte.export.models.build import is_tied
from flashpte.export.pipeline.plan import plan_export
from flashpte.export.pipeline.programs import export_programs, load_weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def plan(**options):
    return plan_export(ExportOptions("gemma4-31b", small=True, random_seed=0, **options))


def formats(**options):
    return {weight.name: weight.format for weight in plan(**options).weights}


@pytest.mark.parametrize(
    ("options", "format"),
    [
        ({"qlinear": "4w"}, "int4-g32"),
        ({"qlinear": "4w", "qlinear_group_size": 128}, "int4-g128"),
        ({"qlinear": "8w"}, "int8"),
        ({"qlinear": "8w", "qlinear_group_size": 64}, "int8-g64"),
    ],
)
def test_linear_layers_of_all_decoder_layers(options, format):
    planned = plan(**options)
    chosen = {weight.name: weight.format for weight in planned.weights}
    for name, found in chosen.items():
        linear = re.fullmatch(r"model\.layers\.\d\.(self_attn|mlp)\.\w+_proj\.weight", name)
        assert found == (format if linear else "bfloat16"), name
    # The sixth layer is a full one, which computes its values from its keys.
    assert sum(found == format for found in chosen.values()) == 41
    assert planned.manifest()["weight_formats"]["default"] == "bfloat16"


def test_without_the_option_nothing_changes():
    assert {weight.format for weight in plan().weights} == {"bfloat16"}


def test_programs_hold_codes_and_share_them():
    programs = export_programs(plan(qlinear="4w", method="decode"))
    (program,) = programs.values()
    calls = [node for node in program.graph.nodes if node.target is torch.ops.flashpte.quantized_linear.default]
    assert len(calls) == 41
    dense = {name for name, tensor in program.state_dict.items() if tensor.is_floating_point() and tensor.dim() == 2}
    assert dense == {"model.model.embed_tokens.weight"}


def test_a_tied_head_gets_its_own_copy():
    assert formats(qhead="4w") == {**formats(), HEAD: "int4-g32"}
    planned, dense = plan(qhead="8w", layers=1), plan(layers=1)
    for one in (planned, dense):
        load_weights(one)
    weight = dense.model.get_input_embeddings().weight
    assert torch.equal(planned.model.get_input_embeddings().weight, weight)
    assert not is_tied(planned.model)
    assert (planned.model.lm_head.dequantized() - weight.float()).norm() < 0.01 * weight.float().norm()


@pytest.mark.parametrize("both", [{}, {"qhead": "8w"}])
def test_a_tied_head_follows_the_embedding(both):
    planned = plan(qembedding="8w", layers=1, method="decode", **both)
    assert {weight.name: weight.format for weight in planned.weights if weight.format != "bfloat16"} == {
        EMBEDDING: "int8"
    }
    (program,) = export_programs(planned).values()
    calls = {str(node.target): node for node in program.graph.nodes if "flashpte" in str(node.target)}
    assert len(calls) == 2
    table = calls["flashpte.quantized_embedding.default"].args[1]
    assert calls["flashpte.quantized_linear.default"].args[1] is table
    assert not {f"model.{EMBEDDING}", f"model.{HEAD}", "model.lm_head.packed"} & program.state_dict.keys()


def test_a_head_of_other_bits_than_its_embedding():
    planned = plan(qembedding="8w", qhead="4w", layers=1, method="decode")
    (program,) = export_programs(planned).values()
    held = {name: tensor.dtype for name, tensor in program.state_dict.items() if name.endswith("packed")}
    assert held == {"model.model.embed_tokens.packed": torch.int8, "model.lm_head.packed": torch.int16}


@pytest.fixture
def untied(tmp_path):
    """A config of a Llama with its own head."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **heads}))
    return tmp_path / "config.json"


def test_an_untied_head_and_embedding_have_their_own_formats(untied):
    def found(**options):
        planned = plan_export(ExportOptions("hf", config=untied, random_seed=0, **options))
        return {weight.name: weight.format for weight in planned.weights}

    dense = found()
    assert found(qhead="4w") == {**dense, HEAD: "int4-g32"}
    assert found(qembedding="4w") == {**dense, EMBEDDING: "int4-g32"}
    wide = {name for name, format in found(qrecipe="sensitive").items() if format == "int8"}
    layers = {int(re.findall(r"\d+", name)[0]) for name in wide if "q_proj" in name}
    assert layers == {0, 1, 38, 39}  # a sixteenth of 40 at each end
    assert {HEAD, EMBEDDING} <= wide


def test_the_default_recipe():
    for name, format in formats(qrecipe="default").items():
        expected = "int8" if name == EMBEDDING else "int4-g32" if "_proj" in name else "bfloat16"
        assert format == expected, name


@pytest.mark.parametrize("kept", [None, 3])
def test_the_sensitive_recipe_does_not_depend_on_the_layers_kept(kept):
    for name, format in formats(qrecipe="sensitive", layers=kept).items():
        wide = re.search(r"layers\.[05]\.", name) or "v_proj" in name or "down_proj" in name
        expected = ("int8" if wide else "int4-g32") if "_proj" in name else "int8" if name == EMBEDDING else "bfloat16"
        assert format == expected, name


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_a_recipe_file(tmp_path, suffix):
    rules = [
        [r"model\.layers\.0\..*", "dense"],
        [r".*\.down_proj\.weight", "int8-g64"],
        [r".*_proj\.weight", "int4-g128"],
        [r"lm_head\.weight", "int8"],
    ]
    path = tmp_path / f"recipe{suffix}"
    listed = ",".join(f"['{pattern}', '{format}']" for pattern, format in rules)
    path.write_text(json.dumps({"rules": rules}) if suffix == ".json" else f"rules = [{listed}]")
    planned = plan(qrecipe=str(path), dtype="float16")
    for weight in planned.weights:
        name, expected = weight.name, "float16"
        if name == HEAD:
            expected = "int8"
        elif "_proj" in name and "layers.0." not in name:
            expected = "int8-g64" if "down_proj" in name else "int4-g128"
        assert weight.format == expected, name
    recorded = planned.manifest()["weight_formats"]["rules"]
    assert recorded == [[pattern, "float16" if format == "dense" else format] for pattern, format in rules]


def test_presets_with_hqq():
    found = formats(qrecipe="default", qalgorithm="hqq")
    assert set(found.values()) == {"int4-g32-hqq", "int8", "bfloat16"}


GOOD = r"['lm_head\.weight', 'int8']"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "rules = [", "a.toml is not valid TOML"),
        ("a.json", "{", "a.json is not valid JSON"),
        ("a.json", "[1]", "a.json holds a list, not an object with rules"),
        ("a.yaml", "", "a.yaml: the name must end in .json or .toml"),
        ("a.toml", "rules = []", "a.toml has no rules"),
        ("a.toml", "", "a.toml has no rules"),
        ("a.toml", f"rules = [{GOOD}]\ndefault = 'int8'", "unknown entry 'default'"),
        ("a.toml", f"rules = [{GOOD}, ['x']]", "a.toml, rule 2: ['x'] is not a pair"),
        ("a.toml", "rules = [['.*norm.*', 'int5']]", "a.toml: unknown weight format 'int5'"),
        ("a.toml", "rules = [['.*_proj', 'int4-g32-o']]", "a.toml, rule 1: int4-g32-o is for codes of quantized files"),
        ("a.toml", "rules = [['(', 'int8']]", "'(' is not a regular expression"),
        ("a.toml", f"rules = [{GOOD}, ['k_proj', 'int8']]", "rule 2: 'k_proj' matches no weight of this model"),
        ("a.toml", f"rules = [{GOOD}, ['lm_.*', 'int8']]", "rule 2: 'lm_.*' is never used: rules before it match lm_"),
        ("a.toml", r"rules = [['.*\.q_norm\.weight', 'int8']]", "self_attn.q_norm.weight: weights of 8 bits are those"),
    ],
)
def test_broken_recipe_files(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ExportError) as error:
        plan(qrecipe=str(tmp_path / name))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_file_that_is_not_there(tmp_path):
    with pytest.raises(ExportError, match=r"cannot read recipe .*a\.json: No such file"):
        plan(qrecipe=str(tmp_path / "a.json"))


def test_a_draft_needs_a_dense_embedding():
    with pytest.raises(ExportError, match="the draft reads the target's embedding, which must stay dense"):
        plan(qembedding="8w", chain=3)
    assert plan(qhead="8w", chain=3).draft is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"qlinear": "5w"}, "qlinear=5w: must be 4w or 8w"),
        ({"qlinear": "4w", "qlinear_group_size": 48}, "qlinear_group_size=48: must be 32, 64 or 128"),
        ({"qlinear_group_size": 32}, "qlinear_group_size belongs to qlinear"),
        ({"qlinear_group_size": 32, "qhead": "4w"}, "qlinear_group_size belongs to qlinear"),
        ({"qhead": "4"}, "qhead=4: must be 4w or 8w"),
        ({"qembedding": "2w"}, "qembedding=2w: must be 4w or 8w"),
        ({"qrecipe": "default", "qlinear": "4w"}, "qrecipe and qlinear cannot be combined"),
        ({"qrecipe": "a.toml", "qhead": "4w"}, "qrecipe and qhead cannot be combined"),
        ({"qalgorithm": "gptq", "qlinear": "4w"}, "qalgorithm=gptq: must be rtn or hqq"),
        ({"qalgorithm": "hqq"}, "qalgorithm=hqq is for weights of 4 bits: add qlinear"),
        ({"qalgorithm": "hqq", "qlinear": "8w"}, "qalgorithm=hqq is for weights of 4 bits: add qlinear"),
        ({"qalgorithm": "hqq", "qrecipe": "a.toml"}, "qalgorithm and a recipe file cannot be combined"),
    ],
)
def test_wrong_options(options, said):
    with pytest.raises(UsageError) as error:
        check_options(ExportOptions("gemma4-31b", **options))
    assert said in str(error.value)
