"""The weights of a GGUF file by the names of the Hugging Face module, one at a time.

A quantized weight of a linear layer keeps its codes (:mod:`flashpte.export.weights.gguf_blocks`). Q6_K has a scale per
16 columns, which the packed format does not: its weights are rounded to 8 bits with a scale per 32. Everything else,
embeddings among it, is dense. A head that is tied to a quantized embedding is dense, too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flashpte.export.common.errors import ExportError
from flashpte.export.weights.gguf_blocks import EXACT, read_blocks
from flashpte.export.weights.gguf_config import ROPE_FACTORS
from flashpte.export.weights.gguf_file import FLOATS, GgufFile, GgufTensor
from flashpte.kernels.linear.format import Groupwise

ROUNDED = {"Q6_K": "int8-g32"}
"""The format of each type that is read dense and rounded again, by the type's name."""

_LAYER = re.compile(r"^blk\.(\d+)\.")
_PERMUTED = re.compile(r"\.attn_([qk])\.(weight|bias)$")


class GgufWeights:
    """A source of weights (:class:`flashpte.export.weights.recipe.WeightSource`).

    Args:
        file: the file.
        model: the model that its config describes, perhaps cut to its first layers.
        total_layers: number of layers that the config describes; tensors of cut layers are ignored.

    Attributes:
        formats: the format of each weight that has one of 4 or 8 bits.

    Raises:
        ExportError: a tensor is missing, unexpected, of another shape, or of a type that is not read.
    """

    def __init__(self, file: GgufFile, model: nn.Module, total_layers: int):
        self.file = file
        self._config: Any = model.config
        self._tensors = _by_module_name(file, model, total_layers)
        _check(file, model, self._tensors, total_layers)
        self.formats: dict[str, str] = {}
        for name, tensor in self._tensors.items():
            path, _, leaf = name.rpartition(".")
            format = {**EXACT, **ROUNDED}.get(tensor.type)
            if format is not None and leaf == "weight" and isinstance(model.get_submodule(path), nn.Linear):
                self.formats[name] = format

    def read(self, name: str) -> torch.Tensor | Groupwise:
        """Reads a weight: the codes of the file, or dense.

        Raises:
            ExportError: the file was changed while it was read.
        """
        tensor = self._tensors[name]
        rows = self._rows(tensor)
        if name in self.formats and tensor.type in EXACT:
            natural = read_blocks(tensor.bytes, tensor.type, tensor.block[1])
            return natural if rows is None else Groupwise(*(t if t is None else t[rows] for t in natural))  # type: ignore[arg-type]
        dense = tensor.dequantized()
        if self.file.architecture == "gemma3" and name.endswith("norm.weight"):
            return dense.float() - 1  # files hold the factor, Hugging Face adds 1 to its weight
        return dense if rows is None else dense[rows]

    def notes(self) -> tuple[str, ...]:
        """What each type of the file became, one line for each, for people."""
        counts: Counter[tuple[str, str]] = Counter()
        for name, tensor in self._tensors.items():
            if name in self.formats:
                how = "codes kept" if tensor.type in EXACT else "rounded to nearest, a scale per 32 columns for 2 of 16"
                counts[(tensor.type, f"{self.formats[name]} ({how})")] += 1
            else:
                counts[(tensor.type, "dense")] += 1
        return tuple(
            f"{kind}: {count} weight{'s' * (count > 1)} as {what}" for (kind, what), count in sorted(counts.items())
        )

    def _rows(self, tensor: GgufTensor) -> torch.Tensor | None:
        """Where Hugging Face's rows are in the file's; ``None`` if they are in the same order.

        Llama files hold the rows of a head in pairs that RoPE rotates; Hugging Face puts the pairs' halves apart.
        """
        found = _PERMUTED.search(tensor.name)
        if self.file.architecture != "llama" or found is None:
            return None
        heads = self._config.num_attention_heads if found[1] == "q" else self._config.num_key_value_heads
        return torch.arange(tensor.shape[0]).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def _by_module_name(file: GgufFile, model: nn.Module, total_layers: int) -> dict[str, GgufTensor]:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architectures = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(architectures[file.architecture], total_layers)
    found = {}
    for name in model.state_dict():
        stem, dot, leaf = name.rpartition(".")
        # Numbers that are no weight or bias of a module have the suffix in the file only.
        stem, suffix = (stem, leaf) if dot and leaf in ("weight", "bias") else (name, "weight")
        base = names.get_name(stem)
        tensor = None if base is None else file.tensors.get(f"{base}.{suffix}")
        if tensor is None:
            stored = "no name in GGUF files" if base is None else f"{base}.{suffix}"
            raise ExportError(f"{file.path} has no tensor {stored}, which is {name} of the model")
        found[name] = tensor
    return found


def _check(file: GgufFile, model: nn.Module, tensors: Mapping[str, GgufTensor], total_layers: int) -> None:
    for name, expected in model.state_dict().items():
        tensor = tensors[name]
        if tensor.shape != tuple(expected.shape):
            raise ExportError(
                f"tensor {tensor.name} of {file.path} has shape {list(tensor.shape)}, its metadata asks for "
                f"{list(expected.shape)}"
            )
        if tensor.type not in (*FLOATS, *EXACT, *ROUNDED):
            known = ", ".join((*FLOATS, *EXACT, *ROUNDED))
            raise ExportError(f"tensor {tensor.name} of {file.path} has type {tensor.type}; read are {known}")
    used = {tensor.name for tensor in tensors.values()} | {ROPE_FACTORS}
    layers = [int(layer[1]) for name in used if (layer := _LAYER.match(name))]
    kept = 1 + max(layers, default=-1)
    for name in file.tensors:
        layer = _LAYER.match(name)
        cut = layer is not None and kept <= int(layer[1]) < total_layers
        if name not in used and not cut:
            raise ExportError(f"tensor {name} of {file.path} has no place in a {file.architecture} model")
