"""AWQ folders: what their tensors become in a program, and folders that are refused."""

from __future__ import annotations

import pytest
import torch
from quantized_folders import awq_layer, change_config, change_tensors, write_folder
from quantized_programs import assert_runs_as_its_weights, formats_of, planned, same_weights

from flashpte.export.common.errors import ExportError, UsageError
from flashpte.export.common.options import ExportOptions
from flashpte.export.pipeline import plan_export

SECTION = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}
UP = "model.layers.1.mlp.up_proj"


def folder(tmp_path, section=None, layer=None, **options):
    section = {**SECTION, **(section or {})}
    return tmp_path, write_folder(tmp_path, section, layer or awq_layer(section["group_size"]), **options)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_each_weight_stands_for_what_awq_dequantizes(tmp_path, group):
    path, meant = folder(tmp_path, {"group_size": group})
    plan = planned(path)
    same_weights(plan, meant)
    assert formats_of(plan) == {"float32", f"int4-g{group}-z-f16"}
    assert f"AWQ, 4 bits, groups of {group}: 14 weights as int4-g{group}-z-f16 (codes kept)" in plan.weight_notes
    assert "F16: 7 weights as dense" in plan.weight_notes


@pytest.mark.parametrize(("group", "hidden"), [(-1, 128), (-1, 192), (256, 256)])
def test_larger_groups_repeat_their_scales(tmp_path, group, hidden):
    changes = {"hidden_size": hidden, "head_dim": 64}
    path, meant = folder(tmp_path, {"group_size": group}, **changes)
    plan = planned(path)
    same_weights(plan, meant)
    assert formats_of(plan) == {"float32", "int4-g128-z-f16"}


@pytest.mark.parametrize("zero_point", [True, False])
def test_zero_points_of_8_are_symmetric(tmp_path, zero_point):
    path, meant = folder(tmp_path, {"zero_point": zero_point}, awq_layer(symmetric=True))
    plan = planned(path)
    same_weights(plan, meant)
    assert formats_of(plan) == {"float32", "int4-g32-f16"}


def test_each_weight_decides_for_itself(tmp_path):
    plain, even = awq_layer(), awq_layer(symmetric=True)
    path, meant = folder(tmp_path, layer=lambda name, shape: (even if "up_proj" in name else plain)(name, shape))
    plan = planned(path)
    same_weights(plan, meant)
    held = {weight.name: weight.format for weight in plan.weights}
    assert held[f"{UP}.weight"] == "int4-g32-f16"
    assert held[f"{UP.replace('up', 'gate')}.weight"] == "int4-g32-z-f16"


@pytest.mark.parametrize(("dtype", "end"), [(torch.bfloat16, ""), (torch.float32, "-f32")])
def test_scales_keep_their_dtype(tmp_path, dtype, end):
    path, meant = folder(tmp_path, layer=awq_layer(dtype=dtype))
    plan = planned(path)
    same_weights(plan, meant)
    assert formats_of(plan) == {"float32", f"int4-g32-z{end}"}


def test_a_quantized_head_and_layers_that_are_not(tmp_path):
    path, meant = folder(tmp_path, {"modules_to_not_convert": ["v_proj", "gate"]}, dense=("v_proj",))
    plan = planned(path)
    same_weights(plan, meant)
    held = {weight.name: weight.format for weight in plan.weights}
    assert (held["lm_head.weight"], held["model.layers.0.self_attn.v_proj.weight"]) == ("int4-g32-z-f16", "float32")


def test_the_program_computes_with_the_codes(tmp_path):
    assert_runs_as_its_weights(*folder(tmp_path))


def test_cut_layers_are_ignored(tmp_path):
    path, meant = folder(tmp_path)
    plan = planned(path, layers=1)
    assert not any(".layers.1." in weight.name for weight in plan.weights)
    same_weights(plan, {name: tensor for name, tensor in meant.items() if ".layers.1." not in name})


def test_it_is_not_quantized_again(tmp_path):
    with pytest.raises(UsageError, match="qlinear=4w: the weights are quantized already"):
        planned(folder(tmp_path)[0], qlinear="4w")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 3}, "quantization_config.bits is 3; read are 4"),
        ({"version": "gemv"}, "quantization_config.version is 'gemv'; read are gemm"),
        ({"version": None, "format": "gemv"}, "quantization_config.format is 'gemv'; read are gemm"),
        ({"pack_dtype": "int64"}, "quantization_config.pack_dtype is 'int64'; read are int32"),
        ({"dynamic": {"-:.*down": {}}}, "quantization_config.dynamic gives layers different numbers"),
        ({"group_size": 48}, "quantization_config.group_size is 48; served are 32, 64, multiples of 128"),
        ({"group_size": None}, "quantization_config.group_size is None, must be a number of columns"),
        ({"group_size": True}, "quantization_config.group_size is True, must be a number of columns"),
        ({"zero_point": 1}, "quantization_config.zero_point is 1; read are True, False"),
        ({"zero_point": False}, r"tensor model\S*qzeros of .* holds zero points other than 8, but .*zero_point is f"),
        ({"modules_to_not_convert": ["up_proj"]}, r"names up_proj, but the folder quantizes model\.layers\.0\.mlp\.up"),
        ({"modules_to_not_convert": "up_proj"}, "modules_to_not_convert is 'up_proj', must be a list of names"),
        ({"quant_method": "eetq"}, "config.json: quantization_config.quant_method is 'eetq'; read are awq, gptq"),
        ({"quant_method": None}, "quantization_config.quant_method is None"),
        ({"group_size": 384}, r"tensor model\.\S+qweight in .*: its 128 columns are no multiple of the group size 384"),
    ],
)
def test_configs_that_are_refused(tmp_path, fields, message):
    path, _ = folder(tmp_path)
    change_config(path, lambda config: config["quantization_config"].update(fields))
    with pytest.raises(ExportError, match=message) as error:
        planned(path)
    assert "\n" not in str(error.value)


def test_a_section_that_is_no_object(tmp_path):
    path, _ = folder(tmp_path)
    change_config(path, lambda config: config.update(quantization_config="awq"))
    with pytest.raises(ExportError, match=r"config\.json: quantization_config is a str, not an object"):
        planned(path)


def test_a_config_without_its_folder(tmp_path):
    path, _ = folder(tmp_path)
    message = r"names a quantized checkpoint \(awq\), which is read as a whole folder: give it to checkpoint"
    with pytest.raises(ExportError, match=message):
        plan_export(ExportOptions("hf", config=path / "config.json", random_seed=0))


@pytest.mark.parametrize("section", [None, {}])
def test_an_empty_section_is_none(tmp_path, section):
    path, meant = folder(tmp_path, dense=("proj", "lm_head"))
    change_config(path, lambda config: config.update(quantization_config=section))
    same_weights(planned(path), meant)


def replaced(part, change):
    return lambda tensors: tensors.update({f"{UP}.{part}": change(tensors[f"{UP}.{part}"])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{UP}.scales"), rf"has no tensor {UP}\.scales \(F16 or .* which {UP}\.qweight"),
        (lambda tensors: tensors.pop(f"{UP}.qzeros"), rf"has no tensor {UP}\.qzeros \(I32 \[4, 32\]\)"),
        (lambda tensors: tensors.pop(f"{UP}.qweight"), rf"has no tensor {UP}\.qweight \(I32 \[128, 32\]\)"),
        (replaced("qweight", lambda t: t[:-1]), rf"{UP}\.qweight in .* has shape \[127, 32\], .* asks for \[128, 32\]"),
        (replaced("qweight", lambda t: t.long()), rf"{UP}\.qweight in .* has dtype I64, must be I32"),
        (replaced("scales", lambda t: t[:2]), rf"{UP}\.scales in .* has shape \[2, 256\], .* asks for \[4, 256\]"),
        (replaced("scales", lambda t: t.double()), rf"{UP}\.scales in .* has dtype F64, must be F16 or BF16 or F32"),
        (replaced("qzeros", lambda t: t[:, 1:]), rf"{UP}\.qzeros in .* has shape \[4, 31\]"),
        (lambda t: t.update({f"{UP}.weight": torch.zeros(256, 128)}), rf"tensor {UP}\.weight in .* has no place"),
        (lambda t: t.update({"model.norm.qweight": torch.zeros(1)}), r"tensor model\.norm\.qweight in .* has no place"),
    ],
)
def test_tensors_that_are_refused(tmp_path, change, message):
    path, _ = folder(tmp_path)
    change_tensors(path, change)
    with pytest.raises(ExportError, match=message) as error:
        planned(path)
    assert "\n" not in str(error.value)


def test_a_scale_that_is_not_a_number(tmp_path):
    path, meant = folder(tmp_path)
    change_tensors(path, lambda tensors: tensors[f"{UP}.scales"].view(-1)[5].fill_(float("nan")))
    with pytest.raises(ExportError, match=rf"{UP}\.weight has scales that are infinite or NaN"):
        same_weights(planned(path), meant)
