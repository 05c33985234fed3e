"""A session of a model's exported programs, compared with the model's logits for the whole sequence."""

import torch
import transformers
from shared_programs import SharedPrograms
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TOLERANCE = 1e-4
VERIFY = 4
LENGTH = 44  # past a window of 8 and more than twice around the ring of 16

COMMON = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Fields of a small config that all models share."""


def reference_model(fields, attention="sdpa"):
    """A Hugging Face model with its own attention and large random weights; norms and scalars differ from 1."""
    model_type = fields["model_type"]
    config = getattr(transformers, CONFIG_MAPPING_NAMES[model_type]).from_dict(dict(fields))
    config._attn_implementation = attention
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    for tensor in model.state_dict().values():
        if tensor.ndim >= 2:
            tensor.normal_(0.0, 1.5 * tensor.shape[-1] ** -0.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=generator)
    return model


def run_session(programs, tokens, expected):
    """Chunked prefill, decode, verify with rejected drafts, and decode again; returns the largest error of any row."""
    run = SharedPrograms(programs)
    vocab = expected.shape[-1]
    worst = 0.0

    def check(got, first, count):
        nonlocal worst
        assert got.shape == (1, count, vocab)
        worst = max(worst, (got - expected[:, first : first + count]).abs().max().item())

    position = 0
    for chunk in (8, 3, 8, 2):
        logits = run("prefill", tokens[:, position : position + chunk], position)
        position += chunk
        check(logits, position - 1, 1)
    for _ in range(5):
        check(run("decode", tokens[:, position : position + 1], position), position, 1)
        position += 1
    while position + VERIFY <= LENGTH - 4:
        draft = tokens[:, position : position + VERIFY].clone()
        draft[:, 2:] = (draft[:, 2:] + 1) % vocab  # the last two are rejected, so only two rows can be compared
        check(run("target_verify", draft, position)[:, :2], position, 2)
        position += 2
        check(run("target_verify", tokens[:, position : position + VERIFY], position), position, VERIFY)
        position += VERIFY
    while position < LENGTH:
        check(run("decode", tokens[:, position : position + 1], position), position, 1)
        position += 1
    return worst
