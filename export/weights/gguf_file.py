"""Opens a GGUF file: its metadata and its tensors, which are mapped and read from disk when they are used."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flashpte.export.common.errors import ExportError

if TYPE_CHECKING:
    from gguf import ReaderTensor

FLOATS = ("F32", "F16", "BF16")
"""Types of tensors that are not quantized."""


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        name: its name in the file.
        shape: its sizes, the outermost first.
        type: the name of its type, such as ``Q4_K``.
        stored: the reader's entry.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    stored: ReaderTensor

    @property
    def bytes(self) -> np.ndarray:
        """The blocks of a matrix: uint8 ``[N, bytes of a row]``."""
        return self.stored.data

    @property
    def block(self) -> tuple[int, int]:
        """Columns and bytes of a block."""
        from gguf import GGML_QUANT_SIZES

        return GGML_QUANT_SIZES[self.stored.tensor_type]

    def dequantized(self) -> torch.Tensor:
        """The tensor as ``gguf.dequantize`` reads it: float32, or as it is stored if it is not quantized."""
        from gguf import dequantize

        data = self.stored.data
        if self.type == "BF16":
            return torch.from_numpy(np.array(data)).view(torch.bfloat16).view(self.shape)
        return torch.from_numpy(np.array(data if self.type in FLOATS else dequantize(data, self.stored.tensor_type)))


class GgufFile:
    """The metadata and tensors of a file.

    Attributes:
        path: the file.
        architecture: the value of ``general.architecture``.
        tensors: its tensors, by their names in the file.

    Raises:
        ExportError: the file cannot be read, is truncated or no GGUF file, or has a tensor of an unknown type.
    """

    def __init__(self, path: Path):
        self.path = path
        self._reader: Any = _open(path)
        self.tensors = {
            tensor.name: GgufTensor(
                tensor.name, tuple(map(int, reversed(tensor.shape))), tensor.tensor_type.name, tensor
            )
            for tensor in self._reader.tensors
        }
        self.architecture = str(self.metadata("general.architecture"))

    def metadata(self, key: str, default: Any = None) -> Any:
        """A value of the metadata: a number, a text, a flag or a list of them."""
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    def of_architecture(self, key: str, default: Any = None) -> Any:
        """The value of ``<architecture>.<key>``."""
        return self.metadata(f"{self.architecture}.{key}", default)


def _open(path: Path) -> Any:
    try:
        from gguf import GGMLQuantizationType, GGUFReader
    except ImportError as error:
        raise ExportError(f"cannot read {path}: the package gguf is not installed") from error

    known = {int(kind) for kind in GGMLQuantizationType}

    class Reader(GGUFReader):
        """A reader whose errors name the tensor."""

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            found = []
            for field in fields:
                if int(field.parts[4][0]) not in known:
                    raise ExportError(f"tensor {field.name} of {path} has the unknown type {int(field.parts[4][0])}")
                try:
                    super()._build_tensors(start_offs, [field])
                except (ValueError, KeyError) as error:
                    reason = " ".join(str(error).split())
                    raise ExportError(
                        f"cannot read tensor {field.name} of {path}: the file is truncated, or its shape is "
                        f"not valid ({reason})"
                    ) from error
                found += self.tensors
            self.tensors = found

    try:
        reader = Reader(path)
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"{path} is truncated or not a GGUF file ({reason})") from error
    names = [tensor.name for tensor in reader.tensors]
    if twice := {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set():
        raise ExportError(f"{path} holds tensor {sorted(twice)[0]} twice")
    return reader
