"""Measures a program's errors against the reference and computes the allowed ones.

The reference is the eager model in float32 (float64 for a float32 program). ``e`` is the error of the eager model in
the program's own dtype against that reference, the worst of its runs. A program passes when

* its largest error is at most ``max(2 * largest e, floor)``; the floor is 2 ulp of the dtype at the largest reference
  value (256 ulp for float32, because compilers reorder its sums); and
* its root mean square error is at most ``max(2 * rms e, floor)``, with the floor taken at the rms of the reference.

One run is no yardstick. Real models have a few tokens whose activations are huge, and which rounding moves a lot. Six
runs of Gemma 3 270M's eager bfloat16 model along one greedy text, rounded in other ways, had rms errors of 1.6, 1.7,
1.8, 1.9, 2.0 and 4.6%. So if a program fails by one run, more follow (:func:`.EagerModel.evaluate` with noise), and the
worst of up to 9 counts.

A NaN or another shape is an infinite error. A comparison of no values does not pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

_FLOOR_ULP = {torch.float32: 256.0}
_FACTOR = 2.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One group of tensors compared with the reference.

    Attributes:
        what: name of the group, such as ``prefill logits`` or ``sliding keys``.
        worst: where the largest error is.
        max_error: largest absolute error.
        max_allowed: bound on ``max_error``.
        relative_error: rms error over the rms of the reference.
        relative_allowed: bound on ``relative_error``.
        values: how many numbers were compared.
    """

    what: str
    worst: str
    max_error: float
    max_allowed: float
    relative_error: float
    relative_allowed: float
    values: int

    @property
    def passed(self) -> bool:
        """Whether there are values and both errors are within their bounds; a NaN never is."""
        return self.values > 0 and self.max_error <= self.max_allowed and self.relative_error <= self.relative_allowed

    @property
    def excess(self) -> float:
        """The larger ratio of an error to its bound; above 1 the comparison fails."""
        ratios = (_ratio(self.max_error, self.max_allowed), _ratio(self.relative_error, self.relative_allowed))
        return max(ratios)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data, for JSON."""
        return {**dataclasses.asdict(self), "passed": self.passed}


def _ratio(error: float, allowed: float) -> float:
    if allowed > 0:
        return error / allowed
    return 0.0 if error == 0 else math.inf


def ulp(dtype: torch.dtype, at: float) -> float:
    """The distance between neighboring numbers of ``dtype`` at the magnitude ``at``."""
    return float(torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(at))) if at > 0 else 0.0


def compare(
    what: str,
    where: str,
    actual: torch.Tensor,
    reference: torch.Tensor,
    own: torch.Tensor | Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> Comparison:
    """Compares one tensor.

    Args:
        what: name of the tensor's group.
        where: which tensor of the group it is.
        actual: the program's tensor.
        reference: the eager model's tensor in the wider dtype, same shape.
        own: the eager model's tensor in the program's dtype, same shape; or that of each of several runs.
        dtype: the program's dtype, which sets the size of an ulp.
    """
    if actual.shape != reference.shape or not actual.numel():
        shapes = f"{where} of shape {list(actual.shape)}, the model's is {list(reference.shape)}"
        return Comparison(what, shapes, math.inf, 0.0, math.inf, 0.0, 0)
    expected = reference.double()
    error = (actual.double() - expected).abs()
    largest_own = rms_own = 0.0
    for run in [own] if isinstance(own, torch.Tensor) else own:
        yardstick = (run.double() - expected).abs()
        largest_own, rms_own = max(largest_own, float(yardstick.max())), max(rms_own, _rms(yardstick))
    if not bool(error.isfinite().all()):
        error = torch.where(error.isfinite(), error, math.inf)
    floor = _FLOOR_ULP.get(dtype, 2.0)
    largest, rms = float(expected.abs().max()), _rms(expected)
    scale = rms if rms > 0 else 1.0
    return Comparison(
        what=what,
        worst=where,
        max_error=float(error.max()),
        max_allowed=max(_FACTOR * largest_own, floor * ulp(dtype, largest)),
        relative_error=_rms(error) / scale,
        relative_allowed=max(_FACTOR * rms_own / scale, floor * ulp(dtype, rms) / scale),
        values=error.numel(),
    )


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def worst(comparisons: list[Comparison]) -> Comparison:
    """The comparison of a group that is furthest beyond its bounds or closest to them, with all values counted."""
    chosen = max(comparisons, key=lambda comparison: (not comparison.passed, comparison.excess))
    return dataclasses.replace(chosen, values=sum(comparison.values for comparison in comparisons))
