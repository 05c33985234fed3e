"""Random weights, the same for the same seed and dtype on every machine with the same release of PyTorch.

(Releases differ in how they draw bfloat16: 2.11 and 2.13 give other weights.)
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import nn

from flashpte.export.models.build import is_tied

_HEAD_LEAN = 1.0
"""Factor of the embedding of token t - 1 in row t of the random head, added to noise of the same size."""


def tensor_generator(seed: int, name: str) -> torch.Generator:
    """A random stream for one tensor, so that cutting layers or reordering tensors changes no other tensor."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_tensor(name: str, shape: torch.Size, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Draws one weight from a uniform distribution, directly in its dtype, without a float32 copy.

    A matrix has a standard deviation near 1/sqrt(fan-in), a norm or scale lies in [0.5, 1.5], and a bias in
    [-0.125, 0.125]. Uniform values between powers of two need neither transcendental functions nor inexact products, so
    they are the same on every CPU. Norm weights differ from 1 so that a forgotten or swapped one shows.
    """
    tensor = torch.empty(shape, dtype=dtype)
    generator = tensor_generator(seed, name)
    if name.endswith(".bias"):
        return tensor.uniform_(-0.125, 0.125, generator=generator)
    if len(shape) < 2:
        return tensor.uniform_(0.5, 1.5, generator=generator)
    bound = 2.0 ** round(math.log2(math.sqrt(3.0 / shape[-1])))
    return tensor.uniform_(-bound, bound, generator=generator)


class RandomWeights:
    """Random values of a dtype for every parameter and persistent buffer of a dense model on the meta device.

    Three groups are scaled so that rounding moves the logits only a little, as in a trained model. Two programs of the
    same dtype can then be compared. All factors are powers of two.

    * Norms of queries and keys are scaled so that attention scores have a standard deviation near 1. Otherwise a model
      that does not divide its scores by sqrt(D) would attend to one key, and rounding would choose which.
    * Embeddings that the model does not scale get elements near 1, like the values that the layers add to them.
    * An untied output projection leans towards the embedding of the previous token. Greedy decoding then walks through
      the vocabulary, and its first choice leads the second by more than the rounding.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, seed: int):
        self._dtype, self._seed = dtype, seed
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._factors: dict[str, float] = {}
        for name, module in model.named_modules():
            factor = _score_norm_factor(module)
            self._factors |= {f"{name}.{norm}": factor for norm in ("q_norm.weight", "k_norm.weight")}
        self._head: str | None = None
        self._embedding: str | None = None
        if not is_tied(model):
            untyped: Any = model
            embedding = untyped.get_input_embeddings()
            names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
            self._embedding, self._head = names[id(embedding.weight)], names[id(untyped.lm_head.weight)]
            if not hasattr(embedding, "embed_scale"):
                # 1 / the standard deviation of random_tensor
                self._factors[self._embedding] = 2.0 ** round(math.log2(math.sqrt(embedding.weight.shape[-1])))

    def read(self, name: str) -> torch.Tensor:
        """Draws a weight by its name in the model."""
        tensor = self._drawn(name)
        if name == self._head and self._embedding is not None:
            tensor += _HEAD_LEAN * self._drawn(self._embedding).roll(1, 0)
        factor = self._factors.get(name, 1.0)
        return tensor if factor == 1.0 else tensor.mul_(factor)

    def _drawn(self, name: str) -> torch.Tensor:
        return random_tensor(name, self._shapes[name], self._dtype, self._seed)


def _score_norm_factor(attention: Any) -> float:
    """Factor for norms of queries and keys; the scores' standard deviation is near sqrt(D) times ``scaling``."""
    if not hasattr(attention, "q_norm") or not hasattr(attention, "scaling"):
        return 1.0
    deviation = attention.scaling * math.sqrt(attention.head_dim)
    return float(2.0 ** min(0, round(-math.log2(deviation) / 2)))
