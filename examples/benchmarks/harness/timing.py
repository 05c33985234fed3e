"""Timing on one GPU, in microseconds per call.

Two modes. *Graph*: replays of a CUDA graph that holds one call for each set of inputs, so that only the device counts.
*Plain*: the same calls from a Python loop, so that what the host does for a launch counts too wherever it takes longer
than the kernel. Candidates that are compared take turns: a GPU that warms up or slows down would favour one of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]

ROUNDS = 5


def elapsed_us(run: Call) -> float:
    """Device time between the start and the end of ``run``."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3


def capture(calls: Sequence[Call]) -> Call:
    """Replays a CUDA graph of all calls, each of which is run once beforehand."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def times_for(once_us: float, budget_us: float, most: int) -> int:
    """How often to repeat what takes ``once_us``: within a budget, at least once."""
    return max(1, min(most, int(budget_us / max(once_us, 1.0))))


def graph_times(candidates: Mapping[str, Sequence[Call]], budget_us: float = 15e3) -> dict[str, float | Exception]:
    """Median time of a call of each candidate by CUDA graph, candidates taking turns.

    Args:
        candidates: by name, one call for each set of inputs.
        budget_us: of one candidate in one round.

    Returns:
        Microseconds, or the error of one that cannot be captured.
    """
    found: dict[str, float | Exception] = {}
    graphs: dict[str, tuple[Call, int, int]] = {}
    for name, calls in candidates.items():
        try:
            first = capture(calls)
            once = elapsed_us(first)
            # A graph of a few short calls would be timed with its own launch.
            copies = times_for(once, 400.0, 8)
            replay = first if copies == 1 else capture(list(calls) * copies)
            graphs[name] = replay, len(calls) * copies, times_for(once * copies, budget_us, 9)
        except Exception as error:
            found[name] = error
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, (replay, count, repeats) in graphs.items():
            times[name] += [elapsed_us(replay) / count for _ in range(repeats)]
    return found | {name: statistics.median(values) for name, values in times.items()}


def plain_time(calls: Sequence[Call], budget_us: float = 20e3) -> float:
    """Median time of a call over loops of up to 64 calls, launches from Python included."""
    for call in calls[:4]:
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    calls[0]()
    torch.cuda.synchronize()
    count = max(4, times_for((time.perf_counter() - begin) * 1e6, budget_us, 64))
    looped = [calls[i % len(calls)] for i in range(count)]

    def loop() -> None:
        for call in looped:
            call()

    return statistics.median(elapsed_us(loop) / count for _ in range(ROUNDS))


def time_us(calls: Sequence[Call]) -> float:
    """Median time of one call by CUDA graph, on its own.

    Raises:
        Exception: whatever the calls raise.
    """
    (found,) = graph_times({"": calls}).values()
    if isinstance(found, Exception):
        raise found
    return found


def ceilings() -> dict[str, float]:
    """Read bandwidth in bytes per microsecond and bf16 matrix rate in FLOP per microsecond, measured."""
    data = torch.randn(1 << 29, device="cuda")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    read = data.numel() * 4 / time_us([lambda: data.sum()])
    return {"read_bytes_per_us": read, "bf16_flop_per_us": 2 * 8192**3 / time_us([lambda: a @ b])}


def require_gpu() -> None:
    """Ends the program with one line where there is no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("error: this benchmark needs a CUDA GPU, and PyTorch sees none here")
