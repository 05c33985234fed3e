"""Tiny Hugging Face models of every supported architecture, with weights that make each part matter."""

import copy

import pytest
import torch
import transformers

_SIZES = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "max_position_embeddings": 128}
TINY = {
    "llama": {
        **_SIZES,
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "qwen3": {
        **_SIZES,
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    # full attention below, sliding above
    "qwen3-sliding": {
        **_SIZES,
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "gemma4": {
        **_SIZES,
        "model_type": "gemma4_text",
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 8,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
    },
}

CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma4_text": ("Gemma4TextConfig", "Gemma4ForCausalLM"),
}

TARGETS = {"llama": "hf", "qwen3": "hf", "qwen3-sliding": "hf", "gemma4": "gemma4-31b"}


@pytest.fixture(scope="session")
def tiny():
    """Fields of a tiny config by name; a copy, free to change."""
    return lambda name: copy.deepcopy(TINY[name])


@pytest.fixture(scope="session")
def reference():
    """A Hugging Face model with its own attention; large random weights, norms and scalars away from one."""

    def build(fields):
        config_class, model_class = CLASSES[fields["model_type"]]
        config = getattr(transformers, config_class).from_dict(dict(fields))
        config._attn_implementation = "sdpa"
        model = getattr(transformers, model_class)(config).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(7)
        for tensor in model.state_dict().values():
            if tensor.ndim >= 2:
                tensor.normal_(0.0, 1.5 * tensor.shape[-1] ** -0.5, generator=generator)
            else:
                tensor.uniform_(0.5, 1.5, generator=generator)
        return model

    return build


@pytest.fixture(scope="session")
def target_of():
    return TARGETS.__getitem__
