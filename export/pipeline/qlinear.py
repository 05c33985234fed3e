"""Rules of a recipe that quantize the linear layers of a model's decoder layers."""

from __future__ import annotations

import re

from torch import nn

from flashpte.export.common.options import DEFAULT_QLINEAR_GROUP_SIZE, ExportOptions
from flashpte.export.models.build import decoder_layers


def qlinear_rules(model: nn.Module, options: ExportOptions) -> tuple[tuple[str, str], ...]:
    """One rule for each kind of linear layer: a regular expression for its weights in all layers, and the format.

    Args:
        model: the dense model on the meta device.
        options: ``qlinear`` and ``qlinear_group_size``.
    """
    if options.qlinear is None:
        return ()
    bits, group = int(options.qlinear[0]), options.qlinear_group_size
    if bits == 4:
        group = group or DEFAULT_QLINEAR_GROUP_SIZE
    format = f"int{bits}" if group is None else f"int{bits}-g{group}"
    layers = decoder_layers(model)
    names = {module: name for name, module in model.named_modules()}
    patterns: dict[str, None] = {}
    for layer in layers:
        place = re.sub(r"\\\.\d+$", r"\\.\\d+", re.escape(names[layer]))
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                patterns[rf"{place}\.{re.escape(name)}\.weight"] = None
    return tuple((pattern, format) for pattern in patterns)
