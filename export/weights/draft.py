"""The weights of an EAGLE-3 draft head: from a checkpoint of either family, or random ones that fit a target.

Both families have the same tensors; they name the layer ``midlayer.*`` (SafeAILab, SpecForge) or ``layers.0.*``
(speculators). A draft without an embedding uses the target's. ``d2t`` int64 [V_d] holds offsets: draft token d is
target token d + d2t[d]. ``t2d`` bool [V] marks the target tokens that the draft knows; it is checked but not used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from flashpte.export.common.errors import ExportError, Option
from flashpte.export.models.eagle3_config import DraftConfig, parse_draft_config
from flashpte.export.weights.checkpoint_folder import CONFIG_FILE, read_json
from flashpte.export.weights.random import random_tensor, tensor_generator
from flashpte.export.weights.recipe import Recipe
from flashpte.export.weights.safetensors import FLOAT_DTYPES, Checkpoint

EMBEDDING, HEAD, MAP, MARKS = "embed_tokens.weight", "lm_head.weight", "d2t", "t2d"

_LAYER_PREFIXES = ("midlayer.", "layers.0.")
_UNUSED = frozenset({MAP, MARKS, "verifier_norm.weight", "verifier_lm_head.weight"})  # the last two: training only
_INTEGERS = {"I64", "I32"}


@dataclasses.dataclass(frozen=True)
class DraftFiles:
    """An opened draft checkpoint.

    Attributes:
        folder: the folder.
        config: its parsed and checked config.
        checkpoint: its tensors, by the names in its files.
    """

    folder: Path
    config: DraftConfig
    checkpoint: Checkpoint

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor of this name."""
        return name in self.checkpoint.tensors

    def vocabulary_map(self, target_vocab_size: int) -> torch.Tensor | None:
        """Returns ``d2t`` as int64 [V_d], or ``None`` if draft and target ids are the same.

        Raises:
            ExportError: the map is missing, has the wrong length or dtype, maps outside the target's vocabulary, maps
                two draft tokens to one target token, or contradicts ``t2d``.
        """
        size = self.config.draft_vocab_size
        if not self.has(MAP):
            if size != target_vocab_size:
                raise ExportError(
                    f"{self.folder} has no tensor {MAP}, which a draft vocabulary of {size} of "
                    f"{target_vocab_size} tokens needs"
                )
            return None
        stored = self.checkpoint.tensors[MAP]
        if stored.shape != (size,) or stored.dtype not in _INTEGERS:
            raise ExportError(
                f"tensor {MAP} in {stored.file} is {stored.dtype} {list(stored.shape)}, must be I64 [{size}]"
            )
        offsets = self.checkpoint.read(MAP).to(torch.int64)
        targets = torch.arange(size) + offsets
        outside = ((targets < 0) | (targets >= target_vocab_size)).nonzero().flatten()
        if len(outside):
            first = int(outside[0])
            raise ExportError(
                f"tensor {MAP} in {stored.file} maps draft token {first} to {int(targets[first])}, outside of the "
                f"target's vocabulary of {target_vocab_size} (it holds offsets: target id = draft id + {MAP})"
            )
        if len(targets.unique()) != size:
            raise ExportError(f"tensor {MAP} in {stored.file} maps two draft tokens to one target token")
        self._check_marks(targets, target_vocab_size)
        return offsets if bool(offsets.any()) or size != target_vocab_size else None

    def _check_marks(self, targets: torch.Tensor, target_vocab_size: int) -> None:
        if not self.has(MARKS):
            return
        marks = self.checkpoint.read(MARKS).to(torch.bool)
        expected = torch.zeros(target_vocab_size, dtype=torch.bool)
        expected[targets] = True
        if not torch.equal(marks, expected):
            raise ExportError(f"{MARKS} in {self.folder} does not mark the target tokens that {MAP} leads to")


def open_draft(folder: Path) -> DraftFiles:
    """Opens a draft head's folder and reads its config and the headers of its tensors.

    Raises:
        ExportError: a file is missing or broken, or the config needs something that is not implemented.
    """
    if not folder.is_dir():
        raise ExportError(Option("draft", folder), " is not an existing folder")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ExportError(Option("draft", folder), f" has no {CONFIG_FILE}: give the folder of an EAGLE-3 draft head")
    config = parse_draft_config(read_json(path, "draft config"), path)
    return DraftFiles(folder, config, Checkpoint(folder))


def stored_name(name: str, files: DraftFiles) -> str:
    """The name in the checkpoint of one of the modules' tensors (``layer.*``, ``fc.*``, ...)."""
    if not name.startswith("layer."):
        return name
    flat, nested = _LAYER_PREFIXES
    prefix = flat if any(stored.startswith(flat) for stored in files.checkpoint.tensors) else nested
    return prefix + name.removeprefix("layer.")


def check_draft_tensors(files: DraftFiles, fusion: nn.Module, head: nn.Module) -> None:
    """Compares the checkpoint's headers with the modules and names the first difference.

    Raises:
        ExportError: a tensor is missing, unexpected, of another shape, or of a dtype that is not a plain float.
    """
    seen = set()
    for part in (fusion, head):
        for name, tensor in part.state_dict().items():
            stored = stored_name(name, files)
            seen.add(stored)
            if name == MAP:
                continue
            found = files.checkpoint.tensors.get(stored)
            if found is None:
                raise ExportError(
                    f"{files.folder} has no tensor {stored} (shape {list(tensor.shape)}), which its config asks for"
                )
            if found.shape != tuple(tensor.shape):
                raise ExportError(
                    f"tensor {stored} in {found.file} has shape {list(found.shape)}, "
                    f"the draft's config and the target ask for {list(tensor.shape)}"
                )
            if found.dtype not in FLOAT_DTYPES:
                raise ExportError(f"tensor {stored} in {found.file} has dtype {found.dtype}; only floats are read")
    for name, found in files.checkpoint.tensors.items():
        if name not in seen and name not in _UNUSED:
            raise ExportError(f"tensor {name} in {found.file} has no place in the draft that its config.json describes")


def draft_recipe(dtype: str) -> Recipe:
    """The formats of a draft's weights: floats get ``dtype``, and the vocabulary map stays int64."""
    return Recipe(dtype, ((MAP, "int64"),))


@dataclasses.dataclass(frozen=True)
class DraftWeights:
    """The weights in a draft's folder, by their names in the modules."""

    files: DraftFiles
    target_vocab_size: int

    def read(self, name: str) -> torch.Tensor:
        """Reads a weight; checks ``d2t``, see :meth:`DraftFiles.vocabulary_map`."""
        if name == MAP:
            offsets = self.files.vocabulary_map(self.target_vocab_size)
            assert offsets is not None  # without a map the modules have no such weight
            return offsets
        return self.files.checkpoint.read(stored_name(name, self.files))


class RandomDraftWeights:
    """Random weights and a random map into the target's vocabulary, the same for the same seed."""

    def __init__(self, parts: Sequence[nn.Module], target_vocab_size: int, dtype: torch.dtype, seed: int):
        self._shapes = {name: tensor.shape for part in parts for name, tensor in part.state_dict().items()}
        self._target_vocab_size, self._dtype, self._seed = target_vocab_size, dtype, seed

    def read(self, name: str) -> torch.Tensor:
        """Draws a weight by its name in the modules."""
        unique, shape = f"draft.{name}", self._shapes[name]
        if name != MAP:
            return random_tensor(unique, shape, self._dtype, self._seed)
        order = torch.randperm(self._target_vocab_size, generator=tensor_generator(self._seed, unique))
        return order[: shape[0]].sort().values - torch.arange(shape[0])
