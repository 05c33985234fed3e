"""Reads the weights of a Hugging Face folder from memory-mapped safetensors files, tensor by tensor.

A mapped tensor is read from disk when it is first used, so a model larger than memory can be opened. Names are
converted to those of a text-only checkpoint (``model.layers.N....``, ``lm_head.weight``). Tensors for vision and audio
are skipped by name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from flashpte.export.common.errors import ExportError
from flashpte.export.models.build import is_tied
from flashpte.export.weights.checkpoint_folder import read_json
from flashpte.export.weights.merged import Merged, merged_names

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

# name in a multimodal checkpoint -> name in a text-only one
_TEXT_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_OTHER_MODALITIES = re.compile(
    r"^(model\.)?(vision_tower|vision_model|vision_encoder|visual|audio_tower|audio_model|multi_modal_projector"
    r"|mm_projector|embed_vision|embed_audio)\."
)
# old releases stored it; every model computes its own
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: its file, its name there, and the shape and dtype in the file's header.

    One that is made of several has the file, name and dtype of the first, and ``merged``.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    merged: Merged | None = None


def text_name(stored: str) -> str | None:
    """A stored tensor's name in a text-only checkpoint, or ``None`` if the text model does not use it."""
    if _OTHER_MODALITIES.match(stored) or _COMPUTED.search(stored):
        return None
    for prefix, replacement in _TEXT_PREFIXES:
        if stored.startswith(prefix):
            return replacement + stored[len(prefix) :]
    return stored


def open_file(path: Path) -> safe_open:
    """Maps one safetensors file.

    Raises:
        ExportError: the file cannot be read, is truncated, or is not a safetensors file.
    """
    try:
        return safe_open(path, framework="pt")
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"{path} is truncated or not a safetensors file ({reason}); fetch it again") from error


class Checkpoint:
    """The tensors of a folder by their text-only names; opening a folder reads only the headers.

    Raises:
        ExportError: there are no safetensors, a file is missing or broken, the index names a tensor that its file does
            not hold, or two stored tensors have the same text-only name.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[Path, safe_open] = {}
        self._pieces: dict[str, StoredTensor] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for path, names in self._stored_names().items():
            file = self._files[path]
            for stored in names:
                name = text_name(stored)
                if name is None:
                    continue
                if name in self.tensors:
                    raise ExportError(f"{folder} holds {self.tensors[name].name} and {stored}, the same weight twice")
                header = file.get_slice(stored)
                self.tensors[name] = StoredTensor(path, stored, tuple(header.get_shape()), header.get_dtype())

    def _stored_names(self) -> dict[Path, list[str]]:
        index = self.folder / INDEX_FILE
        if not index.is_file():
            path = self.folder / SINGLE_FILE
            if not path.is_file():
                raise ExportError(
                    f"{self.folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: only safetensors are read"
                )
            self._files[path] = open_file(path)
            return {path: sorted(self._files[path].keys())}
        weight_map = read_json(index, "safetensors index").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ExportError(f"safetensors index {index} has no weight_map")
        names: dict[Path, list[str]] = {}
        for stored, file in sorted(weight_map.items()):
            names.setdefault(self.folder / str(file), []).append(stored)
        for path, listed in names.items():
            if not path.is_file():
                raise ExportError(f"{index.name} names {path.name}, which {self.folder} does not have; fetch it again")
            self._files[path] = open_file(path)
            held = set(self._files[path].keys())
            if absent := [stored for stored in listed if stored not in held]:
                raise ExportError(f"{index.name} puts tensor {absent[0]} into {path.name}, which does not hold it")
        return names

    def metadata(self) -> dict[str, str]:
        """What the files' metadata says about names of the text-only checkpoint, for writers that describe tensors."""
        entries = [entry for file in self._files.values() for entry in (file.metadata() or {}).items()]
        named = [(text_name(stored), text) for stored, text in entries if "." in stored]
        return {name: text for name, text in named if name is not None}

    def merge(self, model_type: str) -> None:
        """Gives tensors the names that transformers gives them, and makes one of those that a model holds as one.

        Raises:
            ExportError: pieces are missing or differ in shape or dtype, or are put together in a way that is not known.
        """
        renamed, merged = merged_names(model_type, self.tensors)
        self._pieces = dict(self.tensors)
        used = {name for weight in merged.values() for names in weight.parts for name in names}
        self.tensors = {renamed.get(name, name): t for name, t in self.tensors.items() if name not in used}
        shapes = {name: stored.shape for name, stored in self._pieces.items()}
        for name, weight in merged.items():
            first = self._pieces[weight.parts[0][0]]
            for piece in (piece for names in weight.parts for piece in names):
                if self._pieces[piece].dtype != first.dtype:
                    raise ExportError(
                        f"tensor {piece} has dtype {self._pieces[piece].dtype}, {first.name} {first.dtype}"
                    )
            self.tensors[name] = dataclasses.replace(first, shape=weight.shape(shapes), merged=weight)

    def read(self, name: str) -> torch.Tensor:
        """A tensor backed by its file, whose bytes are read when they are used; one that is merged is in memory.

        Raises:
            ExportError: the file cannot be read.
        """
        stored = self.tensors[name]
        if stored.merged is not None:
            stacks = [torch.stack([self._read(self._pieces[n]) for n in names]) for names in stored.merged.parts]
            return stacks[0] if len(stacks) == 1 else torch.cat(stacks, stored.merged.dim)
        return self._read(stored)

    def _read(self, stored: StoredTensor) -> torch.Tensor:
        try:
            return self._files[stored.file].get_tensor(stored.name)
        except SafetensorError as error:
            raise ExportError(f"cannot read tensor {stored.name} from {stored.file}: {error}") from error


def check_tensors(
    checkpoint: Checkpoint, model: nn.Module, total_layers: int, held: Mapping[str, Collection[str]] | None = None
) -> None:
    """Compares a checkpoint's headers with a model and names the first difference.

    Args:
        checkpoint: the opened folder.
        model: the model that the folder's config describes, perhaps cut to its first layers.
        total_layers: number of layers that the config describes; tensors of cut layers are ignored.
        held: weights that are not one dense tensor, each with the names of its tensors, which are not checked here.

    Raises:
        ExportError: a tensor is missing, unexpected, of another shape, or of a dtype that is not a plain float.
    """
    held = held or {}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in held}
    _check_head(checkpoint, model, wanted)
    for name, shape in wanted.items():
        stored = checkpoint.tensors.get(name)
        if stored is None:
            raise ExportError(
                f"{checkpoint.folder} has no tensor {name} (shape {list(shape)}), which its config asks for"
            )
        if stored.shape != shape:
            raise ExportError(
                f"tensor {stored.name} in {stored.file} has shape {list(stored.shape)}, "
                f"the config asks for {list(shape)}"
            )
        if stored.dtype not in FLOAT_DTYPES:
            raise ExportError(
                f"tensor {stored.name} in {stored.file} has dtype {stored.dtype}; only float checkpoints are read"
            )
    kept_layers = 1 + max((int(m[1]) for name in model.state_dict() if (m := _LAYER.match(name))), default=-1)
    used = {*wanted, *(name for names in held.values() for name in names)}
    for name, stored in checkpoint.tensors.items():
        layer = _LAYER.match(name)
        cut = layer is not None and kept_layers <= int(layer[1]) < total_layers
        if name not in used and not cut and not (name == HEAD and is_tied(model)):
            raise ExportError(
                f"tensor {stored.name} in {stored.file} has no place in the model that config.json describes"
            )


def _check_head(checkpoint: Checkpoint, model: nn.Module, wanted: Mapping[str, tuple[int, ...]]) -> None:
    tie = '"tie_word_embeddings"'
    if not is_tied(model) and HEAD in wanted and HEAD not in checkpoint.tensors:
        raise ExportError(
            f"{checkpoint.folder} has no tensor {HEAD}; if the embedding is the head, config.json lacks {tie}: true"
        )
    if (
        is_tied(model)
        and {HEAD, EMBEDDING} <= checkpoint.tensors.keys()
        and not torch.equal(checkpoint.read(HEAD), checkpoint.read(EMBEDDING))
    ):
        raise ExportError(
            f"{checkpoint.folder} holds an {HEAD} of its own, but config.json says {tie}: true; set it to false"
        )
