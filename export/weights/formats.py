"""Weight formats: how a program stores a weight.

A format takes the dense tensor of a weight, as a checkpoint holds it, and returns the tensors that the program holds
instead. A dense format returns one tensor, in its dtype. A format of 4 or 8 bits returns packed codes and scales, and
replaces the linear layer by a module that reads them (:mod:`flashpte.export.weights.quantized`); it also takes the
codes of a quantized checkpoint. A new format is a class in its own file and a row in :data:`FORMATS`; a recipe
(:mod:`flashpte.export.weights.recipe`) chooses the weights that get it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from flashpte.export.weights.quantized import QUANTIZED


class WeightFormat(Protocol):
    """How a weight is stored in a program. Names are those of a module's ``state_dict``."""

    def adapt(self, module: nn.Module, name: str) -> None:
        """Makes a module on the meta device read the tensors of :meth:`stored` instead of the weight ``name``.

        A module that replaces a linear layer keeps its ``in_features`` and ``out_features``.

        Raises:
            ExportError: the format cannot hold this weight.
        """

    def stored(self, name: str, shape: Sequence[int]) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the tensors that replace a weight of shape ``shape``, by their names."""

    def encode(self, name: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Makes the tensors of :meth:`stored` from the dense weight."""


@dataclasses.dataclass(frozen=True)
class Dense:
    """Stores a weight as one tensor of ``dtype``, under its own name."""

    dtype: torch.dtype

    def adapt(self, module: nn.Module, name: str) -> None:
        """Changes nothing: the module reads the weight directly."""

    def stored(self, name: str, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The weight's own name and shape, in this dtype."""
        return {name: (tuple(shape), self.dtype)}

    def encode(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weight, cast to this dtype."""
        return {name: weight.to(self.dtype)}


FORMATS: dict[str, WeightFormat] = {
    "bfloat16": Dense(torch.bfloat16),
    "float16": Dense(torch.float16),
    "float32": Dense(torch.float32),
    "int64": Dense(torch.int64),
    **QUANTIZED,
}
"""Every format, by its name in recipes and manifests."""
