"""Formats of an output projection that is tied to the embedding.

A tied head has no weight of its own: it follows the embedding's format and reads the embedding's tensors. A rule that
gives ``lm_head.weight`` another format unties it: the head then has its own tensors, made from the same dense weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flashpte.export.models.build import TiedHead, embedding_name, is_tied

TIED_HEAD = "lm_head.weight"
"""Name of a tied head's weight in recipes."""


def embedding_weight(model: nn.Module) -> str:
    """The name of a causal language model's embedding."""
    return f"{embedding_name(model)}.weight"


def untie_head(model: nn.Module) -> None:
    """Gives a dense model with a tied head a linear layer on the meta device instead."""
    untyped: Any = model
    embedding = untyped.get_input_embeddings()
    with torch.device("meta"):
        head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, dtype=embedding.weight.dtype)
    untyped.lm_head = head.eval().requires_grad_(False)


def tie_again(model: nn.Module) -> None:
    """Makes a tied head read the embedding that the model has now."""
    if is_tied(model):
        untyped: Any = model
        untyped.lm_head = TiedHead(untyped.get_input_embeddings())
