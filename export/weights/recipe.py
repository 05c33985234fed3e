"""From a source of dense weights to a module that holds them in their formats.

A source knows weights by the model's names: a checkpoint, a seed, a draft's folder. A recipe gives each name a format.
Planning, done once on the dense module, pairs them; filling reads one weight after another.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from flashpte.export.common.errors import ExportError
from flashpte.export.weights.formats import FORMATS


class WeightSource(Protocol):
    """Where the weights of a module come from."""

    def read(self, name: str) -> torch.Tensor:
        """A dense weight by its name in the module."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Which format a weight gets, by its name.

    Attributes:
        default: the format of a weight that no rule names.
        rules: pairs of a regular expression, which must match the whole name, and a format; the first match counts.

    Raises:
        ExportError: there is no such format, or an expression is none.
    """

    default: str
    rules: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in (self.default, *(format for _, format in self.rules)):
            if name not in FORMATS:
                raise ExportError(f"unknown weight format {name!r}; known: {', '.join(FORMATS)}")
        for pattern, _ in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ExportError(f"weight formats: {pattern!r} is not a regular expression ({error})") from error

    def format_of(self, name: str) -> str:
        """The name of a weight's format."""
        return next((format for pattern, format in self.rules if re.fullmatch(pattern, name)), self.default)

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"default": self.default, "rules": [list(rule) for rule in self.rules]}


def read_recipe(entry: Any, dtype: str) -> Recipe:
    """The recipe in a manifest's ``weight_formats``; one without says that every weight has the model's dtype.

    Raises:
        ExportError: it is not as ``export-model`` writes it, or names a format that this version does not know.
    """
    if entry is None:
        return Recipe(dtype)
    try:
        return Recipe(str(entry["default"]), tuple((str(pattern), str(format)) for pattern, format in entry["rules"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(f"cannot read the manifest's weight_formats ({error!r})") from error


@dataclasses.dataclass(frozen=True)
class PlannedWeight:
    """One weight of a module: its name and shape while it is dense, and the format it gets."""

    name: str
    shape: tuple[int, ...]
    format: str


def plan_weights(module: nn.Module, recipe: Recipe) -> tuple[PlannedWeight, ...]:
    """The weights of a dense module on the meta device, which then reads them in their formats.

    Raises:
        ExportError: a format cannot hold a weight that a rule gives it.
    """
    weights = tuple(
        PlannedWeight(name, tuple(tensor.shape), recipe.format_of(name)) for name, tensor in module.state_dict().items()
    )
    for weight in weights:
        FORMATS[weight.format].adapt(module, weight.name)
    return weights


def fill_weights(module: nn.Module, weights: Sequence[PlannedWeight], source: WeightSource | None) -> None:
    """Gives a planned module its weights, one at a time.

    Args:
        module: what :func:`plan_weights` was given.
        weights: what it returned.
        source: where they come from; ``None`` for memory that nobody has touched, enough to trace a model of any size
            but not to run it.
    """
    tensors: dict[str, torch.Tensor] = {}
    for weight in weights:
        format = FORMATS[weight.format]
        if source is None:
            stored = format.stored(weight.name, weight.shape)
            tensors |= {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored.items()}
        else:
            tensors |= format.encode(weight.name, source.read(weight.name))
    module.load_state_dict(tensors, assign=True)
