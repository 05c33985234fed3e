"""Small Hugging Face folders with quantized weights, and what their tensors stand for by each format's own formula."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SIZES = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

Layer = Callable[[str, tuple[int, int]], tuple[dict[str, torch.Tensor], torch.Tensor]]
"""Makes a layer's tensors, by the ends of their names, and the dense weight that they stand for."""


def write_folder(
    folder: Path, section: Mapping[str, Any], layer: Layer, dense: tuple[str, ...] = ("lm_head",), **changes: Any
) -> dict[str, torch.Tensor]:
    """Writes a tiny Llama whose linear layers are quantized.

    Args:
        folder: the folder.
        section: ``quantization_config``.
        layer: makes a layer.
        dense: ends of the names of layers that stay dense.
        changes: fields of the config that differ from :data:`SIZES`.

    Returns:
        The dense weights of the model that the folder stands for, by name.
    """
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes})).to(torch.float16)
    model.save_pretrained(folder)
    held = dict(load_file(folder / "model.safetensors"))
    meant = {name: tensor.float() for name, tensor in held.items()}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or f"{name}.weight" not in held or name.endswith(dense):
            continue
        del held[f"{name}.weight"]
        tensors, meant[f"{name}.weight"] = layer(name, (module.out_features, module.in_features))
        held |= {f"{name}.{part}": tensor.contiguous() for part, tensor in tensors.items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, lambda config: config.update(quantization_config=dict(section)))
    return meant


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Lets ``change`` edit the config in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Lets ``change`` edit the tensors in place."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    """Codes int64 ``[rows, columns]`` of all values."""
    return torch.randint(0, 1 << bits, (rows, columns))


def random_scales(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Scales that are no powers of two."""
    return (torch.rand(shape) * 0.004 + 0.001).to(dtype)


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs the last axis of codes into int32 words, the first code in the lowest bits."""
    parts = codes.unflatten(-1, (-1, 32 // bits)).to(torch.int64) << torch.arange(0, 32, bits)
    total = parts.sum(-1)
    return torch.where(total >> 31 == 1, total - (1 << 32), total).to(torch.int32)


def awq_layer(group: int = 32, symmetric: bool = False, dtype: torch.dtype = torch.float16) -> Layer:
    """Layers as AutoAWQ's gemm version packs them.

    AutoAWQ (``awq/modules/linear/gemm.py``, ``from_linear``) puts output ``order[i]`` of eight into nibble ``i``.
    """
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def make(name: str, shape: tuple[int, int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rows, columns = shape
        size = columns if group == -1 else group
        codes, scales = random_codes(columns, rows, 4), random_scales(columns // size, rows, dtype=dtype)
        zeros = random_codes(columns // size, rows, 4)
        if symmetric:
            zeros = torch.full_like(zeros, 8)
        packed = (words(t.unflatten(-1, (-1, 8))[..., order].flatten(-2), 4) for t in (codes, zeros))
        tensors = {**dict(zip(("qweight", "qzeros"), packed, strict=True)), "scales": scales}
        # (q - zero) * scale, as awq/utils/packing_utils.py, dequantize_gemm, but in float32.
        meant = (codes - zeros.repeat_interleave(size, 0)) * scales.float().repeat_interleave(size, 0)
        return tensors, meant.t().contiguous()

    return make


def gptq_layer(bits: int = 4, group: int = 32, symmetric: bool = False, version: int = 1, index: bool = True) -> Layer:
    """Layers as GPTQModel packs them: version 1 stores ``zero - 1``, version 2 ``zero``.

    GPTQModel (``utils/model.py``, ``convert_gptq_v2_to_v1_format_module``) subtracts ones from whole words.
    """

    def make(name: str, shape: tuple[int, int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rows, columns = shape
        size = columns if group == -1 else group
        codes, scales = random_codes(columns, rows, bits), random_scales(columns // size, rows)
        zeros = random_codes(columns // size, rows, bits)
        if symmetric:
            zeros = torch.full_like(zeros, 1 << (bits - 1))
        packed = words(zeros, bits)
        if version == 1:
            packed = packed - (0x11111111 if bits == 4 else 0x01010101)
        tensors = {"qweight": words(codes.t(), bits).t(), "qzeros": packed, "scales": scales}
        if index:
            tensors["g_idx"] = (torch.arange(columns) // size).to(torch.int32)
        meant = (codes - zeros.repeat_interleave(size, 0)) * scales.float().repeat_interleave(size, 0)
        return tensors, meant.t().contiguous()

    return make


def compressed_layer(
    bits: int = 4, group: int = 32, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Layer:
    """Layers as compressed-tensors packs them (``compressors/pack_quantized``), a row for a group of -1."""

    def make(name: str, shape: tuple[int, int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rows, columns = shape
        size, per_word = columns if group == -1 else group, 32 // bits
        codes, scales = random_codes(rows, columns, bits), random_scales(rows, columns // size, dtype=dtype)
        zeros = random_codes(rows, columns // size, bits)
        if symmetric:
            zeros = torch.full_like(zeros, 1 << (bits - 1))
        filled = torch.nn.functional.pad(codes, (0, -columns % per_word))
        tensors = {
            "weight_packed": words(filled, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(shape),
        }
        if not symmetric:
            filled = torch.nn.functional.pad(zeros, (0, 0, 0, -rows % per_word))
            tensors["weight_zero_point"] = words(filled.t(), bits).t()
        # (q - zero) * scale of signed numbers, as quantization/lifecycle/forward_helpers.py, but in float32.
        meant = (codes - zeros.repeat_interleave(size, 1)) * scales.float().repeat_interleave(size, 1)
        return tensors, meant

    return make
