"""``--checkpoint`` with a quantized folder: an export, a dry run, and folders that are refused."""

from __future__ import annotations

import json

import pytest
from quantized_folders import awq_layer, change_config, gptq_layer, write_folder

from flashpte.export.files.fused_weights import parts_of

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "awq"
    write_folder(path, AWQ, awq_layer(), num_hidden_layers=1)
    return path


def test_a_folder_goes_to_lower(export_model, lowered, folder, output):
    result = export_model("--target", "hf", "--checkpoint", folder, "--output-dir", output, "-q")
    assert (result.code, result.err) == (0, "")
    (call,) = lowered
    assert call["manifest"]["weights"] == "checkpoint"
    assert {format for _, format in call["manifest"]["weight_formats"]["rules"]} == {"int4-g32-z-f16"}
    assert "quantization_config" not in call["manifest"]["model"]["config"]
    assert "weights: AWQ, 4 bits, groups of 32: 7 weights as int4-g32-z-f16 (codes kept)" in result.out
    program = call["programs"]["decode"]
    weights = parts_of(program.state_dict, call["manifest"]["fused_weights"])
    assert weights["model.model.layers.0.mlp.up_proj.zeros"].dtype.itemsize == 2


def test_a_dry_run_reads_it(export_model, folder, tmp_path):
    report = tmp_path / "report.json"
    result = export_model("--target", "hf", "--checkpoint", folder, "--dry-run", "--report", report, "-q")
    assert result.code == 0
    assert json.loads(report.read_text())["weights"] == "checkpoint"


@pytest.mark.parametrize(
    ("fields", "flags", "code", "message"),
    [
        ({}, ("--qlinear", "8w"), 2, "--qlinear 8w: the weights are quantized already"),
        ({"quant_method": "fp8"}, (), 1, "quant_method is 'fp8'; read are awq, gptq, compressed-tensors, torchao"),
        ({"group_size": 16}, (), 1, "quantization_config.group_size is 16; served are 32, 64, multiples of 128"),
    ],
)
def test_folders_that_are_refused(export_model, folder, output, fields, flags, code, message):
    change_config(folder, lambda config: config["quantization_config"].update(fields))
    result = export_model("--target", "hf", "--checkpoint", folder, "--output-dir", output, "-q", *flags)
    assert result.code == code
    assert message in result.error
    assert not output.exists()


def test_act_order_names_the_tensor(export_model, tmp_path, output):
    plain = gptq_layer()

    def make(name, shape):
        tensors, meant = plain(name, shape)
        return {**tensors, "g_idx": tensors["g_idx"].flip(0)}, meant

    section = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True}
    write_folder(tmp_path / "gptq", section, make)
    result = export_model("--target", "hf", "--checkpoint", tmp_path / "gptq", "--output-dir", output, "-q")
    assert result.code == 1
    assert "tensor model.layers.0.self_attn.q_proj.g_idx of" in result.error
    assert "act-order is not served" in result.error
