"""Recipe files: rules that give weights their formats, as JSON or TOML.

A file holds ``rules``, a list of pairs of a regular expression for the whole name of a weight and the name of a format.
The first rule that matches counts, and weights that match none keep the export's dtype, which rules call ``dense``::

    rules = [
      ['model\\.layers\\.0\\..*_proj\\.weight', 'dense'],
      ['.*\\.(v_proj|down_proj)\\.weight', 'int8'],
      ['.*_proj\\.weight', 'int4-g32'],
    ]

The manifest of an export lists its rules in the same way (``weight_formats``).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from flashpte.export.common.errors import ExportError
from flashpte.export.weights.quantized import QUANTIZED
from flashpte.export.weights.recipe import Recipe

DENSE = "dense"
"""The format that stands for the export's dtype."""

Rules = tuple[tuple[str, str], ...]


def read_recipe_file(path: Path, dtype: str) -> Recipe:
    """Reads a recipe file.

    Args:
        path: a file whose name ends in ``.json`` or ``.toml``.
        dtype: the export's dtype.

    Raises:
        ExportError: the file cannot be read, is neither JSON nor TOML, or holds something else than rules; a format is
            unknown or not for dense weights, or an expression is not valid.
    """
    rules = _read(path).get("rules")
    if not isinstance(rules, list) or not rules:
        raise ExportError(f"recipe {path} has no rules: a list of pairs [regular expression, format]")
    pairs: list[tuple[str, str]] = []
    for number, rule in enumerate(rules, 1):
        if not (isinstance(rule, list) and len(rule) == 2 and all(isinstance(part, str) for part in rule)):
            raise ExportError(f"recipe {path}, rule {number}: {rule!r} is not a pair [regular expression, format]")
        pairs.append((rule[0], dtype if rule[1] == DENSE else rule[1]))
        if rule[1] in QUANTIZED and QUANTIZED[rule[1]].moved == "offsets":
            raise ExportError(f"recipe {path}, rule {number}: {rule[1]} is for codes of quantized files")
    try:
        return Recipe(dtype, tuple(pairs))
    except ExportError as error:
        raise ExportError(f"recipe {path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    parsers = {".json": json.loads, ".toml": tomllib.loads}
    if path.suffix.lower() not in parsers:
        raise ExportError(f"recipe {path}: the name must end in .json or .toml")
    try:
        entries = parsers[path.suffix.lower()](path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"cannot read recipe {path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, JSON or TOML
        raise ExportError(f"recipe {path} is not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(entries, dict):
        raise ExportError(f"recipe {path} holds a {type(entries).__name__}, not an object with rules")
    if unknown := sorted(entries.keys() - {"rules"}):
        raise ExportError(f"recipe {path}: unknown entry {unknown[0]!r}; it may only hold rules")
    return entries


def check_rules_match(recipe: Recipe, names: Collection[str], origin: str) -> None:
    """Checks that each rule of a recipe gives some weight its format.

    Args:
        recipe: the recipe.
        names: the names of the model's weights.
        origin: where the rules come from, for the error.

    Raises:
        ExportError: a rule matches no weight, or only weights that rules before it match.
    """
    chosen = {recipe.rule_of(name) for name in names}
    for index, (pattern, _) in enumerate(recipe.rules):
        if index in chosen:
            continue
        alone = Recipe(recipe.default, (recipe.rules[index],))
        hidden = next((name for name in names if alone.rule_of(name) is not None), None)
        what = "matches no weight of this model" if hidden is None else f"is never used: rules before it match {hidden}"
        raise ExportError(f"{origin}, rule {index + 1}: {pattern!r} {what}")
