"""Fills a module with weights in their formats, from a source of weights.

A source (a checkpoint, a seed or a draft's folder) knows weights by the model's names. A recipe gives each name a
format. Planning runs once on the dense module and pairs names with formats; filling reads one weight at a time.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from flashpte.export.common.errors import ExportError
from flashpte.export.weights.formats import FORMATS
from flashpte.export.weights.quantized import QUANTIZED, QUANTIZED_NAMES, Grouped
from flashpte.kernels.linear.format import Groupwise


class WeightSource(Protocol):
    """A source of a module's weights."""

    def read(self, name: str) -> torch.Tensor | Groupwise:
        """Reads a weight by its name in the module: dense, or as the codes that the source holds."""


_NUMBER = re.compile(r"\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Assigns a format to each weight by its name.

    Attributes:
        default: the format of weights that match no rule.
        rules: pairs of a regular expression, which must match the whole name, and a format; the first match counts.

    Raises:
        ExportError: a format is unknown, or an expression is not valid.
    """

    default: str
    rules: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in (self.default, *(format for _, format in self.rules)):
            if name not in FORMATS:
                known = ", ".join(known for known in FORMATS if known not in QUANTIZED)
                raise ExportError(f"unknown weight format {name!r}; known: {known}, {QUANTIZED_NAMES}")
        for pattern, _ in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ExportError(f"weight formats: {pattern!r} is not a regular expression ({error})") from error

    def format_of(self, name: str) -> str:
        """The name of the format for a weight."""
        return next((format for pattern, format in self.rules if re.fullmatch(pattern, name)), self.default)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, for the manifest."""
        return {"default": self.default, "rules": [list(rule) for rule in self.rules]}


def read_recipe(entry: Any, dtype: str) -> Recipe:
    """Reads the recipe in a manifest's ``weight_formats``; without that entry every weight has the model's dtype.

    Raises:
        ExportError: the entry is not as ``export-model`` writes it, or names a format that this version does not know.
    """
    if entry is None:
        return Recipe(dtype)
    try:
        return Recipe(str(entry["default"]), tuple((str(pattern), str(format)) for pattern, format in entry["rules"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(f"cannot read the manifest's weight_formats ({error!r})") from error


@dataclasses.dataclass(frozen=True)
class PlannedWeight:
    """One weight of a module: the name and shape of its dense tensor, and its format."""

    name: str
    shape: tuple[int, ...]
    format: str


def plan_weights(module: nn.Module, recipe: Recipe) -> tuple[PlannedWeight, ...]:
    """Assigns formats to the weights of a dense module on the meta device, and adapts the module to them.

    Raises:
        ExportError: a format cannot hold a weight that a rule assigns to it.
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
        module: the module given to :func:`plan_weights`.
        weights: the result of :func:`plan_weights`.
        source: the source of the weights; ``None`` for untouched memory, which is enough to trace a model of any size
            but not to run it.

    Raises:
        ExportError: a weight cannot be read, or does not fit its format.
    """
    tensors: dict[str, torch.Tensor] = {}
    for weight in weights:
        format = FORMATS[weight.format]
        if source is None:
            stored = format.stored(weight.name, weight.shape)
            tensors |= {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored.items()}
        else:
            tensors |= _encoded(weight, source.read(weight.name))
    module.load_state_dict(tensors, assign=True)


def _encoded(weight: PlannedWeight, held: torch.Tensor | Groupwise) -> Mapping[str, torch.Tensor]:
    format = FORMATS[weight.format]
    if not isinstance(held, Groupwise):
        return format.encode(weight.name, held)
    if not isinstance(format, Grouped):
        raise ExportError(f"{weight.name} is quantized in its checkpoint, the recipe makes it {weight.format}")
    return format.pack(weight.name, held)


def formats_of(source: object) -> Mapping[str, str]:
    """The format of each weight that a source holds as codes, or rounds itself; most sources have none."""
    return getattr(source, "formats", {})


def rules_of(formats: Mapping[str, str], names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Rules for the weights of a quantized checkpoint, one for each kind of weight and format.

    Args:
        formats: the format of each quantized weight, by the weight's name.
        names: the names of all weights.

    Returns:
        Pairs for :attr:`Recipe.rules`. Weights that differ in one number, that of their layer, share a rule.
    """
    kinds: dict[str, dict[str | None, list[str]]] = {}
    for name in names:
        number = _NUMBER.search(name)
        place = name if number is None else f"{name[: number.start(1)]}*{name[number.end(1) :]}"
        kinds.setdefault(place, {}).setdefault(formats.get(name), []).append("" if number is None else number[1])
    rules = []
    for place, layers_of in kinds.items():
        for format, layers in layers_of.items():
            if format is not None:
                any_of = r"\d+" if len(layers_of) == 1 else f"(?:{'|'.join(layers)})"
                rules.append((any_of.join(map(re.escape, place.split("*", 1))), format))
    return tuple(rules)
