"""Tensors of a case: sets of inputs that rotate beyond L2, its mask in every form, and what is right."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property

import torch

from flashpte.kernels import attention_reference
from harness.cases import Case

DEVICE = "cuda"
LEAST = torch.iinfo(torch.int64).min
ROTATED_BYTES = 300e6  # several times what L2 keeps
SAMPLED_ROWS = 64
LARGEST_ERROR = 1e-2


def random(*shape: int, device: str | None = None) -> torch.Tensor:
    """Normal bf16 numbers."""
    return torch.randn(*shape, device=device or DEVICE, dtype=torch.bfloat16)


def forms(positions: torch.Tensor, keys: int, window: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A causal (windowed) mask as a dense tensor ``[1, 1, L_q, L_kv]`` and as bounds ``[2, 1, L_q]``."""
    index = torch.arange(keys, device=positions.device)
    lower = torch.full_like(positions, LEAST) if window is None else positions - window + 1
    dense = (index <= positions[:, None]) & (index >= lower[:, None])
    return dense[None, None], torch.stack([lower, positions])[:, None]


def rotations(input_bytes: int) -> int:
    """Sets of inputs such that together they do not stay in L2."""
    return max(1, min(64, math.ceil(ROTATED_BYTES / input_bytes)))


@dataclasses.dataclass
class Inputs:
    """A case's ``sets`` of query ``[B, H_q, M, D]``, key ``[B, H_kv, L, D]``, value ``[B, H_kv, L, D_v]``."""

    case: Case
    sets: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    @property
    def device(self) -> torch.device:
        return self.sets[0][0].device

    @classmethod
    def make(cls, case: Case, count: int | None = None, device: str | None = None) -> Inputs:
        """Random inputs; by default as many sets as rotate beyond L2."""
        shape = case.shape
        cache = (case.batch, shape.heads_kv, case.length, shape.head_dim)
        query = (case.batch, shape.heads_q, case.rows, shape.head_dim)
        count = rotations(case.input_bytes) if count is None else count
        sets = []
        for _ in range(count):
            q, k = random(*query, device=device), random(*cache, device=device)
            latent = shape.latent_values
            sets.append((q, k, random(*cache, device=device) if latent is None else k[..., :latent]))
        return cls(case, sets)

    @cached_property
    def positions(self) -> torch.Tensor:
        return torch.arange(self.case.rows, device=self.device) + self.case.live - self.case.rows

    @cached_property
    def bounds(self) -> torch.Tensor:
        return forms(self.positions, 0, self.case.window)[1]

    @cached_property
    def mask(self) -> torch.Tensor:
        return forms(self.positions, self.case.length, self.case.window)[0]

    @cached_property
    def live_mask(self) -> torch.Tensor:
        """The mask over the context alone, for who is told its length."""
        return self.mask[..., : self.case.live].contiguous()

    @cached_property
    def live_sets(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Inputs whose keys and values are the context alone."""
        live = self.case.live
        return [(q, k[:, :, :live], v[:, :, :live]) for q, k, v in self.sets]

    @cached_property
    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sampled row numbers, and float32 attention of those rows of the first set, all heads."""
        q, k, v = self.live_sets[0]
        rows = torch.arange(self.case.rows, device=self.device)
        if self.case.rows > SAMPLED_ROWS:
            rows = torch.randperm(self.case.rows, device=self.device)[:SAMPLED_ROWS].sort().values
        mask = forms(self.positions[rows], self.case.live, self.case.window)[0]
        out = [
            attention_reference(q[:, h : h + g].float()[:, :, rows], k[:, i : i + 1], v[:, i : i + 1], mask,
                                False, self.case.shape.scale)
            for g in [self.case.shape.group]
            for i, h in enumerate(range(0, q.shape[1], g))
        ]  # fmt: skip
        return rows, torch.cat(out, 1)

    def error(self, call: Callable[[], torch.Tensor]) -> float:
        """Relative error of a call on the first set, which returns ``[B, H_q, M, D_v]``."""
        rows, expected = self.expected
        return float((call()[:, :, rows].float() - expected).norm() / expected.norm())
