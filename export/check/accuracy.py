"""How far a quantized model is from the dense one: what the formats cost, not an error of the program."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

_ROWS = 256
"""Rows that are widened at a time."""


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Logits of the quantized model against those of the dense one.

    Attributes:
        relative_error: rms error over the rms of the dense logits.
        divergence: mean over positions of the Kullback-Leibler divergence from the dense model, in nats.
        agreement: share of positions at which both have the same most likely token.
        positions: number of positions.
    """

    relative_error: float
    divergence: float
    agreement: float
    positions: int

    def to_dict(self) -> dict[str, Any]:
        """The measurement as plain data, for JSON."""
        return dataclasses.asdict(self)

    def line(self) -> str:
        """The measurement for people."""
        return (
            f"{LABEL}: relative logits error {self.relative_error:.3g}, KL divergence {self.divergence:.3g} nats, "
            f"top-1 agreement {100 * self.agreement:.1f}% of {self.positions} positions (not a condition)"
        )


LABEL = "accuracy against the unquantized model"


def compare_with_dense(quantized: torch.Tensor, dense: torch.Tensor) -> Accuracy:
    """Compares logits [N, V] of the same positions.

    Args:
        quantized: of the model with dequantized weights.
        dense: of the model with the weights before they were quantized.
    """
    error = power = divergence = 0.0
    agreeing = 0
    for mine, theirs in zip(quantized.split(_ROWS), dense.split(_ROWS), strict=True):
        found, truth = mine.double(), theirs.double()
        error += float((found - truth).square().sum())
        power += float(truth.square().sum())
        log_p, log_q = truth.log_softmax(-1), found.log_softmax(-1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        agreeing += int((found.argmax(-1) == truth.argmax(-1)).sum())
    count = len(dense)
    relative = (error / power) ** 0.5 if power > 0 else float(error > 0)
    return Accuracy(relative, divergence / count, agreeing / count, count)
