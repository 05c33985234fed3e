"""Folders of compressed-tensors: what their tensors become in a program, and folders that are refused."""

from __future__ import annotations

import json

import pytest
import torch
from quantized_folders import change_config, change_tensors, compressed_layer, write_folder
from quantized_programs import assert_runs_as_its_weights, formats_of, planned, same_weights
from safetensors.torch import load_file

from flashpte.export.common.errors import ExportError
from flashpte.export.weights.quantized_folder import without_quantization

UP = "model.layers.1.mlp.up_proj"


def section(bits=4, group=32, symmetric=True, **fields):
    """``quantization_config`` as LLM Compressor writes it."""
    weights = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None if group == -1 else group,
        "num_bits": bits,
        "observer": "minmax",
        "strategy": "channel" if group == -1 else "group",
        "symmetric": symmetric,
        "type": "int",
    }
    scheme = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": scheme},
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        **fields,
    }


def folder(tmp_path, bits=4, group=32, symmetric=True, dtype=torch.bfloat16, dense=("lm_head",), **changes):
    layer = compressed_layer(bits, group, symmetric, dtype)
    return tmp_path, write_folder(tmp_path, section(bits, group, symmetric), layer, dense, **changes)


def suffix(bits, group):
    return {(4, -1): "-g128", (8, -1): ""}.get((bits, group), f"-g{group}")


NUMBERS = [(4, 32), (4, 64), (4, 128), (4, -1), (8, 32), (8, 128), (8, -1)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), NUMBERS)
def test_each_weight_stands_for_what_the_format_dequantizes(tmp_path, bits, group, symmetric):
    path, meant = folder(tmp_path, bits, group, symmetric)
    plan = planned(path)
    same_weights(plan, meant)
    format = f"int{bits}{suffix(bits, group)}{'' if symmetric else '-z'}"
    assert formats_of(plan) == {"float32", format}
    what = "a row" if group == -1 else f"groups of {group}"
    assert f"compressed-tensors, {bits} bits, {what}: 14 weights as {format} (codes kept)" in plan.weight_notes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), NUMBERS)
def test_the_package_compressed_tensors_agrees(tmp_path, bits, group, symmetric):
    pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    path, _ = folder(tmp_path, bits, group, symmetric)
    scheme = QuantizationScheme(**section(bits, group, symmetric)["config_groups"]["group_0"])
    plan = planned(path)
    same_weights(plan, {})
    held = load_file(path / "model.safetensors")
    layers = [name.removesuffix(".weight_packed") for name in held if name.endswith(".weight_packed")]
    for layer in layers:
        state = {name.removeprefix(f"{layer}."): tensor for name, tensor in held.items() if name.startswith(layer)}
        expected = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        assert torch.equal(plan.model.get_submodule(layer).dequantized().to(expected.dtype), expected), layer
    assert len(layers) == 14


@pytest.mark.parametrize(("dtype", "end"), [(torch.float16, "-f16"), (torch.float32, "-f32")])
def test_scales_keep_their_dtype(tmp_path, dtype, end):
    path, meant = folder(tmp_path, dtype=dtype)
    plan = planned(path)
    same_weights(plan, meant)
    assert formats_of(plan) == {"float32", f"int4-g32{end}"}


@pytest.mark.parametrize("bits", [4, 8])
def test_sizes_that_fill_no_word(tmp_path, bits):
    changes = {"intermediate_size": 131, "hidden_size": 130, "num_attention_heads": 2}
    path, meant = folder(tmp_path, bits, -1, False, **changes)
    same_weights(planned(path), meant)


def test_zero_points_of_the_middle_are_symmetric(tmp_path):
    plain = compressed_layer()

    def make(name, shape):
        tensors, meant = plain(name, shape)
        eights = torch.full((shape[0] // 8, shape[1] // 32), -0x77777778, dtype=torch.int32)
        return {**tensors, "weight_zero_point": eights}, meant

    meant = write_folder(tmp_path, section(symmetric=False), make)
    plan = planned(tmp_path)
    same_weights(plan, meant)
    assert formats_of(plan) == {"float32", "int4-g32"}


def test_zero_points_of_old_symmetric_folders(tmp_path):
    plain = compressed_layer()

    def make(name, shape):
        tensors, meant = plain(name, shape)
        return {**tensors, "weight_zero_point": torch.zeros(shape[0], shape[1] // 32, dtype=torch.int8)}, meant

    meant = write_folder(tmp_path, section(), make)
    same_weights(planned(tmp_path), meant)
    change_tensors(tmp_path, lambda tensors: tensors[f"{UP}.weight_zero_point"][3].fill_(1))
    with pytest.raises(ExportError, match=rf"{UP}\.weight_zero_point of .* is not zero, but .* symmetric: true"):
        planned(tmp_path)


def test_schemes_of_several_groups(tmp_path):
    """A name is closer than an expression, which is closer than a class."""
    down, wide = compressed_layer(8, -1, False), compressed_layer(4, 128)
    others = compressed_layer(4, 32)

    def make(name, shape):
        layer = wide if name == UP else down if name.endswith("down_proj") or name == "lm_head" else others
        return layer(name, shape)

    config = section(ignore=["re:.*self_attn.v_proj$", "model.layers.0.self_attn.q_proj"])
    groups = config["config_groups"]
    for index, (numbers, targets) in enumerate(
        [((8, -1, False), ["re:.*down_proj", "lm_head"]), ((4, 128), [UP]), ((4, 32), ["re:.*mlp.up"])]
    ):
        (scheme,) = section(*numbers)["config_groups"].values()
        groups[f"group_{index + 1}"] = {**scheme, "targets": targets, "format": "pack-quantized"}
    dense = ("v_proj", "layers.0.self_attn.q_proj")
    meant = write_folder(tmp_path, {**config, "format": "mixed-precision"}, make, dense)
    with pytest.raises(ExportError, match=r"group_0\.format is 'mixed-precision' here or for the whole folder"):
        planned(tmp_path)
    change_config(tmp_path, lambda fields: fields["quantization_config"].update(format="pack-quantized"))
    plan = planned(tmp_path)
    same_weights(plan, meant)
    held = {weight.name: weight.format for weight in plan.weights}
    assert [held[f"{name}.weight"] for name in (UP, "model.layers.0.mlp.up_proj", "lm_head")] == [
        "int4-g128",
        "int4-g32",
        "int8-z",
    ]
    assert held["model.layers.1.mlp.down_proj.weight"] == "int8-z"
    assert held["model.layers.1.self_attn.v_proj.weight"] == "float32"


def test_the_program_computes_with_the_codes(tmp_path):
    assert_runs_as_its_weights(*folder(tmp_path, symmetric=False))


def weights(**fields):
    return lambda config: config["config_groups"]["group_0"]["weights"].update(fields)


def group(**fields):
    return lambda config: config["config_groups"]["group_0"].update(fields)


W = r"config\.json: quantization_config\.config_groups\.group_0\.weights\."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (weights(num_bits=3), rf"{W}num_bits is 3; read are 4, 8"),
        (weights(type="float"), rf"{W}type is 'float'; read are int"),
        (weights(strategy="tensor"), rf"{W}strategy is 'tensor'; read are group, channel"),
        (weights(strategy="block"), rf"{W}strategy is 'block'"),
        (weights(strategy=None, group_size=None), rf"{W}strategy is None"),
        (weights(group_size=16), rf"{W}group_size is 16; served are 32"),
        (weights(group_size=384), r"weight_packed in .*: its 128 columns are no multiple of the group size 384"),
        (weights(dynamic=True), rf"{W}dynamic is True; read are False"),
        (weights(actorder="group"), rf"{W}actorder is 'group': act-order is not served"),
        (weights(actorder=True), rf"{W}actorder is True: act-order is not served"),
        (weights(symmetric=False), r"has no tensor \S+q_proj\.weight_zero_point .*: symmetric is false"),
        (group(input_activations={"num_bits": 8}), r"group_0\.input_activations quantizes activations"),
        (group(output_activations={"num_bits": 8}), r"group_0\.output_activations quantizes activations"),
        (group(targets=["re:.*mlp.*"]), r"config_groups has no targets that match model\.layers\.0\.self_attn\.q_proj"),
        (group(targets=["re:("]), r"'re:\(' is not a regular expression"),
        (group(targets="Linear"), r"group_0\.targets is 'Linear', must be a list of names"),
        (
            lambda config: config.update(format="naive-quantized"),
            "group_0.format is 'naive-quantized' .*; read is pack",
        ),
        (lambda config: config.update(format="float-quantized"), "group_0.format is 'float-quantized'"),
        (lambda config: config.update(format="nvfp4-pack-quantized"), "group_0.format is 'nvfp4-pack-quantized'"),
        (lambda config: config.update(config_groups={"W4A16": ["Linear"]}), r"config_groups\.W4A16 is .* an object"),
        (lambda config: config.pop("config_groups"), r"quantization_config\.config_groups is None, must be an object"),
        (lambda config: config.update(ignore=["re:.*up_proj"]), r"ignore names model\.layers\.0\.mlp\.up_proj, but"),
        (lambda config: config.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme quantizes the KV cache"),
        (lambda config: config.update(transform_config={"a": 1}), "transform_config transforms weights"),
        (
            lambda config: config.update(sparsity_config={"format": "sparse-24-bitmask"}),
            r"sparsity_config\.format is 'sparse-24-bitmask'; read are dense",
        ),
    ],
)
def test_configs_that_are_refused(tmp_path, change, message):
    path, _ = folder(tmp_path)
    change_config(path, lambda config: change(config["quantization_config"]))
    with pytest.raises(ExportError, match=message) as error:
        planned(path)
    assert "\n" not in str(error.value)


def test_fields_that_change_nothing(tmp_path):
    path, meant = folder(tmp_path)
    fields = {"actorder": "weight", "strategy": None}
    change_config(path, lambda config: weights(**fields)(config["quantization_config"]))
    same_weights(planned(path), meant)


def replaced(part, change):
    return lambda tensors: tensors.update({f"{UP}.{part}": change(tensors[f"{UP}.{part}"])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{UP}.weight_scale"), rf"has no tensor {UP}\.weight_scale \(F16"),
        (lambda tensors: tensors.pop(f"{UP}.weight_packed"), rf"has no tensor {UP}\.weight_packed \(I32 \[256, 16\]\)"),
        (lambda tensors: tensors.pop(f"{UP}.weight_shape"), rf"has no tensor {UP}\.weight_shape"),
        (lambda tensors: tensors.pop(f"{UP}.weight_zero_point"), rf"has no tensor {UP}\.weight_zero_point"),
        (replaced("weight_packed", lambda t: t[1:]), rf"{UP}\.weight_packed in .* has shape \[255, 16\]"),
        (replaced("weight_packed", lambda t: t.byte()), rf"{UP}\.weight_packed in .* has dtype U8, must be I32"),
        (
            replaced("weight_shape", lambda t: t + 1),
            rf"tensor {UP}\.weight_shape of .* says \[257, 129\], .* \[256, 128",
        ),
        (replaced("weight_scale", lambda t: t[:, :1]), rf"{UP}\.weight_scale in .* has shape \[256, 1\]"),
        (replaced("weight_zero_point", lambda t: t[:3]), rf"{UP}\.weight_zero_point in .* has shape \[3, 4\]"),
        (
            lambda tensors: tensors.update({f"{UP}.weight_g_idx": (torch.arange(128) % 4).int()}),
            rf"tensor {UP}\.weight_g_idx of .* different groups: act-order is not served",
        ),
        (
            lambda tensors: tensors.update({f"{UP}.input_scale": torch.ones(1)}),
            rf"tensor {UP}\.input_scale in .* has no place in the model",
        ),
    ],
)
def test_tensors_that_are_refused(tmp_path, change, message):
    path, _ = folder(tmp_path, symmetric=False)
    change_tensors(path, change)
    with pytest.raises(ExportError, match=message) as error:
        planned(path)
    assert "\n" not in str(error.value)


def test_a_multimodal_folder_has_its_text_model_read(tmp_path):
    """Names with the prefixes of a multimodal model, in tensors and in ``ignore``."""
    path, meant = folder(tmp_path)

    def renamed(tensors):
        prefixed = {
            name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: tensor
            for name, tensor in tensors.items()
        }
        tensors.clear()
        tensors |= prefixed

    change_tensors(path, renamed)
    same_weights(planned(path), meant)
    names = ["lm_head", "model.language_model.layers.1.mlp.up_proj"]
    change_config(path, lambda config: config["quantization_config"].update(ignore=names))
    with pytest.raises(ExportError, match=rf"ignore names {UP}, but the folder quantizes it"):
        planned(path)


def test_the_section_is_found_in_the_text_config(tmp_path):
    path, _ = folder(tmp_path)
    config = json.loads((path / "config.json").read_text())
    rest, fields = without_quantization({"text_config": config, "a": 1}, path / "config.json")
    assert (fields.get("format"), rest["a"]) == ("pack-quantized", 1)
    assert "quantization_config" not in rest["text_config"]
    assert "quantization_config" in config
