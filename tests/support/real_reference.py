"""The eager Hugging Face model of a GGUF file, read by transformers itself: no code of flashpte takes part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint


def hugging_face_model(path: Path) -> Any:
    """The causal language model in a file, float32, on the CPU.

    It is what ``from_pretrained(gguf_file=...)`` makes, which needs the package accelerate.
    """
    config = transformers.AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    held = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(held, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert (missing, unexpected) == (tied, []), (missing, unexpected)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The ``count`` most likely tokens after a prompt, one by one, with the whole text in each forward: no cache."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False, logits_to_keep=1).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]
