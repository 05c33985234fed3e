"""What a program holds in the place of a weight: formats, by name.

A format takes the dense tensor of a weight, as a checkpoint holds it, and gives the tensors that the program holds
instead. A dense format gives one, of its dtype. A 4-bit format would give two (packed values and scales) and put a
module that reads them where the linear layer was. A new format is a class in a file of its own and a row in
:data:`FORMATS`; a recipe (:mod:`flashpte.export.weights.recipe`) says which weights get it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import nn


class WeightFormat(Protocol):
    """How a weight is stored in a program. Names are those of a module's ``state_dict``."""

    def adapt(self, module: nn.Module, name: str) -> None:
        """Makes a module on the meta device read the tensors of :meth:`stored` in the place of the weight ``name``.

        What takes the place of a linear layer keeps its ``in_features`` and ``out_features``.

        Raises:
            ExportError: the format cannot hold this weight.
        """

    def stored(self, name: str, shape: Sequence[int]) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the tensors in the place of a weight of a shape, by their names."""

    def encode(self, name: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Those tensors, from the dense weight."""


@dataclasses.dataclass(frozen=True)
class Dense:
    """One tensor of a dtype, under the weight's own name."""

    dtype: torch.dtype

    def adapt(self, module: nn.Module, name: str) -> None:
        """The module reads it as it is."""

    def stored(self, name: str, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The weight itself."""
        return {name: (tuple(shape), self.dtype)}

    def encode(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weight, cast."""
        return {name: weight.to(self.dtype)}


FORMATS: dict[str, WeightFormat] = {
    "bfloat16": Dense(torch.bfloat16),
    "float16": Dense(torch.float16),
    "float32": Dense(torch.float32),
    "int64": Dense(torch.int64),
}
"""Every format by the name that recipes and manifests give it."""
