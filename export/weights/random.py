"""Random weights, the same for the same seed on every machine."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import nn

from flashpte.export.models.build import is_tied

_HEAD_LEAN = 1.0
"""How much of the embedding of token t - 1 the random head has in row t, beside noise of the same size."""


def tensor_generator(seed: int, name: str) -> torch.Generator:
    """A stream per tensor: cutting layers or visiting tensors in another order changes no other tensor."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_tensor(name: str, shape: torch.Size, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """One weight: uniform; a standard deviation near 1/sqrt(fan-in) for a matrix, in [0.5, 1.5] for a norm or scale.

    Uniform values between powers of two need neither transcendental functions nor an inexact product, so they are the
    same on every CPU. Norm weights differ from one so that a forgotten or swapped one shows. The dtype is drawn
    directly, with no float32 copy.
    """
    tensor = torch.empty(shape, dtype=dtype)
    generator = tensor_generator(seed, name)
    if name.endswith(".bias"):
        return tensor.uniform_(-0.125, 0.125, generator=generator)
    if len(shape) < 2:
        return tensor.uniform_(0.5, 1.5, generator=generator)
    bound = 2.0 ** round(math.log2(math.sqrt(3.0 / shape[-1])))
    return tensor.uniform_(-bound, bound, generator=generator)


def fill_random(model: nn.Module, dtype: torch.dtype, seed: int) -> None:
    """Gives every parameter and persistent buffer of a model on the meta device random values of ``dtype``.

    Three groups are then scaled so that rounding moves the logits by little, as in a trained model, and a program can
    be compared with another one of the same dtype. All factors are powers of two.

    * Norms of queries and keys: attention scores have a deviation near one. Without, a model whose scores are not
      divided by sqrt(D) attends to one key, and rounding chooses which.
    * Embeddings that no model scales: rows have elements near one, as what the layers add to them has.
    * An output projection of its own leans towards the embedding of the token before: the greedy continuation walks
      through the vocabulary, its first choice ahead of the second by more than rounding moves.
    """
    weights = {name: random_tensor(name, t.shape, dtype, seed) for name, t in model.state_dict().items()}
    for name, module in model.named_modules():
        factor = _score_norm_factor(module)
        for norm in ("q_norm.weight", "k_norm.weight"):
            if f"{name}.{norm}" in weights:
                weights[f"{name}.{norm}"] *= factor
    if not is_tied(model):
        _align_head(model, weights)
    model.load_state_dict(weights, assign=True)


def _score_norm_factor(attention: Any) -> float:
    """For normed queries and keys of dimension D, whose products have a deviation near sqrt(D) times the scaling."""
    if not hasattr(attention, "q_norm") or not hasattr(attention, "scaling"):
        return 1.0
    deviation = attention.scaling * math.sqrt(attention.head_dim)
    return float(2.0 ** min(0, round(-math.log2(deviation) / 2)))


def _align_head(model: Any, weights: dict[str, torch.Tensor]) -> None:
    embedding = model.get_input_embeddings()
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    rows, head = weights[names[id(embedding.weight)]], weights[names[id(model.lm_head.weight)]]
    unit = 2.0 ** round(math.log2(math.sqrt(rows.shape[-1])))  # 1 / the deviation that random_tensor gives
    head += _HEAD_LEAN * rows.roll(1, 0)
    if not hasattr(embedding, "embed_scale"):
        rows *= unit


def fill_uninitialised(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives every weight memory without touching it: enough to trace a model of any size, not to run it."""
    weights = {name: torch.empty(t.shape, dtype=dtype) for name, t in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
