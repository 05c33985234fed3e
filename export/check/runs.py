"""Several runs of the eager model as one yardstick; :mod:`.compare` says why one is not enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flashpte.export.check.compare import Comparison

if TYPE_CHECKING:
    from flashpte.export.check.eager_model import EagerModel, Evaluation

RUNS = 9
"""Most runs of the eager model, the first without noise."""


def compare_with_runs(
    own: EagerModel,
    tokens: Sequence[int],
    rows: Sequence[int],
    compare: Callable[[Sequence[Evaluation]], list[Comparison]],
    tell: Callable[[str], None],
) -> tuple[list[Comparison], Evaluation]:
    """Compares with one run of the eager model and, while a comparison fails, with more.

    More runs only widen the bounds, so the verdict is that of all runs. An infinite error fails whatever the bound.

    Args:
        own: the eager model in the program's dtype.
        tokens: the sequence that it evaluates.
        rows: positions of the logits that it returns.
        compare: compares the program with the worst of some runs.
        tell: called with a line for each further run.

    Returns:
        The comparisons, and the run without noise.
    """
    runs = [own.evaluate(tokens, rows)]
    while True:
        comparisons = compare(runs)
        failed = [comparison for comparison in comparisons if not comparison.passed]
        if not failed or len(runs) == RUNS or any(math.isinf(comparison.max_error) for comparison in failed):
            return comparisons, runs[0]
        tell(f"{failed[0].what}: beyond {len(runs)} of {RUNS} runs of the eager model, evaluating another")
        runs.append(own.evaluate(tokens, rows, len(runs)))
