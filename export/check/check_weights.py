"""The part of ``run-model --check`` that compares weights byte for byte, and names those that it could not compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from flashpte.export.common.options import DRAFT_DECODE


@dataclasses.dataclass(frozen=True)
class WeightsReport:
    """What comparing a program's tensors with a model's found.

    Attributes:
        equal: tensors that are the model's, byte for byte.
        different: names of those that are not.
        missing: those of the model that were compared with nothing, each with the reason.
    """

    equal: int = 0
    different: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def compare_weights(weights: Mapping[str, torch.Tensor], model_weights: Mapping[str, torch.Tensor]) -> WeightsReport:
    """Compares every tensor of a model. A tensor that several names share needs to be found under one of them.

    Args:
        weights: the program's, by FQN.
        model_weights: what they should be, by FQN.
    """
    equal, different, missing, found = 0, [], [], set()
    for name, value in model_weights.items():
        mine = weights.get(name)
        if mine is None:
            continue
        found.add(_memory(value))
        if mine.dtype != value.dtype or mine.shape != value.shape:
            missing.append(f"{name}: the program has {_describe(mine)}, the model {_describe(value)}")
        elif torch.equal(_bits(mine.cpu()), _bits(value.cpu())):
            equal += 1
        else:
            different.append(name)
    for name, value in model_weights.items():
        if name not in weights and _memory(value) not in found:
            missing.append(f"{name}: the program has no tensor of this name")
    if not model_weights:
        missing.append("weights: the model has none")
    return WeightsReport(equal, tuple(different), tuple(missing))


def weights_of_methods(
    model_weights: Mapping[str, torch.Tensor], methods: Mapping[str, object]
) -> dict[str, torch.Tensor]:
    """Those of a model and its draft that some method uses: without ``draft_decode`` the draft's head is in none."""
    return {
        name: value for name, value in model_weights.items() if DRAFT_DECODE in methods or not name.startswith("draft.")
    }


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    """The same for tensors that are one; an empty one is none but itself."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
