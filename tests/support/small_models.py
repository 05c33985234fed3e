"""Small Hugging Face models with stock attention and random weights, for tests that inspect graphs."""

from __future__ import annotations

import torch

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def hugging_face(name: str, config: str | None = None, attention: str = "sdpa", **fields) -> torch.nn.Module:
    """``{name}ForCausalLM`` with a ``{config or name}Config`` of :data:`SMALL` sizes; ``fields`` override them."""
    import transformers

    torch.manual_seed(0)
    described = getattr(transformers, f"{config or name}Config")(**{**SMALL, **fields})
    described._attn_implementation = attention
    return getattr(transformers, f"{name}ForCausalLM")(described).eval()
