"""Weights of 4 and 8 bits: how far they are from the dense weight, and layers that compute with them."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from flashpte.export.common.errors import ExportError
from flashpte.export.weights import quantized
from flashpte.export.weights.formats import FORMATS
from flashpte.export.weights.quantized import QUANTIZED, QuantizedLinear
from flashpte.kernels.linear.format import Groupwise, PackedWeight, unpack
from flashpte.kernels.linear.reference import dequantize

N, K = 40, 320


def dense(rows=N, columns=K):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    weight[3, :32] = 0  # a group without a scale
    weight[5] *= 1000
    return weight


def layer(name, weight, bias=None):
    """A linear layer in the format ``name``, with its weight."""
    holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta"))
    FORMATS[name].adapt(holder, "0.weight")
    tensors = FORMATS[name].encode("0.weight", weight)
    stored = FORMATS[name].stored("0.weight", weight.shape)
    assert {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()} == stored
    if bias is not None:
        tensors["0.bias"] = bias
    holder.load_state_dict(tensors, assign=True)
    return holder


@pytest.mark.parametrize("name", [name for name, format in QUANTIZED.items() if format.moved is None])
def test_a_weight_is_off_by_half_a_step(name):
    """Codes at the ends of the range, and scales rounded to bfloat16, add a little."""
    weight, format = dense(), QUANTIZED[name]
    read = layer(name, weight)[0].dequantized()
    group = format.group or K
    largest = nn.functional.pad(weight.abs(), (0, -K % group)).unflatten(1, (-1, group)).amax(2)
    step = (largest / (2 ** (format.bits - 1) - 0.5)).repeat_interleave(group, 1)[:, :K]
    assert bool(((read - weight).abs() <= step * (0.5 + 2**-8 * 2 ** (format.bits - 1))).all())
    assert bool((read[3, :32] == 0).all())
    if format.bits == 8:
        assert (read - weight).norm() < 0.011 * weight.norm()


def test_codes_are_rounded_to_nearest_of_all_16():
    weight = torch.linspace(-7.5, 7.5, 32)[None].repeat(16, 1)
    module = layer("int4-g32", weight)[0]
    codes = unpack(PackedWeight(module.packed, module.scales, None), module.fmt).codes
    assert torch.equal(codes[0].long(), (weight[0] + 8).round().clamp(0, 15).long())
    assert set(codes[0].tolist()) == set(range(16))


@pytest.mark.parametrize("name", ["int4-g64", "int4-g64-z", "int4-g64-hqq"])
def test_rows_are_quantized_in_parts(monkeypatch, name):
    weight = dense()
    whole = FORMATS[name].encode("0.weight", weight)
    monkeypatch.setattr(quantized, "_ELEMENTS", 1)
    parts = FORMATS[name].encode("0.weight", weight)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["int4-g32", "int4-g128", "int8", "int4-g32-hqq"])
def test_the_exported_layer_calls_the_kernel_and_computes_what_the_eager_one_does(name, bias):
    module = layer(name, dense(), torch.randn(N).bfloat16() if bias else None).eval()
    x = torch.randn(2, 5, K).bfloat16()
    program = torch.export.export(module, (x,))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["flashpte.quantized_linear.default"]
    expected = copy.deepcopy(module).double()(x.double())
    for out in (program.module()(x), module(x)):
        assert out.dtype == torch.bfloat16
        assert (out.double() - expected).norm() <= 2**-7 * expected.norm()  # the eager layer rounds its weight


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_codes_cannot_hold_is_refused(value):
    weight = dense()
    weight[7, 9] = value
    with pytest.raises(ExportError, match=r"layers\.0\.weight holds infinities or NaN"):
        FORMATS["int4-g32"].encode("layers.0.weight", weight)


def test_values_too_large_for_their_scales_are_refused():
    with pytest.raises(ExportError, match=r"a\.weight has scales that are infinite"):
        FORMATS["int4-g32-f16"].encode("a.weight", 1e6 * dense())


@pytest.mark.parametrize("name", [name for name, format in QUANTIZED.items() if format.moved == "zeros"])
def test_zero_points_make_a_one_sided_weight_nearer(name):
    weight, format = dense().abs(), QUANTIZED[name]
    symmetric = dataclasses.replace(format, moved=None, hqq=False).name
    error, larger = ((layer(one, weight)[0].dequantized() - weight).norm() for one in (name, symmetric))
    assert error < 0.6 * larger


def test_only_linear_layers_and_embeddings():
    module = nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(64))
    for name in ("0.bias", "1.weight"):
        with pytest.raises(ExportError, match=f"{name}: weights of 4 bits are those of linear layers and embeddings"):
            FORMATS["int4-g32"].adapt(module, name)
    assert not any(isinstance(child, QuantizedLinear) for child in module)


def held(format, rows=N, columns=K):
    """A weight as a source holds it."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(1 << format.bits, (rows, columns), generator=generator, dtype=torch.uint8)
    groups = -(-columns // (format.group or columns))
    scales, moved = (torch.rand(rows, groups, generator=generator).to(format.scale_dtype) for _ in range(2))
    if format.format_of((rows, columns)).whole_zeros:
        moved = torch.randint((1 << format.bits) + 1, moved.shape, generator=generator, dtype=torch.int16)
    return Groupwise(codes, scales, **{} if format.moved is None else {format.moved: moved})


@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_of_a_source_are_kept_bit_by_bit(name):
    format = FORMATS[name]
    natural = held(format)
    holder = nn.Sequential(nn.Linear(K, N, bias=False, device="meta"))
    format.adapt(holder, "0.weight")
    tensors = format.pack("0.weight", natural)
    stored = format.stored("0.weight", (N, K))
    assert {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()} == stored
    assert holder.state_dict().keys() == stored.keys()
    holder.load_state_dict(tensors, assign=True)
    wide = Groupwise(natural.codes, *(None if t is None else t.float() for t in natural[1:]))
    assert torch.equal(holder[0].dequantized(), dequantize(*wide, format.bits, format.group or K))


@pytest.mark.parametrize("name", ["int4-g32-z", "int4-g64-o-f16", "int8-o-f32", "int8-g32-f16"])
def test_the_exported_layer_reads_zero_points_and_offsets(name):
    format = FORMATS[name]
    holder = nn.Sequential(nn.Linear(K, N, bias=False, device="meta")).eval()
    format.adapt(holder, "0.weight")
    holder.load_state_dict(format.pack("0.weight", held(format)), assign=True)
    x = torch.randn(3, K)
    out = torch.export.export(holder, (x,)).module()(x)
    torch.testing.assert_close(out.double(), copy.deepcopy(holder).double()(x.double()), rtol=1e-4, atol=1e-3)


def test_names_say_what_a_format_is():
    assert len(QUANTIZED) == 66
    assert QUANTIZED["int4-g32"].scale_dtype == torch.bfloat16
    format = QUANTIZED["int8-g128-o-f32"]
    assert (format.bits, format.group, format.moved, format.scale_dtype) == (8, 128, "offsets", torch.float32)
    whole, real = (QUANTIZED[f"int4-g32-{name}"].format_of((N, K)).zeros_dtype for name in ("z", "hqq"))
    assert (whole, real) == (torch.int16, torch.bfloat16)


def test_codes_that_do_not_fit_their_format():
    natural = held(FORMATS["int4-g32-z"])
    with pytest.raises(ExportError, match=r"a\.weight does not fit the format int4-g32-o: .*no zero points"):
        FORMATS["int4-g32-o"].pack("a.weight", natural)
    with pytest.raises(ExportError, match=r"a.weight does not fit the format int4-g64-z: .*\[40, 5\]"):
        FORMATS["int4-g64-z"].pack("a.weight", natural)
    natural.zeros[3, 2] = 17
    with pytest.raises(ExportError, match=r"int4-g32-z: a whole zero point of 4 bits is from 0 to 16"):
        FORMATS["int4-g32-z"].pack("a.weight", natural)
    natural.scales[3, 2] = float("inf")
    with pytest.raises(ExportError, match=r"a\.weight has scales that are infinite or NaN"):
        FORMATS["int4-g32-z"].pack("a.weight", natural)
    with pytest.raises(ExportError, match=r"a\.weight: int4-g32-o is for codes of quantized files"):
        FORMATS["int4-g32-o"].encode("a.weight", dense())
