"""The part of ``run-model --check`` that compares weights byte for byte and names those that it cannot compare."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping

import torch

from flashpte.export.common.options import DRAFT_DECODE


@dataclasses.dataclass(frozen=True)
class WeightsReport:
    """The result of comparing a program's tensors with a model's.

    Attributes:
        equal: number of tensors that equal the model's, byte for byte.
        different: names of tensors that differ.
        missing: tensors of the model or of the program that were not compared, each with the reason.
        unused: names of the model's tensors that no exported method reads, so that there is nothing to compare.
    """

    equal: int = 0
    different: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


_LIFTED = re.compile(r"(.*\.)?_?lifted_tensor_\w+|(.*\.)?_tensor_constant\w*")
"""Constants that tracing makes, such as the bound of a mask; no module has a name for them."""


def compare_weights(
    weights: Mapping[str, torch.Tensor],
    model_weights: Mapping[str, torch.Tensor],
    *,
    computed: Mapping[str, torch.Tensor] | None = None,
    states: Collection[str] = (),
) -> WeightsReport:
    """Compares every tensor of a model and every tensor of the program.

    The program must have a tensor with several names under one of them. Each of the program's tensors needs a
    counterpart in the model, except states and constants that tracing made.

    Args:
        weights: the program's tensors by FQN.
        model_weights: the model's weights by FQN; the program must have them.
        computed: buffers that the model computes (RoPE's frequencies); the program has those that it reads.
        states: names of the program's states, which are compared elsewhere.
    """
    computed = computed or {}
    equal, different, missing, found = 0, [], [], set()
    for name, value in {**computed, **model_weights}.items():
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
    for name in weights:
        known = name in model_weights or name in computed or name in states or _LIFTED.fullmatch(name)
        if model_weights and not known:
            missing.append(f"{name}: the model has no tensor of this name")
    if not model_weights:
        missing.append("weights: the model has none")
    return WeightsReport(equal, tuple(different), tuple(missing))


def weights_of_methods(
    model_weights: Mapping[str, torch.Tensor], methods: Mapping[str, object]
) -> dict[str, torch.Tensor]:
    """The weights that some method uses; without ``draft_decode`` no method uses the draft's head."""
    return {
        name: value for name, value in model_weights.items() if DRAFT_DECODE in methods or not name.startswith("draft.")
    }


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    """A key that is equal for tensors in the same memory; an empty tensor equals only itself."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
