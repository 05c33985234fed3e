"""The manifest's entry on fused weights: tensors of a program that hold several of the model's, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flashpte.export.common.errors import ExportError

FusedWeights = dict[str, dict[str, int]]
"""The parts of each fused tensor, by name, in order: their sizes along its first dimension."""


def parts_of(weights: Mapping[str, torch.Tensor], entry: Any) -> dict[str, torch.Tensor]:
    """The weights of a program, with views of the parts in place of fused ones.

    Args:
        weights: the program's tensors by FQN.
        entry: the manifest's ``fused_weights`` (:data:`FusedWeights`), or ``None``.

    Raises:
        ExportError: the entry is not as ``export-model`` writes it, or does not fit the program.
    """
    parts = dict(weights)
    try:
        for name, sizes in (entry or {}).items():
            whole = parts.pop(name)
            parts |= dict(zip(sizes, whole.split(list(sizes.values())), strict=True))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ExportError(f"the manifest's fused_weights do not fit the program ({error!r})") from error
    return parts
