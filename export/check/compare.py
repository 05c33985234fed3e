"""How far a program's tensors are from the reference, and how far they may be.

The reference is the eager model in float32 (float64 for a float32 program). With ``e`` the error of the eager model in
the program's own dtype against it, a program passes when

* its largest error is at most ``max(2 * largest e, floor)``, where the floor is 2 ulp of the dtype at the largest
  reference value (256 ulp for float32, whose sums a compiler orders in its own way), and
* its root mean square error is at most ``max(2 * rms e, floor)``, the floor here at the rms of the reference.

A NaN is an infinite error, and so is a tensor of another shape. Nothing, compared with nothing, does not pass.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

_FLOOR_ULP = {torch.float32: 256.0}
_FACTOR = 2.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One group of tensors against the reference.

    Attributes:
        what: ``prefill logits``, ``sliding keys``.
        worst: where the largest error is.
        max_error: largest absolute error.
        max_allowed: the bound on it.
        relative_error: rms error over the rms of the reference.
        relative_allowed: the bound on it.
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
        """Whether there are values and both errors are within their bounds; a NaN is in none."""
        return self.values > 0 and self.max_error <= self.max_allowed and self.relative_error <= self.relative_allowed

    @property
    def excess(self) -> float:
        """How many times the tighter bound is used up; above 1 it failed."""
        ratios = (_ratio(self.max_error, self.max_allowed), _ratio(self.relative_error, self.relative_allowed))
        return max(ratios)

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {**dataclasses.asdict(self), "passed": self.passed}


def _ratio(error: float, allowed: float) -> float:
    if allowed > 0:
        return error / allowed
    return 0.0 if error == 0 else math.inf


def ulp(dtype: torch.dtype, at: float) -> float:
    """The distance of neighbouring numbers of a dtype at a magnitude."""
    return float(torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(at))) if at > 0 else 0.0


def compare(
    what: str,
    where: str,
    actual: torch.Tensor,
    reference: torch.Tensor,
    own: torch.Tensor,
    dtype: torch.dtype,
) -> Comparison:
    """Compares one tensor.

    Args:
        what: name of the group it belongs to.
        where: which tensor of the group it is.
        actual: the program's.
        reference: of the wider dtype, same shape.
        own: the eager model's in the program's dtype, same shape.
        dtype: the program's, which says how far apart neighbouring numbers are.
    """
    if actual.shape != reference.shape or not actual.numel():
        shapes = f"{where} of shape {list(actual.shape)}, the model's is {list(reference.shape)}"
        return Comparison(what, shapes, math.inf, 0.0, math.inf, 0.0, 0)
    expected = reference.double()
    error, yardstick = (actual.double() - expected).abs(), (own.double() - expected).abs()
    if not bool(error.isfinite().all()):
        error = torch.where(error.isfinite(), error, math.inf)
    floor = _FLOOR_ULP.get(dtype, 2.0)
    largest, rms = float(expected.abs().max()), _rms(expected)
    scale = rms if rms > 0 else 1.0
    return Comparison(
        what=what,
        worst=where,
        max_error=float(error.max()),
        max_allowed=max(_FACTOR * float(yardstick.max()), floor * ulp(dtype, largest)),
        relative_error=_rms(error) / scale,
        relative_allowed=max(_FACTOR * _rms(yardstick) / scale, floor * ulp(dtype, rms) / scale),
        values=error.numel(),
    )


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def worst(comparisons: list[Comparison]) -> Comparison:
    """The one of a group that is furthest beyond, or closest to, its bounds, with the number of values of all."""
    chosen = max(comparisons, key=lambda comparison: (not comparison.passed, comparison.excess))
    return dataclasses.replace(chosen, values=sum(comparison.values for comparison in comparisons))
