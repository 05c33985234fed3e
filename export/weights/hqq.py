"""Half-quadratic quantization: codes with zero points that leave small errors in an l_p norm with p < 1.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023
(https://mobiusml.github.io/hqq_blog). For each group of columns ``w`` with scale ``s``, the zero point ``z`` minimizes

    sum |w - s (q - z)| ** p,    q = clamp(round(w / s + z))

A norm with p < 1 lets few weights be far off, if most become nearer. It is split by an auxiliary error ``e``, which a
quadratic penalty ties to the real one. Each iteration solves both parts in closed form:

    e <- shrink(w - s (q - z)),    shrink(x) = sign(x) max(0, |x| - |x| ** (p - 1) / beta)
    z <- mean(q - (w - e) / s)

and multiplies ``beta`` by ``KAPPA``. Here errors are measured in steps of ``s``, so that ``beta`` means the same for
weights of any size, and p is 1/2, because square roots are fast. The scale stays that of the range. A group stops when
its norm does not become smaller, and keeps its best zero point.
"""

from __future__ import annotations

import torch

BETA = 1.0
KAPPA = 1.01
ITERATIONS = 20
_ELEMENTS = 1 << 16
"""Weights that one thread handles at a time, which stay in its cache."""
_LEAST = 1e-6
"""The smallest square root of an error, in steps."""


def choose_range(grouped: torch.Tensor, levels: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points that cover the range of each group and zero.

    Args:
        grouped: weights ``[..., group]``, float32.
        levels: number of codes.
        dtype: dtype of the results.

    Returns:
        Scales and zero points ``[...]``. A group of zeros has the scale 0.
    """
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = ((high - low) / (levels - 1)).to(dtype)
    return scales, (-low / _steps(scales)).to(dtype)


def choose_zeros(
    grouped: torch.Tensor, levels: int, dtype: torch.dtype, valid: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales that cover the range of each group, and the zero points of half-quadratic quantization.

    Results of a row do not depend on the other rows.

    Args:
        grouped: weights ``[N, groups, group]``, float32.
        levels: number of codes.
        dtype: dtype of the results.
        valid: columns of the last group that are not padding.

    Returns:
        Scales and zero points ``[N, groups]``.
    """
    rows = max(1, _ELEMENTS * torch.get_num_threads() // grouped[0].numel())
    parts = [_choose_zeros(part, levels, dtype, valid) for part in grouped.split(rows)]
    scales, zeros = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return scales, zeros


def _choose_zeros(grouped: torch.Tensor, levels: int, dtype: torch.dtype, valid: int) -> tuple[torch.Tensor, ...]:
    scales, zeros = choose_range(grouped, levels, dtype)
    x = grouped / _steps(scales)[..., None]
    size = x.shape[-1]
    weights = None
    if valid < size:
        weights = torch.ones_like(x[0])
        weights[-1, valid:] = 0
    best, tried = zeros.float(), zeros.float()
    least, active, beta = torch.full_like(best, torch.inf), torch.ones_like(best, dtype=torch.bool), BETA
    for iteration in range(ITERATIONS + 1):
        error = x - to_codes(x, tried, levels)
        error += tried[..., None]
        root = error.abs().sqrt_()
        norm = (root if weights is None else root * weights).sum(-1)
        active &= norm < least
        best, least = torch.where(active, tried, best), torch.where(active, norm, least)
        if iteration == ITERATIONS or not bool(active.any()):
            break
        shrunk = root.square()
        shrunk -= root.clamp_(min=_LEAST).reciprocal_().div_(beta)
        # The mean of q - (x - e) moves z by the mean of e minus the real error.
        change = shrunk.relu_().copysign_(error).sub_(error)
        if weights is None:
            moved = change.mean(-1)
        else:
            moved = (change * weights).sum(-1) / weights.sum(-1)
        # Programs hold zero points in dtype, so the norm must be that of the rounded ones.
        tried = (tried + moved).to(dtype).float()
        beta *= KAPPA
    return scales, best.to(dtype)


def to_codes(x: torch.Tensor, zeros: torch.Tensor, levels: int) -> torch.Tensor:
    """The codes of weights in steps ``x [..., group]``, for zero points ``[...]``; float32."""
    return (x + zeros.float()[..., None]).round_().clamp_(0, levels - 1)


def _steps(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales == 0, 1.0, scales.float())
