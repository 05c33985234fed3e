"""Blocks of GGUF's quantized types: what is read stands, bit by bit, for what the package gguf dequantizes."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import pytest
import torch
from gguf_files import random_blocks

from flashpte.export.weights.formats import FORMATS
from flashpte.export.weights.gguf_blocks import EXACT, read_blocks
from flashpte.export.weights.gguf_file import GgufFile
from flashpte.export.weights.gguf_weights import ROUNDED
from flashpte.export.weights.quantized import QuantizedLinear

FILES = [Path(path) for path in os.environ.get("FLASHPTE_GGUF_FILES", "").split(os.pathsep) if path]
"""Real files to check, if there are any."""


def packed(format: str, tensors, shape) -> QuantizedLinear:
    layer = QuantizedLinear(FORMATS[format].format_of(shape), bias=False, dtype=torch.float32)
    layer.load_state_dict({name.removeprefix("a."): tensor for name, tensor in tensors.items()})
    return layer


def kept(data, kind: gguf.GGMLQuantizationType) -> torch.Tensor:
    """The dequantized weight of the layer that holds these blocks."""
    natural = read_blocks(data, kind.name, gguf.GGML_QUANT_SIZES[kind][1])
    format = EXACT[kind.name]
    return packed(format, FORMATS[format].pack("a.weight", natural), natural.codes.shape).dequantized()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("columns", [256, 1280])
def test_blocks_are_read_bit_by_bit(name, columns):
    kind = gguf.GGMLQuantizationType[name]
    for seed in range(4):
        data = random_blocks(40, columns, kind, seed)
        assert torch.equal(kept(data, kind), torch.from_numpy(gguf.dequantize(data, kind)))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_rows_need_not_fill_a_tile(name):
    kind = gguf.GGMLQuantizationType[name]
    data = random_blocks(17, 576, kind, 0)
    assert torch.equal(kept(data, kind), torch.from_numpy(gguf.dequantize(data, kind)))


def test_scales_of_k_quants_do_not_fit_float16():
    """So a format with float16 scales would not be exact."""
    natural = read_blocks(random_blocks(40, 256, gguf.GGMLQuantizationType.Q4_K, 0), "Q4_K", 144)
    assert not torch.equal(natural.scales.half().float(), natural.scales)


def rounded(dense: torch.Tensor, name: str) -> torch.Tensor:
    format = ROUNDED[name]
    return packed(format, FORMATS[format].encode("a.weight", dense), dense.shape).dequantized()


def test_q6_k_is_rounded_to_half_a_step_of_8_bits():
    kind = gguf.GGMLQuantizationType.Q6_K
    dense = torch.from_numpy(gguf.dequantize(random_blocks(40, 512, kind, 0), kind))
    error = (rounded(dense, "Q6_K") - dense).abs().unflatten(1, (-1, 32)).amax(2)
    assert (error <= 0.0079 * dense.abs().unflatten(1, (-1, 32)).amax(2)).all()


@pytest.mark.skipif(not FILES, reason="FLASHPTE_GGUF_FILES names no files")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_real_files(path):
    for tensor in GgufFile(path).tensors.values():
        dense = tensor.dequantized()
        if tensor.type in EXACT:
            assert torch.equal(kept(tensor.bytes, gguf.GGMLQuantizationType[tensor.type]), dense), tensor.name
        elif tensor.type in ROUNDED:
            assert (rounded(dense, tensor.type) - dense).norm() < 0.006 * dense.norm()
