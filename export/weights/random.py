"""Random weights, the same for the same seed on every machine."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn


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
    """Gives every parameter and persistent buffer of a model on the meta device random values of ``dtype``."""
    weights = {name: random_tensor(name, t.shape, dtype, seed) for name, t in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)


def fill_uninitialised(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives every weight memory without touching it: enough to trace a model of any size, not to run it."""
    weights = {name: torch.empty(t.shape, dtype=dtype) for name, t in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
