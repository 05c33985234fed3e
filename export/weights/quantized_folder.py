"""Weights of a Hugging Face folder whose config has a ``quantization_config``, one at a time.

Each method's file finds the weights that the folder holds as codes. A linear layer keeps its codes; everything else is
dense.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashpte.export.common.errors import ExportError
from flashpte.export.weights import awq, compressed_tensors, gptq, torchao_folder
from flashpte.export.weights.quantization_fields import SECTION, Fields
from flashpte.export.weights.safetensors import Checkpoint, check_tensors
from flashpte.export.weights.stored_codes import HeldCodes, Linears
from flashpte.kernels.linear.format import Groupwise

METHODS: dict[str, Callable[[Linears], dict[str, HeldCodes]]] = {
    "awq": awq.find,
    "gptq": gptq.find,
    "compressed-tensors": compressed_tensors.find,
    "torchao": torchao_folder.find,
}
"""What finds the weights of each ``quant_method``."""


class QuantizedFolder:
    """A source of weights (:class:`flashpte.export.weights.recipe.WeightSource`).

    Args:
        checkpoint: the opened folder.
        fields: ``quantization_config``, with a method of :data:`METHODS`.
        model: the model that the config describes, perhaps cut to its first layers.
        total_layers: number of layers that the config describes; tensors of cut layers are ignored.

    Attributes:
        formats: the format of each weight that is held as codes.

    Raises:
        ExportError: a field is not served, or a tensor is missing, unexpected, of another shape or dtype.
    """

    def __init__(self, checkpoint: Checkpoint, fields: Fields, model: nn.Module, total_layers: int):
        self._checkpoint = checkpoint
        tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._names = tuple(tensors)
        shapes = {
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        self._held = METHODS[fields.get("quant_method")](Linears(checkpoint, fields, shapes, tensors))
        check_tensors(checkpoint, model, total_layers, {name: held.tensors for name, held in self._held.items()})
        self.formats = {name: held.format for name, held in self._held.items() if held.format is not None}

    def read(self, name: str) -> torch.Tensor | Groupwise:
        """Reads a weight: the codes of the folder, or dense.

        Raises:
            ExportError: the folder cannot be read.
        """
        held = self._held.get(name)
        return self._checkpoint.read(name) if held is None else held.read()

    def notes(self) -> tuple[str, ...]:
        """What the weights became, one line for each kind, for people."""
        counts: Counter[tuple[str, str]] = Counter()
        for name in self._names:
            held = self._held.get(name)
            if held is None:
                counts[(self._checkpoint.tensors[name].dtype, "dense")] += 1
            elif held.format is None:
                counts[(held.kind, "dense (dequantized)")] += 1
            else:
                counts[(held.kind, f"{held.format} (codes kept)")] += 1
        return tuple(
            f"{kind}: {count} weight{'s' * (count > 1)} as {what}" for (kind, what), count in sorted(counts.items())
        )


def without_quantization(config: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], Fields | None]:
    """Takes ``quantization_config`` out of a config, from its top level or its ``text_config``.

    Args:
        config: the fields of a config.
        path: its file, for errors.

    Returns:
        The other fields, and ``quantization_config``: ``None`` if the config has none.

    Raises:
        ExportError: it is not an object, or its method is not served.
    """
    rest = dict(config)
    text = rest.get("text_config")
    found = rest.pop(SECTION, None)
    if isinstance(text, Mapping) and SECTION in text:
        rest["text_config"] = {name: value for name, value in text.items() if name != SECTION}
        found = text[SECTION] if found is None else found
    if found is None or found == {}:
        return rest, None
    if not isinstance(found, Mapping):
        raise ExportError(f"{path}: {SECTION} is a {type(found).__name__}, not an object")
    fields = Fields(path, found)
    fields.choice("quant_method", METHODS)
    return rest, fields
