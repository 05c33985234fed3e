"""The Hugging Face config that a GGUF file's metadata describes.

transformers has such a table too, but its own leaves out what decides whether the result is right: scaled RoPE, the
head dim of Qwen3, and most fields of Gemma 4. So each architecture here is read completely or refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from flashpte.export.common.errors import ExportError
from flashpte.export.weights.gguf_file import GgufFile

ROPE_FACTORS = "rope_freqs.weight"
"""A tensor that divides RoPE's frequencies; it is part of the config, not of the weights."""

# What Llama 3.1 to 3.3 were trained with. A file holds only the factors that follow from these and the largest factor.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _required(file: GgufFile, key: str) -> Any:
    value = file.of_architecture(key)
    if value is None:
        raise ExportError(f"{file.path} has no {file.architecture}.{key}")
    return value


def _decimal(value: float) -> float:
    """The shortest decimal number that is this float32, such as 1e-05."""
    return float(str(np.float32(value)))


def _common(file: GgufFile) -> dict[str, Any]:
    """The fields that every architecture has."""
    if file.of_architecture("expert_count"):
        raise ExportError(f"{file.path} has experts ({file.architecture}.expert_count), which are not exported")
    if "token_embd.weight" not in file.tensors:
        raise ExportError(f"{file.path} has no tensor token_embd.weight")
    heads = _required(file, "attention.head_count")
    fields = {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": _required(file, "embedding_length"),
        "intermediate_size": _required(file, "feed_forward_length"),
        "num_hidden_layers": _required(file, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.of_architecture("attention.head_count_kv", heads),
        "max_position_embeddings": _required(file, "context_length"),
        "rms_norm_eps": _decimal(_required(file, "attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    ids = [file.metadata(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    if ends := list(dict.fromkeys(int(token) for token in ids if token is not None)):
        fields["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if (begin := file.metadata("tokenizer.ggml.bos_token_id")) is not None:
        fields["bos_token_id"] = int(begin)
    return fields


def _rope(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """RoPE's parameters of a model with one kind of layer."""
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": _decimal(file.of_architecture("rope.freq_base", 10000.0)),
    }
    kind = file.of_architecture("rope.scaling.type", "none")
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": _decimal(_required(file, "rope.scaling.factor"))}
    elif kind != "none":
        raise ExportError(f"{file.path} has {file.architecture}.rope.scaling.type {kind!r}, which is not read")
    if ROPE_FACTORS in file.tensors:
        rope |= _llama3_rope(file, head_dim, rope["rope_theta"])
    return rope


def _llama3_rope(file: GgufFile, head_dim: int, theta: float) -> dict[str, Any]:
    """The parameters that give a file's factors of RoPE's frequencies.

    Raises:
        ExportError: they do not follow from one factor and Llama 3's constants.
    """
    factors = file.tensors[ROPE_FACTORS].dequantized().double()
    largest = _decimal(float(factors.max()))
    rope = {"rope_type": "llama3", "factor": largest, **_LLAMA3_ROPE}
    low, high, trained = _LLAMA3_ROPE.values()
    expected = []
    for pair in range(head_dim // 2):
        turns = trained / (2 * math.pi * theta ** (2 * pair / head_dim))
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        expected.append(1 / ((1 - smooth) / largest + smooth))
    if factors.shape != (head_dim // 2,) or not torch.allclose(factors, torch.tensor(expected).double(), rtol=1e-3):
        raise ExportError(f"tensor {ROPE_FACTORS} of {file.path} has RoPE factors that are not those of Llama 3")
    return rope


def _llama(file: GgufFile) -> dict[str, Any]:
    fields = _common(file)
    head_dim = file.of_architecture("attention.key_length") or file.of_architecture("rope.dimension_count")
    head_dim = head_dim or fields["hidden_size"] // fields["num_attention_heads"]
    return fields | {"model_type": "llama", "head_dim": head_dim, "rope_parameters": _rope(file, head_dim)}


def _qwen3(file: GgufFile) -> dict[str, Any]:
    head_dim = file.of_architecture("attention.key_length", 128)
    return _common(file) | {"model_type": "qwen3", "head_dim": head_dim, "rope_parameters": _rope(file, head_dim)}


def _gemma4(file: GgufFile) -> dict[str, Any]:
    fields = _common(file)
    sliding = [bool(value) for value in _required(file, "attention.sliding_window_pattern")]
    heads = fields["num_key_value_heads"]
    if isinstance(heads, list):
        if len(heads) != len(sliding):
            raise ExportError(f"{file.path} has key heads for {len(heads)} of {len(sliding)} layers")
        full = [count for count, window in zip(heads, sliding, strict=True) if not window]
        fields |= {"num_key_value_heads": heads[sliding.index(True)] if any(sliding) else heads[0]}
        fields |= {"num_global_key_value_heads": full[0] if full else None}
    full_layers = [index for index, window in enumerate(sliding) if not window]
    shares = bool(full_layers) and all(f"blk.{index}.attn_v.weight" not in file.tensors for index in full_layers)
    rotated = 1.0
    if ROPE_FACTORS in file.tensors:
        # Dims that are not rotated have a huge factor.
        factors = file.tensors[ROPE_FACTORS].dequantized()
        rotated = float((factors == 1).float().mean())
    thetas = {
        name: _decimal(_required(file, f"rope.freq_base{end}")) for name, end in (("full", ""), ("sliding", "_swa"))
    }
    softcap = file.of_architecture("final_logit_softcapping")
    return fields | {
        "model_type": "gemma4_text",
        "head_dim": _required(file, "attention.key_length_swa"),
        "global_head_dim": _required(file, "attention.key_length"),
        "sliding_window": _required(file, "attention.sliding_window"),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in sliding],
        "attention_k_eq_v": shares,
        "hidden_size_per_layer_input": file.of_architecture("embedding_length_per_layer_input", 0),
        "num_kv_shared_layers": file.of_architecture("attention.shared_kv_layers", 0),
        "final_logit_softcapping": None if softcap is None else _decimal(softcap),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": thetas["sliding"]},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": rotated,
                "rope_theta": thetas["full"],
            },
        },
    }


def _gemma3(file: GgufFile) -> dict[str, Any]:
    """A text model of Gemma 3. What a file does not say is a constant of llama.cpp (``LLM_ARCH_GEMMA3``).

    These constants are the period of full layers, RoPE's base in sliding layers, and the scale of the scores: by head
    dim, but of the 27B model, which has 62 layers, by columns per query head.
    """
    fields = _common(file)
    if file.of_architecture("attn_logit_softcapping"):
        raise ExportError(f"{file.path} has {file.architecture}.attn_logit_softcapping, which is not read")
    if ROPE_FACTORS in file.tensors:
        raise ExportError(f"{file.path} has tensor {ROPE_FACTORS}, which is not read for {file.architecture}")
    layers, head_dim = fields["num_hidden_layers"], _required(file, "attention.key_length")
    pattern = file.of_architecture("attention.sliding_window_pattern", 6)
    sliding = pattern if isinstance(pattern, list) else [(index + 1) % pattern != 0 for index in range(layers)]
    softcap = file.of_architecture("final_logit_softcapping")
    full = _rope(file, head_dim) | {"rope_theta": _decimal(_required(file, "rope.freq_base"))}
    local = _decimal(file.of_architecture("rope.freq_base_swa", 10000.0))
    return fields | {
        "model_type": "gemma3_text",
        "head_dim": head_dim,
        "query_pre_attn_scalar": fields["hidden_size"] // fields["num_attention_heads"] if layers == 62 else head_dim,
        "sliding_window": _required(file, "attention.sliding_window"),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in sliding],
        "final_logit_softcapping": None if softcap is None else _decimal(softcap),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
            "full_attention": full,
        },
    }


_ARCHITECTURES: dict[str, Callable[[GgufFile], dict[str, Any]]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
}


def config_fields(file: GgufFile) -> dict[str, Any]:
    """The fields of the ``config.json`` that the file's metadata describes.

    Raises:
        ExportError: the architecture is unknown, a field is missing, or has a value that is not read.
    """
    read = _ARCHITECTURES.get(file.architecture)
    if read is None:
        known = ", ".join(_ARCHITECTURES)
        raise ExportError(f"{file.path} has the architecture {file.architecture!r}; known: {known}")
    return read(file)
