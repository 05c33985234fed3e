"""Small GGUF files of random models, written with the package gguf, and what their tensors stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from flashpte.export.models.registry import get_target
from flashpte.export.weights.random import RandomWeights

SIZES = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-05,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
}
LLAMA = {**SIZES, "model_type": "llama", "head_dim": 64, "tie_word_embeddings": False}
QWEN3 = {**SIZES, "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True}
GEMMA3 = {
    **SIZES,
    "model_type": "gemma3_text",
    "num_hidden_layers": 7,  # the sixth has full attention
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "tie_word_embeddings": True,
    "sliding_window": 8,
    "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
    },
}
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "gemma4_text": gguf.MODEL_ARCH.GEMMA4,
}
TARGETS = {"llama": "hf", "qwen3": "hf", "gemma3_text": "hf", "gemma4_text": "gemma4-31b"}


def random_blocks(rows: int, columns: int, kind: gguf.GGMLQuantizationType, seed: int) -> np.ndarray:
    """Random blocks uint8 ``[rows, bytes]`` of a quantized type, with sane float16 scales."""
    rng = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    name = kind.name
    scales = (208,) if name == "Q6_K" else (0, 2) if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K", "Q2_K") else (0,)
    largest = 1 / 2000 if name.endswith("_K") else 1 / 100
    for at in scales:
        numbers = rng.uniform(-largest, largest, data.shape[:2]).astype(np.float16)
        data[..., at : at + 2] = numbers[..., None].view(np.uint8)
    return data.reshape(rows, -1)


def _metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_bos_token_id(config["bos_token_id"])
    ends = config["eos_token_id"]
    writer.add_eos_token_id(ends[0])
    writer.add_eot_token_id(ends[1])
    if config["model_type"] != "gemma4_text":
        ropes = config["rope_parameters"]
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_rope_freq_base(ropes.get("full_attention", ropes)["rope_theta"])
        writer.add_key_length(config["head_dim"])
        if "sliding_window" in config:
            writer.add_sliding_window(config["sliding_window"])
        return
    sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    counts = (config["num_global_key_value_heads"], config["num_key_value_heads"])
    writer.add_head_count_kv([counts[window] for window in sliding])
    writer.add_sliding_window_pattern(sliding)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_key_length(config["global_head_dim"])
    writer.add_key_length_swa(config["head_dim"])
    writer.add_shared_kv_layers(0)
    writer.add_embedding_length_per_layer_input(0)
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    ropes = config["rope_parameters"]
    writer.add_rope_freq_base(ropes["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    pairs = config["global_head_dim"] // 2
    rotated = int(pairs * ropes["full_attention"]["partial_rotary_factor"])
    writer.add_tensor("rope_freqs.weight", np.array([1.0] * rotated + [1e30] * (pairs - rotated), np.float32))


def llama3_factors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """What a file of Llama 3.1 or newer holds, computed by the formula of its config."""
    wave = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (8192 / wave - 1.0) / (4.0 - 1.0)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wave < 8192 / 4, 1.0, np.where(wave > 8192, factor, between)).astype(np.float32)


def write_gguf(
    path: Path, config: Mapping[str, Any], types: Mapping[str, str] | None = None, **changes: Any
) -> dict[str, torch.Tensor]:
    """Writes a random model.

    Args:
        path: the file.
        config: the Hugging Face config, one of those above.
        types: the type of tensors, by a part of their names in the file; others are F32.
        changes: ``skip``: tensors to leave out; ``extra``: tensors to add; ``architecture``: another name for it;
            ``keys``: more metadata, numbers and texts; ``tokenizer``: a function that adds one.

    Returns:
        The weights by their names in the Hugging Face model, float32, as the package gguf dequantizes them.
    """
    kind = config["model_type"]
    model = get_target(TARGETS[kind]).build(config)
    arch = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[kind]]
    writer = gguf.GGUFWriter(path, changes.get("architecture", arch))
    _metadata(writer, config)
    for key, value in changes.get("keys", {}).items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    changes.get("tokenizer", lambda writer: None)(writer)
    names = gguf.get_tensor_name_map(ARCHITECTURES[kind], config["num_hidden_layers"])
    source, held = RandomWeights(model, torch.float32, 0), {}
    for index, name in enumerate(model.state_dict()):
        dense = source.read(name).numpy()
        stored = names.get_name(name, (".weight", ".bias")) or names.get_name(name)
        stored = stored if stored.endswith((".weight", ".bias")) else f"{stored}.weight"
        if any(part in stored for part in changes.get("skip", ())):
            continue
        heads = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}.get(stored[6:])
        heads = config[heads] if heads is not None and kind == "llama" else None
        added = kind == "gemma3_text" and name.endswith("norm.weight")
        dense = dense + np.float32(added)
        of = next((of for part, of in (types or {}).items() if part in stored), "F32")
        if of in ("Q4_0", "Q4_1", "Q8_0", "BF16", "F16", "F32"):
            if heads:  # as llama.cpp's converter does
                dense = dense.reshape(heads, 2, -1, dense.shape[1]).swapaxes(1, 2).reshape(dense.shape)
            data = gguf.quantize(np.ascontiguousarray(dense), gguf.GGMLQuantizationType[of])
        else:
            data = random_blocks(*dense.shape, gguf.GGMLQuantizationType[of], index)
        raw = gguf.GGMLQuantizationType[of]
        writer.add_tensor(stored, data, raw_dtype=None if of in ("F16", "F32") else raw)
        back = gguf.dequantize(data, raw).reshape(dense.shape)
        if heads:
            back = back.reshape(heads, -1, 2, back.shape[1]).swapaxes(1, 2).reshape(back.shape)
        held[name] = torch.from_numpy(np.array(back) - np.float32(added))
    for name, data in changes.get("extra", {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held
