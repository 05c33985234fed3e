"""Models quantized by torchao, whose weights are tensor subclasses when they are exported."""

import copy

import pytest
import torch
from torchao.kernel import intmm
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

from flashpte.export.common.errors import ExportError
from flashpte.export.lowering import lower
from flashpte.passes.graph.subclasses import unwrap_weights

CONFIGS = {
    "int8": lambda: Int8WeightOnlyConfig(),
    "int4 by groups": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


REFUSED = {
    "int8 activations": (Int8DynamicActivationInt8WeightConfig, "method forward multiplies uint8 by int8"),
    "float8": (Float8WeightOnlyConfig, "is float8_e4m3fn, which ExecuTorch's CUDA delegate does not have"),
}


def processor_has(monkeypatch, *, vnni, amx):
    """What torchao is told of the processor: with VNNI and without AMX it writes uint8 activations (torch 2.12)."""
    monkeypatch.setattr(intmm, "_cpu_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(intmm, "_cpu_is_amx_tile_supported", lambda: amx)


def quantised(config):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 64)).bfloat16()
    quantize_(module, config())
    return torch.export.export(module.eval(), (torch.randn(4, 64).bfloat16(),))


@pytest.mark.parametrize("config", CONFIGS)
def test_weights_become_the_tensors_that_they_hold(config):
    program = quantised(CONFIGS[config])
    kinds = {name: type(value) for name, value in program.state_dict.items()}
    plain = unwrap_weights(program)
    assert {name: type(value) for name, value in program.state_dict.items()} == kinds
    assert all(type(value) in (torch.Tensor, torch.nn.Parameter) for value in plain.state_dict.values())
    assert any(value.dtype == torch.int8 for value in plain.state_dict.values())
    x = torch.randn(4, 64).bfloat16()
    torch.testing.assert_close(plain.module()(x), copy.deepcopy(program).module()(x))


def test_plain_weights_are_left_alone():
    program = torch.export.export(torch.nn.Linear(4, 4), (torch.ones(1, 4),))
    assert unwrap_weights(program) is program


@pytest.mark.parametrize("config", REFUSED)
def test_weights_that_cannot_be_lowered(tmp_path, monkeypatch, config):
    processor_has(monkeypatch, vnni=True, amx=False)
    if config == "int8 activations" and not intmm.torch_version_at_least("2.12.0.dev"):
        pytest.skip("torchao writes int8 activations for this version of torch")
    make, said = REFUSED[config]
    with pytest.raises(ExportError, match=said):
        lower({"forward": quantised(make)}, output_dir=tmp_path / "out", arch="sm_90")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.lowering
@pytest.mark.parametrize("package", ["pte", "pt2"])
def test_int8_weights_lower(tmp_path, package):
    lower({"forward": quantised(CONFIGS["int8"])}, output_dir=tmp_path / "out", arch="sm_90", format=package)


@pytest.mark.lowering
@pytest.mark.parametrize("vnni", [True, False])
def test_int8_activations_lower_where_torchao_writes_int8(tmp_path, monkeypatch, vnni):
    processor_has(monkeypatch, vnni=vnni, amx=vnni)
    program = quantised(Int8DynamicActivationInt8WeightConfig)
    lower({"forward": program}, output_dir=tmp_path / "out", arch="sm_90", format="pte")
