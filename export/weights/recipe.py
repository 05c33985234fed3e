"""Fills a module with weights in their formats, from a source of weights.

A source (a checkpoint, a seed or a draft's folder) knows weights by the model's names. A recipe gives each name a
format. Planning runs once on the dense module and pairs names with formats; filling reads one weight at a time.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from flashpte.export.common.cpus import usable_cpus
from flashpte.export.common.errors import ExportError
from flashpte.export.common.gc_tuning import return_freed_memory
from flashpte.export.files.mapped_tensors import write_mapped
from flashpte.export.models.build import is_tied
from flashpte.export.weights.formats import FORMATS, Dense
from flashpte.export.weights.quantized import QUANTIZED, QUANTIZED_NAMES, Grouped
from flashpte.export.weights.quantized_embedding import QuantizedEmbedding
from flashpte.export.weights.tied_head import TIED_HEAD, embedding_weight, tie_again, untie_head
from flashpte.kernels.linear.format import Groupwise


class WeightSource(Protocol):
    """A source of a module's weights."""

    def read(self, name: str) -> torch.Tensor | Groupwise:
        """Reads a weight by its name in the module: dense, or as the codes that the source holds."""


_MAPPED_BYTES = 1 << 16
"""Smaller tensors stay in memory: a file takes a page, and two calls of the system."""
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

    def rule_of(self, name: str) -> int | None:
        """The index of the rule that gives a weight its format; ``None`` if none matches."""
        return next((i for i, (pattern, _) in enumerate(self.rules) if re.fullmatch(pattern, name)), None)

    def format_of(self, name: str) -> str:
        """The name of the format for a weight."""
        rule = self.rule_of(name)
        return self.default if rule is None else self.rules[rule][1]

    @property
    def quantizes(self) -> bool:
        """Whether some rule names another format than a dense one."""
        return any(not isinstance(FORMATS[format], Dense) for _, format in self.rules)

    def dense(self) -> Recipe:
        """The recipe with the default's format wherever a rule names one that is not dense."""
        rules = ((p, format if isinstance(FORMATS[format], Dense) else self.default) for p, format in self.rules)
        return Recipe(self.default, tuple(rules))

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
    """One weight of a module.

    Attributes:
        name: its name in the dense module.
        shape: its shape there.
        format: the name of its format.
        source: its name in the source of weights; differs for a head that was tied to the embedding.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    source: str


def plan_weights(module: nn.Module, recipe: Recipe) -> tuple[PlannedWeight, ...]:
    """Assigns formats to the weights of a dense module on the meta device, and adapts the module to them.

    A tied head is untied if a rule gives it another format than the embedding's (:mod:`.tied_head`).

    Raises:
        ExportError: a format cannot hold a weight that a rule assigns to it.
    """
    sources: dict[str, str] = {}
    if is_tied(module) and recipe.rule_of(TIED_HEAD) is not None:
        embedding = embedding_weight(module)
        if recipe.format_of(TIED_HEAD) != recipe.format_of(embedding):
            untie_head(module)
            sources[TIED_HEAD] = embedding
    weights = tuple(
        PlannedWeight(name, tuple(tensor.shape), recipe.format_of(name), sources.get(name, name))
        for name, tensor in module.state_dict().items()
    )
    for weight in weights:
        FORMATS[weight.format].adapt(module, weight.name)
    tie_again(module)
    default = FORMATS[recipe.default]
    for child in module.modules():
        if isinstance(child, QuantizedEmbedding) and isinstance(default, Dense):
            child.dtype = default.dtype
    return weights


def weight_bytes(weights: Sequence[PlannedWeight]) -> int:
    """Bytes of the weights in their formats."""
    return sum(
        math.prod(shape) * dtype.itemsize
        for weight in weights
        for shape, dtype in FORMATS[weight.format].stored(weight.name, weight.shape).values()
    )


def fill_weights(
    module: nn.Module,
    weights: Sequence[PlannedWeight],
    source: WeightSource | None,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Gives a planned module its weights. Each processor reads and quantizes one at a time.

    Args:
        module: the module given to :func:`plan_weights`.
        weights: the result of :func:`plan_weights`.
        source: the source of the weights; ``None`` for untouched memory, which is enough to trace a model of any size
            but not to run it.
        folder: an empty folder for the weights' bytes, which must stay as long as the module; nobody may write to its
            weights then. ``None`` to keep them in memory.
        progress: called after each weight with the bytes that are done, and all bytes.

    Raises:
        ExportError: a weight cannot be read, or does not fit its format.
    """
    tensors: dict[str, torch.Tensor] = {}
    if source is None:
        for weight in weights:
            stored = FORMATS[weight.format].stored(weight.name, weight.shape)
            tensors |= {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored.items()}
    else:
        done, total = 0, weight_bytes(weights)
        for encoded in _each_encoded(weights, source, folder):
            tensors |= encoded
            done += sum(tensor.nbytes for tensor in encoded.values())
            if progress is not None:
                progress(done, total)
        return_freed_memory()
    module.load_state_dict(tensors, assign=True)


def _each_encoded(
    weights: Sequence[PlannedWeight], source: WeightSource, folder: Path | None
) -> Iterator[Mapping[str, torch.Tensor]]:
    def encode(number: int) -> Mapping[str, torch.Tensor]:
        tensors = _encoded(weights[number], source.read(weights[number].source))
        if folder is None:
            return tensors
        return {
            name: write_mapped(tensor, folder / f"{number}-{part}") if tensor.nbytes >= _MAPPED_BYTES else tensor
            for part, (name, tensor) in enumerate(tensors.items())
        }

    # Operators of several threads that use several threads each would wait for each other.
    threads = torch.get_num_threads()
    pool = concurrent.futures.ThreadPoolExecutor(usable_cpus(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(encode, range(len(weights)))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


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
