"""GPTQ folders: what their tensors become in a program, and folders that are refused."""

from __future__ import annotations

import pytest
import torch
from quantized_folders import change_config, change_tensors, gptq_layer, words, write_folder
from quantized_programs import assert_runs_as_its_weights, formats_of, planned, same_weights

from flashpte.export.common.errors import ExportError
from flashpte.export.weights.stored_codes import unpack_words
from flashpte.kernels.linear.format import unpack_groups

SECTION = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False, "lm_head": False}
UP = "model.layers.1.mlp.up_proj"


def folder(tmp_path, layer=None, dense=("lm_head",), changes=None, **fields):
    section = {**SECTION, **fields}
    if layer is None:
        version = 2 if section.get("checkpoint_format") == "gptq_v2" else 1
        layer = gptq_layer(section["bits"], section["group_size"], bool(section["sym"]), version)
    return tmp_path, write_folder(tmp_path, section, layer, dense, **(changes or {}))


@pytest.mark.parametrize("checkpoint_format", [None, "gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 128), (8, 32), (8, 128), (8, -1), (4, -1)])
def test_each_weight_stands_for_what_gptq_dequantizes(tmp_path, bits, group, sym, checkpoint_format):
    numbers = {"bits": bits, "group_size": group, "sym": sym}
    named = {} if checkpoint_format is None else {"checkpoint_format": checkpoint_format}
    path, meant = folder(tmp_path, **numbers, **named)
    plan = planned(path)
    same_weights(plan, meant)
    size = {(4, -1): "-g128", (8, -1): ""}.get((bits, group), f"-g{group}")
    format = f"int{bits}{size}{'' if sym else '-z'}-f16"
    assert formats_of(plan) == {"float32", format}
    what = "a row" if group == -1 else f"groups of {group}"
    assert f"GPTQ, {bits} bits, {what}: 14 weights as {format} (codes kept)" in plan.weight_notes


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_of_no_whole_tiles(tmp_path, bits):
    path, meant = folder(tmp_path, bits=bits, group_size=-1, changes={"hidden_size": 192})
    same_weights(planned(path), meant)


def test_a_zero_point_of_0_borrows_from_the_next(tmp_path):
    """Words of version 1 are the words of version 2 minus a word of ones."""
    zeros = torch.tensor([0, 5, 0, 0, 15, 1, 8, 0]).repeat(4, 32)
    path, meant = folder(tmp_path)
    held = words(zeros, 4) - 0x11111111
    assert not torch.equal(unpack_words(held, 4), (zeros - 1) % 16)
    change_tensors(path, lambda tensors: tensors.update({f"{UP}.qzeros": held}))
    del meant[f"{UP}.weight"]
    plan = planned(path)
    same_weights(plan, meant)
    layer = plan.model.get_submodule(UP)
    assert torch.equal(unpack_groups(layer.zeros, layer.fmt, torch.int16), zeros.t().short())


@pytest.mark.parametrize("fields", [{"format": "gptq_v2"}, {"format": "GPTQ_V2", "checkpoint_format": "gptq_v2"}])
def test_the_format_has_two_names(tmp_path, fields):
    path, meant = folder(tmp_path, layer=gptq_layer(version=2), **fields)
    same_weights(planned(path), meant)


def test_zero_points_decide_where_the_config_says_nothing(tmp_path):
    path, meant = folder(tmp_path, sym=None, layer=gptq_layer(symmetric=True))
    plan = planned(path)
    same_weights(plan, meant)
    assert formats_of(plan) == {"float32", "int4-g32-f16"}


def test_folders_without_an_index(tmp_path):
    path, meant = folder(tmp_path, layer=gptq_layer(index=False))
    same_weights(planned(path), meant)


def test_an_index_that_follows_the_columns_is_no_act_order(tmp_path):
    path, meant = folder(tmp_path, desc_act=True)
    same_weights(planned(path), meant)


def with_bias(value):
    plain = gptq_layer()

    def make(name, shape):
        tensors, meant = plain(name, shape)
        return {**tensors, "bias": torch.full((shape[0],), value, dtype=torch.float16)}, meant

    return make


def test_a_bias_of_zeros_is_none(tmp_path):
    """AutoGPTQ stores one for each layer."""
    path, meant = folder(tmp_path, layer=with_bias(0.0))
    plan = planned(path)
    same_weights(plan, meant)
    assert not any(weight.name.endswith("bias") for weight in plan.weights)


def test_a_bias_of_the_model_is_read(tmp_path):
    path, meant = folder(tmp_path, layer=with_bias(0.5), changes={"attention_bias": True})
    change_tensors(
        path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "mlp" in name and "bias" in name]
    )
    plan = planned(path)
    same_weights(plan, {name: tensor for name, tensor in meant.items() if "bias" not in name})
    assert (plan.model.get_submodule("model.layers.0.self_attn.q_proj").bias == 0.5).all()


def test_the_program_computes_with_the_codes(tmp_path):
    assert_runs_as_its_weights(*folder(tmp_path, bits=8, dense=()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 3}, "quantization_config.bits is 3; read are 4, 8"),
        ({"bits": None}, "quantization_config.bits is None; read are 4, 8"),
        ({"group_size": 16}, "quantization_config.group_size is 16; served are 32"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; read are gptq, gptq_v2"),
        ({"format": "marlin"}, "quantization_config.format is 'marlin'; read are gptq, gptq_v2"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "checkpoint_format is 'gptq', but format is 'gptq_v2'"),
        ({"pack_dtype": "int16"}, "quantization_config.pack_dtype is 'int16'; read are int32"),
        ({"is_marlin_format": True}, "is_marlin_format is True; read are False"),
        ({"dynamic": {"-:.*down": {}}}, "quantization_config.dynamic gives layers different numbers"),
        ({"sym": True}, r"tensor \S+qzeros of .* other than 8, but quantization_config.sym is true; is checkpoint_fo"),
        ({"group_size": 384}, r"tensor \S+qweight in .*: its 128 columns are no multiple of the group size 384"),
    ],
)
def test_configs_that_are_refused(tmp_path, fields, message):
    path, _ = folder(tmp_path)
    change_config(path, lambda config: config["quantization_config"].update(fields))
    with pytest.raises(ExportError, match=message) as error:
        planned(path)
    assert "\n" not in str(error.value)


def test_a_symmetric_folder_of_another_version(tmp_path):
    """Zero points of 8 that are read as 9 would shift every weight by a step."""
    path, _ = folder(tmp_path, layer=gptq_layer(symmetric=True, version=2), sym=True)
    with pytest.raises(ExportError, match=r"zero points other than 8, .* is checkpoint_format right"):
        planned(path)


def replaced(part, change):
    return lambda tensors: tensors.update({f"{UP}.{part}": change(tensors[f"{UP}.{part}"])})


ORDER = rf"tensor {UP}\.g_idx of .* gives neighboring columns different groups: act-order is not served"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("g_idx", lambda t: t[torch.randperm(128)]), ORDER),
        (replaced("g_idx", lambda t: torch.where(torch.arange(128) == 31, 1, t)), ORDER),
        (replaced("g_idx", lambda t: t[:5]), rf"{UP}\.g_idx in .* has shape \[5\], the config asks for \[128\]"),
        (lambda tensors: tensors.pop(f"{UP}.scales"), rf"has no tensor {UP}\.scales"),
        (lambda tensors: tensors.pop(f"{UP}.qzeros"), rf"has no tensor {UP}\.qzeros \(I32 \[4, 32\]\)"),
        (lambda tensors: tensors.pop(f"{UP}.qweight"), rf"has no tensor {UP}\.qweight \(I32 \[16, 256\]\)"),
        (replaced("qweight", lambda t: t[:-1]), rf"{UP}\.qweight in .* has shape \[15, 256\]"),
        (replaced("qzeros", lambda t: t.short()), rf"{UP}\.qzeros in .* has dtype I16, must be I32"),
        (
            lambda tensors: tensors.update({f"{UP}.bias": torch.ones(256)}),
            rf"tensor {UP}\.bias of .* is not zero, but the model has no such bias",
        ),
    ],
)
def test_tensors_that_are_refused(tmp_path, change, message):
    path, _ = folder(tmp_path)
    change_tensors(path, change)
    with pytest.raises(ExportError, match=message) as error:
        planned(path)
    assert "\n" not in str(error.value)


def test_act_order_without_an_index(tmp_path):
    path, _ = folder(tmp_path, layer=gptq_layer(index=False), desc_act=True)
    with pytest.raises(ExportError, match=r"has no tensor \S+q_proj\.g_idx .*: quantization_config\.desc_act is true"):
        planned(path)
