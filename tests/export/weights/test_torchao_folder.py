"""Folders that torchao quantized: what their tensors become in a program, and folders that are refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from quantized_folders import SIZES, change_config, change_tensors, random_scales
from quantized_programs import assert_runs_as_its_weights, formats_of, planned
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao.prototype.gptq.api import _int4_row_dequantize_zp
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Int4Tensor,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    PerTensor,
    quantize_,
)
from transformers import TorchAoConfig

from flashpte.export.common.errors import ExportError
from flashpte.export.pipeline import load_weights
from flashpte.export.weights.quantized import QuantizedLinear

UP = "model.layers.1.mlp.up_proj"


def dense_model(dtype=torch.bfloat16, **changes):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes})).to(dtype)


def write(folder, model):
    """Writes a model of tensor subclasses, as transformers does."""
    model.config.save_pretrained(folder)
    change_config(folder, lambda config: config.update(quantization_config={"quant_method": "torchao"}))
    held = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    held["lm_head.weight"] = model.lm_head.weight.detach()
    tensors, metadata = flatten_tensor_state_dict(held)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **metadata})


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def folder(tmp_path, config, dtype=torch.bfloat16, **changes):
    """A folder that ``quantize_`` made, and what torchao dequantizes."""
    model = dense_model(dtype, **changes)
    quantize_(model, config, filter_fn=lambda module, name: name in linears(model) and name != "lm_head")
    write(tmp_path, model)
    return tmp_path, model


def compare(plan, model):
    """Each weight is what torchao dequantizes, bit by bit in the dtype in which it does."""
    load_weights(plan)
    for name, module in linears(model).items():
        owner, expected = plan.model.get_submodule(name), module.weight
        if isinstance(owner, QuantizedLinear):
            found, expected = owner.dequantized().to(expected.dtype), expected.dequantize()
        else:
            found = owner.weight.to(expected.dtype)
        assert torch.equal(found, expected), name


def intx(bits, group, mapping=MappingType.SYMMETRIC):
    granularity = PerAxis(0) if group == -1 else PerGroup(group)
    return IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity, mapping)


@pytest.mark.parametrize("mapping", [MappingType.SYMMETRIC, MappingType.ASYMMETRIC], ids=lambda mapping: mapping.name)
@pytest.mark.parametrize(
    ("bits", "group", "name"),
    [
        (4, 32, "int4-g32"),
        (4, 64, "int4-g64"),
        (4, -1, "int4-g128"),
        (2, 32, "int4-g32"),
        (3, 64, "int4-g64"),
        (8, 32, "int8-g32"),
        (8, -1, "int8"),
        (6, 64, "int8-g64"),
    ],
)
def test_intx_weights(tmp_path, bits, group, name, mapping):
    path, model = folder(tmp_path, intx(bits, group, mapping))
    plan = planned(path)
    compare(plan, model)
    format = name if mapping == MappingType.SYMMETRIC else f"{name}-z"
    assert formats_of(plan) == {"float32", format}
    what = "a row" if group == -1 else f"groups of {group}"
    assert f"torchao IntxUnpackedToInt8Tensor, int{bits}, {what}: 14 weights as {format} (codes kept)" in (
        plan.weight_notes
    )


@pytest.mark.parametrize(("dtype", "end"), [(torch.float16, "-f16"), (torch.float32, "-f32")])
def test_scales_keep_their_dtype(tmp_path, dtype, end):
    path, model = folder(tmp_path, intx(4, 32), dtype)
    plan = planned(path)
    compare(plan, model)
    assert formats_of(plan) == {"float32", f"int4-g32{end}"}


def test_int8_weights(tmp_path):
    path, model = folder(tmp_path, Int8WeightOnlyConfig())
    plan = planned(path)
    compare(plan, model)
    assert formats_of(plan) == {"float32", "int8-f32"}


def replaced_weights(model, make):
    for name, module in linears(model).items():
        if name != "lm_head":
            module.weight = torch.nn.Parameter(make(module.weight.detach()), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("granularity", "mapping", "formats"),
    [
        (PerTensor(), MappingType.SYMMETRIC, ("int8-f32",)),
        (PerTensor(), MappingType.ASYMMETRIC, ("int8-f32", "int8-z-f32")),  # some of these zero points are 0
        (PerGroup(32), MappingType.ASYMMETRIC, ("int8-g32-z-f32",)),
    ],
    ids=str,
)
def test_int8_tensors_of_other_granularities(tmp_path, granularity, mapping, formats):
    model = replaced_weights(dense_model(), lambda weight: Int8Tensor.from_hp(weight, granularity, mapping))
    write(tmp_path, model)
    plan = planned(tmp_path)
    compare(plan, model)
    assert formats_of(plan) == {"float32", *formats}


def int4(group, symmetric, dtype=torch.bfloat16, activations=torch.bfloat16):
    """Makes an Int4Tensor: two signed codes per byte, the even column in the low nibble."""

    def make(weight):
        rows, columns = weight.shape
        size = columns if group == -1 else group
        codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
        scales = random_scales(columns // size, rows, dtype=dtype)
        zeros = torch.zeros_like(scales) if symmetric else (torch.rand(scales.shape) * 0.01 - 0.005).to(dtype)
        packed = codes[:, ::2] & 15 | codes[:, 1::2] << 4
        made = Int4Tensor(packed, scales, zeros, [1, size], weight.shape, activation_dtype=activations)
        made.codes = codes
        return made

    return make


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "name"), [(32, "int4-g32"), (128, "int4-g128"), (-1, "int4-g128")])
def test_int4_tensors(tmp_path, group, name, symmetric):
    make, made = int4(group, symmetric), []

    def kept(weight):
        made.append(make(weight))
        return made[-1]

    model = replaced_weights(dense_model(), kept)
    write(tmp_path, model)
    plan = planned(tmp_path)
    load_weights(plan)
    assert formats_of(plan) == {"float32", name if symmetric else f"{name}-o-f32"}
    layers = [layer for layer in linears(model) if layer != "lm_head"]
    for layer, tensor in zip(layers, made, strict=True):
        scales, zeros = tensor.scale.float(), tensor.zero_point.float()
        expected = _int4_row_dequantize_zp(tensor.codes, scales, zeros, tensor.block_size[1])
        assert torch.equal(plan.model.get_submodule(layer).dequantized(), expected), layer


def test_what_transformers_saves(tmp_path):
    dense_model(torch.float32).save_pretrained(tmp_path / "dense")
    config = TorchAoConfig(intx(4, 32), modules_to_not_convert=["lm_head", "model.layers.0.self_attn.v_proj"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype="bfloat16"
    )
    model.save_pretrained(tmp_path / "torchao", max_shard_size="100KB")
    assert len(list((tmp_path / "torchao").glob("*.safetensors"))) > 1
    plan = planned(tmp_path / "torchao")
    compare(plan, model)
    held = {weight.name: weight.format for weight in plan.weights}
    assert held[f"{UP}.weight"] == "int4-g32"
    assert held["model.layers.0.self_attn.v_proj.weight"] == "float32"


def test_a_quantized_embedding_is_dense(tmp_path):
    model = dense_model(tie_word_embeddings=True)
    embedding = model.get_input_embeddings()
    held = Int8Tensor.from_hp(embedding.weight.detach(), PerGroup(32), MappingType.ASYMMETRIC)
    embedding.weight = torch.nn.Parameter(held, requires_grad=False)
    write(tmp_path, model)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("lm_head.weight")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    plan = planned(tmp_path)
    load_weights(plan)
    assert torch.equal(plan.model.get_input_embeddings().weight, held.dequantize().float())
    assert "torchao Int8Tensor, int8, groups of 32: 1 weight as dense (dequantized)" in plan.weight_notes


def test_the_program_computes_with_the_codes(tmp_path):
    path, model = folder(tmp_path, intx(4, 32, MappingType.ASYMMETRIC), torch.float32)
    meant = {name: tensor.float() for name, tensor in model.state_dict().items()}
    quantized = {name: module.weight for name, module in linears(model).items() if name != "lm_head"}
    meant |= {f"{name}.weight": weight.dequantize() for name, weight in quantized.items()}
    assert_runs_as_its_weights(path, meant)


def test_quantized_activations_are_refused(tmp_path):
    path, _ = folder(tmp_path, Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)))
    with pytest.raises(ExportError, match=r"_data\.activation_quantization says that activations are quantized"):
        planned(path)


def test_quantized_activations_of_8_bits_are_refused(tmp_path):
    path, _ = folder(tmp_path, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ExportError, match=r"_data\.act_quant_kwargs says that activations are quantized"):
        planned(path)


def test_float8_activations_are_refused(tmp_path):
    write(tmp_path, replaced_weights(dense_model(), int4(32, True, activations=torch.float8_e4m3fn)))
    with pytest.raises(ExportError, match=r"_data\.activation_dtype says that activations are quantized"):
        planned(tmp_path)


def described(path, change):
    """Lets ``change`` edit the description of a weight in place."""
    file = path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    fields = json.loads(metadata[f"{UP}.weight"])
    change(fields)
    metadata[f"{UP}.weight"] = json.dumps(fields)
    save_file(load_file(file), file, metadata=metadata)


def data(**fields):
    return lambda description: description["_data"].update(fields)


META = rf"metadata of {UP}\.weight\."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(_type="Float8Tensor"), rf"{META}_type is 'Float8Tensor'; read are Int4Tensor, IntxUnp"),
        (lambda d: d.update(_type="Int4TilePackedTo4dTensor"), rf"{META}_type is 'Int4TilePackedTo4dTensor'"),
        (lambda d: d.pop("_data"), rf"{META}_data is None, must be an object"),
        (lambda d: d["_tensor_data_names"].append("act_pre_scale"), rf"{META}_tensor_data_names has act_pre_scale"),
        (data(block_size=[1, 16]), rf"{META}_data\.block_size is \[1, 16\]; served are 32, 64"),
        (data(block_size=[1, 48]), rf"{META}_data\.block_size is \[1, 48\], which does not divide the weight's 128"),
        (data(block_size=[2, 32]), rf"{META}_data\.block_size is \[2, 32\]: rows that share scales are not served"),
        (data(block_size=None), rf"{META}_data\.block_size is None, must be rows and columns"),
        (data(block_size=[1, 64]), rf"{UP}\._weight_scale in .* has shape \[256, 4\], .* asks for \[256, 2\]"),
        (data(target_dtype={"_type": "torch.dtype", "_data": "uint4"}), rf"{META}_data\.target_dtype is uint4; read"),
    ],
)
def test_descriptions_that_are_refused(tmp_path, change, message):
    path, _ = folder(tmp_path, intx(4, 32, MappingType.ASYMMETRIC))
    described(path, change)
    with pytest.raises(ExportError, match=message) as error:
        planned(path)
    assert "\n" not in str(error.value)


def replaced(part, change):
    return lambda tensors: tensors.update({f"{UP}._weight_{part}": change(tensors[f"{UP}._weight_{part}"])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{UP}._weight_scale"), rf"has no tensor {UP}\._weight_scale"),
        (lambda tensors: tensors.pop(f"{UP}._weight_zero_point"), rf"has no tensor {UP}\._weight_zero_point"),
        (lambda tensors: tensors.pop(f"{UP}._weight_qdata"), rf"has no tensor {UP}\._weight_qdata \(I8 \[256, 128\]\)"),
        (replaced("qdata", lambda t: t[1:]), rf"{UP}\._weight_qdata in .* has shape \[255, 128\]"),
        (replaced("qdata", lambda t: t.int()), rf"{UP}\._weight_qdata in .* has dtype I32, must be I8"),
        (replaced("zero_point", lambda t: t.float() + 0.5), r"holds zero points that are no whole numbers of a code"),
    ],
)
def test_tensors_that_are_refused(tmp_path, change, message):
    path, _ = folder(tmp_path, intx(4, 32, MappingType.ASYMMETRIC))
    change_tensors(path, change)
    with pytest.raises(ExportError, match=message) as error:
        planned(path)
    assert "\n" not in str(error.value)


def test_codes_outside_their_integers(tmp_path):
    path, _ = folder(tmp_path, intx(4, 32))
    change_tensors(path, lambda tensors: tensors[f"{UP}._weight_qdata"][3, 7:8].fill_(8))
    with pytest.raises(ExportError, match=rf"{UP}\.weight does not fit the format int4-g32: a code of 4 bits"):
        load_weights(planned(path))


def test_a_description_that_is_no_object(tmp_path):
    path, _ = folder(tmp_path, intx(4, 32))
    file = path / "model.safetensors"
    for text in ("3", "{", "[]"):
        save_file(load_file(file), file, metadata={f"{UP}.weight": text})
        with pytest.raises(ExportError, match=rf"the metadata of {UP}\.weight is no JSON object"):
            planned(path)


def test_a_folder_without_metadata(tmp_path):
    path, _ = folder(tmp_path, intx(4, 32))
    save_file(load_file(path / "model.safetensors"), path / "model.safetensors")
    with pytest.raises(ExportError, match=r"has a tensor \S+_weight_qdata, but its files have no metadata of torchao"):
        planned(path)
