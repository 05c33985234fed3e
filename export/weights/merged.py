"""Weights that a published checkpoint holds in pieces and the model holds as one, such as those of all experts.

transformers converts them when it loads a checkpoint. Its own tables say how; the two operations that they use for
experts are done here, one weight at a time.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flashpte.export.common.errors import ExportError

_NUMBER = r"(\d+)"


@dataclasses.dataclass(frozen=True)
class Merged:
    """One weight of the model.

    Attributes:
        parts: names of the checkpoint's tensors: for each part along ``dim``, those that are stacked, in order.
        dim: the dimension, after stacking, along which the stacks follow each other.
    """

    parts: tuple[tuple[str, ...], ...]
    dim: int

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The weight's shape, given those of the checkpoint's tensors.

        Raises:
            ExportError: pieces that must be alike are not.
        """
        stacks = []
        for names in self.parts:
            for name in names:
                if shapes[name] != shapes[names[0]]:
                    raise ExportError(
                        f"tensor {name} has shape {list(shapes[name])}, {names[0]} {list(shapes[names[0]])}"
                    )
            stacks.append([len(names), *shapes[names[0]]])
        size = sum(stack[self.dim] for stack in stacks)
        return (*stacks[0][: self.dim], size, *stacks[0][self.dim + 1 :])


def merged_names(model_type: str, names: Iterable[str]) -> tuple[dict[str, str], dict[str, Merged]]:
    """How transformers renames and merges a checkpoint's tensors for a type of model.

    Args:
        model_type: of the config.
        names: the checkpoint's names.

    Returns:
        New names of tensors that stay whole, by name, without those that keep theirs; and the merged weights by name.

    Raises:
        ExportError: pieces of a weight are missing, or transformers has another operation for them.
    """
    renamings, converters = _tables(model_type)
    renamed: dict[str, str] = {}
    pieces: dict[tuple[int, str], dict[int, dict[int, str]]] = {}
    for name in names:
        found = name
        for source, target in renamings:
            found = re.sub(source, target, found)
        for number, converter in enumerate(converters):
            for part, pattern in enumerate(converter.source_patterns):
                match = re.fullmatch(f"(.*?){_NUMBER.join(map(re.escape, pattern.split('*')))}", found)
                if match is not None and "*" in pattern:
                    place = f"{match[1]}{converter.target_patterns[0]}"
                    pieces.setdefault((number, place), {}).setdefault(part, {})[int(match[2])] = name
        if found != name:
            renamed[name] = found
    merged = {}
    for (number, place), parts in pieces.items():
        converter = converters[number]
        count = 1 + max(index for stack in parts.values() for index in stack)
        for part, pattern in enumerate(converter.source_patterns):
            absent = [index for index in range(count) if index not in parts.get(part, {})]
            if absent:
                missing = pattern.replace("*", str(absent[0]))
                raise ExportError(
                    f"the checkpoint has no tensor {place.removesuffix(converter.target_patterns[0])}{missing}"
                )
        stacks = tuple(tuple(parts[part][i] for i in range(count)) for part in range(len(converter.source_patterns)))
        merged[place] = Merged(stacks, _dim(converter, place))
    return renamed, merged


def _tables(model_type: str) -> tuple[Sequence[tuple[str, str]], Sequence[Any]]:
    """Renamings and converters of a type of model."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    entries = get_checkpoint_conversion_mapping(model_type) or ()
    renamings = [
        (source, target)
        for entry in entries
        if type(entry).__name__ == "WeightRenaming"
        for source, target in zip(entry.source_patterns, entry.target_patterns, strict=True)
    ]
    return renamings, [entry for entry in entries if type(entry).__name__ == "WeightConverter"]


def _dim(converter: Any, place: str) -> int:
    """The dimension of a converter's concatenation; 0 if it only stacks."""
    operations: list[tuple[str, Any]] = [(type(o).__name__, getattr(o, "dim", None)) for o in converter.operations]
    if operations == [("MergeModulelist", 0)] and len(converter.source_patterns) == 1:
        return 0
    if len(operations) == 2 and operations[0] == ("MergeModulelist", 0) and operations[1][0] == "Concatenate":
        dim: int = operations[1][1]
        return dim
    raise ExportError(f"{place} is made of several tensors by operations that are not known: {operations}")
