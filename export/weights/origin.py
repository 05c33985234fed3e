"""Where a model comes from: a Hugging Face folder or a GGUF file, which give a config, weights and a tokenizer."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from flashpte.export.common.errors import ExportError, Option
from flashpte.export.models.experts import has_experts
from flashpte.export.weights.checkpoint_folder import (
    CONFIG_FILE,
    read_config,
    read_token_ids,
    tokenizer_files,
)
from flashpte.export.weights.gguf_config import config_fields
from flashpte.export.weights.gguf_file import FLOATS, GgufFile
from flashpte.export.weights.gguf_tokenizer import write_tokenizer
from flashpte.export.weights.gguf_weights import GgufWeights
from flashpte.export.weights.quantized_folder import QuantizedFolder, without_quantization
from flashpte.export.weights.recipe import WeightSource
from flashpte.export.weights.safetensors import Checkpoint, check_tensors


class Origin(Protocol):
    """A trained model on disk.

    Attributes:
        option: the name of the option that names it, also the manifest's name for this kind.
        given: its path.
        described_by: the file that holds its config.
        quantized: whether it holds weights as codes, so that nobody knows the dense ones.
    """

    option: str
    given: Path
    described_by: Path
    quantized: bool

    def config(self) -> Mapping[str, Any]:
        """The fields of its config."""

    def token_ids(self) -> Mapping[str, Any]:
        """``bos_token_id`` and ``eos_token_id`` for generation, where they differ from the config's."""

    def tokenizer_files(self) -> tuple[Path, ...]:
        """Files that a runner needs to tokenize text."""

    def weights(self, model: nn.Module, total_layers: int) -> WeightSource:
        """A source of a model's weights, checked against the model by name and shape.

        Args:
            model: the model that the config describes, perhaps cut to its first layers.
            total_layers: layers before the cut.
        """


class Folder:
    """A Hugging Face folder: ``config.json``, safetensors and tokenizer files.

    Raises:
        ExportError: it is no folder, or its config cannot be read or names a quantization method that is not served.
    """

    option, quantized = "checkpoint", False

    def __init__(self, path: Path):
        if not path.is_dir():
            raise ExportError(Option(self.option, path), " is not an existing folder")
        self.given, self.described_by = path, path / CONFIG_FILE
        self._config, self._quantization = without_quantization(read_config(path), self.described_by)

    def config(self) -> Mapping[str, Any]:
        """The fields of ``config.json``, which describe the model as if it were not quantized."""
        return self._config

    def token_ids(self) -> Mapping[str, Any]:
        """What ``generation_config.json`` says."""
        return read_token_ids(self.given)

    def tokenizer_files(self) -> tuple[Path, ...]:
        """The folder's own files."""
        return tokenizer_files(self.given)

    def weights(self, model: nn.Module, total_layers: int) -> WeightSource:
        """The folder's safetensors, dense or quantized."""
        checkpoint = Checkpoint(self.given)
        if has_experts(model):
            checkpoint.merge(str(self._config.get("model_type")))
        if self._quantization is not None:
            return QuantizedFolder(checkpoint, self._quantization, model, total_layers)
        check_tensors(checkpoint, model, total_layers)
        return checkpoint


class Gguf:
    """A GGUF file. Its tokenizer is written into a temporary folder, which lives as long as this object.

    Raises:
        ExportError: the file cannot be read or is no GGUF file.
    """

    option = "gguf_file"

    def __init__(self, path: Path):
        if not path.is_file():
            raise ExportError(Option(self.option, path), " is not an existing file")
        self._file, self.given, self.described_by = GgufFile(path), path, path
        self.quantized = any(tensor.type not in FLOATS for tensor in self._file.tensors.values())

    def config(self) -> Mapping[str, Any]:
        """The config that the metadata describes."""
        return config_fields(self._file)

    def token_ids(self) -> Mapping[str, Any]:
        """Nothing: the config has them."""
        return {}

    def tokenizer_files(self) -> tuple[Path, ...]:
        """The file's tokenizer, converted at the first call."""
        return self._tokenizer[1]

    @functools.cached_property
    def _tokenizer(self) -> tuple[tempfile.TemporaryDirectory[str], tuple[Path, ...]]:
        folder = tempfile.TemporaryDirectory(prefix="flashpte-tokenizer-")
        return folder, write_tokenizer(self._file, Path(folder.name))

    def weights(self, model: nn.Module, total_layers: int) -> GgufWeights:
        """The file's tensors."""
        return GgufWeights(self._file, model, total_layers)


def open_origin(checkpoint: Path | None, gguf_file: Path | None) -> Origin | None:
    """Opens the folder or the file that is given; ``None`` without either.

    Raises:
        ExportError: it cannot be read.
    """
    if gguf_file is not None:
        return Gguf(gguf_file)
    return None if checkpoint is None else Folder(checkpoint)
