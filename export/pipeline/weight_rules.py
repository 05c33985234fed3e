"""Rules of a recipe from an export's options: ``qlinear``, ``qhead``, ``qembedding``, or ``qrecipe``.

Presets of ``qrecipe``:

* ``default``: linear layers in 4 bits with a scale per 32 columns, embedding and head in 8 bits with a scale per row.
* ``sensitive``: the same, but 8 bits for ``v_proj`` and ``down_proj`` of every layer, and for all linear layers of the
  first and the last sixteenth of the layers (at least one each).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from flashpte.export.common.options import DEFAULT_QLINEAR_GROUP_SIZE, QRECIPE_NAMES, ExportOptions
from flashpte.export.models.build import decoder_layers, is_tied
from flashpte.export.weights.recipe_file import Rules, check_rules_match, read_recipe_file
from flashpte.export.weights.tied_head import TIED_HEAD, embedding_weight

EDGE_SHARE = 16
"""The recipe ``sensitive`` gives 8 bits to one layer in 16 at each end of the model."""

SENSITIVE_LAYERS = ("v_proj", "down_proj")


def weight_rules(model: nn.Module, options: ExportOptions) -> Rules:
    """Pairs of a regular expression for whole names of weights and a format; the first match counts.

    Args:
        model: the dense model on the meta device, with all of its layers, so that rules do not depend on
            ``options.layers``.
        options: valid options.

    Raises:
        ExportError: the recipe file is broken, or one of its rules is not used by this model.
    """
    name = options.qrecipe
    if name is None:
        linear = () if options.qlinear is None else _linear_rules(model, _linear_format(options))
        return (*linear, *_other_rules(model, options.qhead, options.qembedding, options.qalgorithm))
    if name not in QRECIPE_NAMES:
        path = Path(name)
        recipe = read_recipe_file(path, options.dtype)
        names = [*model.state_dict(), *([TIED_HEAD] if is_tied(model) else [])]
        check_rules_match(recipe, names, f"recipe {path}")
        return recipe.rules
    wide = _sensitive_rules(model) if name == "sensitive" else ()
    narrow = _linear_rules(model, _format("4w", options.qalgorithm))
    return (*wide, *narrow, *_other_rules(model, "8w", "8w", options.qalgorithm))


def _format(bits: str, algorithm: str, group: int | None = None) -> str:
    """The name of a format; 4 bits need a group, 8 bits without one have a scale per row."""
    if bits == "8w":
        return "int8" if group is None else f"int8-g{group}"
    name = f"int4-g{group or DEFAULT_QLINEAR_GROUP_SIZE}"
    return name if algorithm == "rtn" else f"{name}-{algorithm}"


def _linear_format(options: ExportOptions) -> str:
    return _format(str(options.qlinear), options.qalgorithm, options.qlinear_group_size)


def _linear_rules(model: nn.Module, format: str) -> Rules:
    """One rule for each kind of linear layer, for its weights in all layers."""
    names = {module: name for name, module in model.named_modules()}
    patterns: dict[str, None] = {}
    for layer in decoder_layers(model):
        place = re.sub(r"\\\.\d+$", r"\\.\\d+", re.escape(names[layer]))
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                patterns[rf"{place}\.{re.escape(name)}\.weight"] = None
    return tuple((pattern, format) for pattern in patterns)


def _sensitive_rules(model: nn.Module) -> Rules:
    layers = decoder_layers(model)
    place = re.escape(next(name for name, module in model.named_modules() if module is layers))
    edge = max(1, len(layers) // EDGE_SHARE)
    numbers = sorted({*range(edge), *range(len(layers) - edge, len(layers))})
    kinds = {name for layer in layers for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    wanted = (
        (rf"(?:{'|'.join(map(str, numbers))})", sorted(kinds)),
        (r"\d+", sorted(kind for kind in kinds if kind.rpartition(".")[2] in SENSITIVE_LAYERS)),
    )
    return tuple(
        (rf"{place}\.{number}\.(?:{'|'.join(map(re.escape, names))})\.weight", "int8")
        for number, names in wanted
        if names
    )


def _other_rules(model: nn.Module, head: str | None, embedding: str | None, algorithm: str) -> Rules:
    """Rules for the output projection and the embedding."""
    untyped: Any = model
    names = {id(module): name for name, module in model.named_modules()}
    head_name = TIED_HEAD if is_tied(model) else f"{names[id(untyped.lm_head)]}.weight"
    wanted = [(head_name, head), (embedding_weight(model), embedding)]
    return tuple((re.escape(name), _format(bits, algorithm)) for name, bits in wanted if bits is not None)
