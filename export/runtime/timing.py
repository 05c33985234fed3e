"""Times calls on the GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def median_us(call: Callable[[], object], *, warmup: int, timed: int) -> float:
    """The median time of a call in microseconds, between two CUDA events on the current stream."""
    times = []
    for _ in range(warmup):
        call()
    for _ in range(timed):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)
