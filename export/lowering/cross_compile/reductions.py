"""Decides which of Inductor's reductions keep their whole row in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WIDEST_ROW = 8192
"""Most elements of a row that a persistent reduction holds: 32 for each of 256 threads."""


def is_persistent(original: Callable[..., bool], features: Any, cooperative_reduction: bool) -> bool:
    """Stands for ``InductorChoices.should_use_persistent_reduction``: rows up to :data:`WIDEST_ROW` are persistent.

    Inductor's own limit is 1,024 elements. It reads a longer row in a loop, once for each pass over it: three times for
    a norm, the residual and the next norm. The passes over one row of 5,376 cost latency, not bytes.
    """
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    inner = features.get_reduction_hint() == ReductionHint.INNER and not cooperative_reduction
    if inner and V.graph.sizevars.statically_known_leq(features.reduction_numel, WIDEST_ROW):
        return True
    return original(features, cooperative_reduction)
