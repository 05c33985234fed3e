"""Picks a Triton matrix-multiply configuration with a small roofline model, where Inductor would benchmark.

Inductor offers one choice per (tile, stages, warps) of its matrix-multiply templates and times them all on the GPU.
Here a model estimates each time, and the smallest wins. Equal times go to the earlier choice, so the result is the same
everywhere. The model takes the larger of

* memory time: the bytes that the grid reads and writes, over the GPU's bandwidth. The right operand counts once per
  eight rows of tiles, which the template walks together. The time grows by the ratio of the bytes that must be in
  flight (Little's law with the latency below) to those that the pipelines hold, plus a fixed time per step of a
  block's loop;
* arithmetic time: the tiles of the busiest multiprocessor at its share of the tensor-core rate. The rate is scaled by
  how well a tile feeds the tensor cores: its operations per byte, its step length and its pipeline depth;

and adds 1% per wave of thread blocks. The constants were fitted to the times of Inductor's own choices on an H200;
docs/benchmarks-h200.md says how far the picks are from the best ones.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from flashpte.kernels.tuning import GpuArch

_LATENCY_S = 0.4e-6  # memory latency that nothing else hides
_STEP_S = 0.24e-6  # one step of a block's loop that waits for memory
# With m = 1 all 16 rows of a tile load the same row; on busy multiprocessors this slows every step of two warps.
_ONE_ROW_STEP_S = 0.05e-6
_ROWS_TOGETHER = 8  # GROUP_M of the template
_COST_PER_WAVE = 0.01
# For a tile of 128 by 128: multiply-adds per element read, and the share of the peak rate that it reaches.
_BEST_INTENSITY, _BEST_RATE = 64.0, 0.72
_SHALLOW_PIPELINE = {1: 2.2, 2: 1.6}


@dataclasses.dataclass(frozen=True)
class GemmProblem:
    """``batch`` products of [m, k] by [k, n], elements of ``itemsize`` bytes."""

    batch: int
    m: int
    n: int
    k: int
    itemsize: int


@dataclasses.dataclass(frozen=True)
class GemmTile:
    """One configuration of the template: a block computes [m, n] in steps of k, with a software pipeline."""

    m: int
    n: int
    k: int
    stages: int
    warps: int

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of one block, in bytes."""
        return (self.m + self.n) * self.k * itemsize * max(1, self.stages)


def estimate_seconds(problem: GemmProblem, tile: GemmTile, arch: GpuArch) -> float:
    """The model's time for one choice, in seconds; infinity if the tile does not fit in shared memory."""
    shared = tile.shared_bytes(problem.itemsize)
    if shared > arch.shared_memory_per_block:
        return math.inf
    rows, columns = -(-problem.m // tile.m), -(-problem.n // tile.n)
    blocks = problem.batch * rows * columns
    resident = max(1, min(arch.shared_memory_per_sm // max(shared, 1), arch.threads_per_sm // (32 * tile.warps), 16))
    waves = -(-blocks // (arch.sm_count * resident))
    busiest = -(-blocks // arch.sm_count)

    moved = problem.m * problem.k + problem.k * problem.n * -(-rows // _ROWS_TOGETHER) + problem.m * problem.n
    moved *= problem.batch * problem.itemsize
    bandwidth = arch.memory_gb_per_s * 1e9
    per_step = (tile.m + tile.n) * tile.k * problem.itemsize
    in_flight = min(resident, busiest) * max(1, tile.stages - 1) * per_step * min(blocks, arch.sm_count)
    busy = 2 * blocks > arch.sm_count
    step = _STEP_S + (_ONE_ROW_STEP_S if problem.m == 1 and tile.warps <= 2 and busy else 0)
    memory = moved / bandwidth * (1 + bandwidth * _LATENCY_S / in_flight) + problem.k / tile.k * step

    operations = 2.0 * busiest * tile.m * tile.n * problem.k
    feeding = min(1.0, tile.m * tile.n / (tile.m + tile.n) / _BEST_INTENSITY) * (1 + 16 / 64) / (1 + 16 / tile.k)
    rate = _BEST_RATE * feeding / _SHALLOW_PIPELINE.get(tile.stages, 1.0)
    arithmetic = operations / (arch.bf16_tflops * 1e12 / arch.sm_count * rate)
    return max(memory, arithmetic) * (1 + _COST_PER_WAVE * waves)


def make_chooser(arch: GpuArch) -> Callable[[list[Any]], list[Any]]:
    """An Inductor "preprocessing function", which takes the choices for one operation and returns the one to use.

    The model does not cover choices other than matrix-multiply templates (convolutions, library calls); if there are
    only those, it returns Inductor's first.
    """

    def choose(choices: list[Any]) -> list[Any]:
        if len(choices) <= 1:
            return choices
        best, best_time = choices[0], math.inf
        for choice in choices:
            described = _describe(choice)
            if described is None:
                continue
            seconds = estimate_seconds(*described, arch)
            if seconds < best_time:
                best, best_time = choice, seconds
        return [best]

    return choose


def _describe(choice: Any) -> tuple[GemmProblem, GemmTile] | None:
    """Reads the problem and the tile out of an Inductor ``TritonTemplateCaller``."""
    info = getattr(choice, "log_info", None) or {}
    inputs = getattr(choice, "input_nodes", None)
    if "tile_shape" not in info or not inputs or len(inputs) < 2:
        return None
    numbers = [int(number) for number in re.findall(r"\d+", str(info["tile_shape"]))]
    if len(numbers) != 3:
        return None
    tile_m, tile_k, tile_n = numbers  # in the order in which Inductor logs them
    tile = GemmTile(tile_m, tile_n, tile_k, int(info.get("num_stages", 1)), int(info.get("num_warps", 4)))
    *batch, m, n = _sizes(choice.layout.size)
    left, right = inputs[-2], inputs[-1]
    itemsize = max(left.get_dtype().itemsize, right.get_dtype().itemsize)
    return GemmProblem(math.prod(batch), m, n, _sizes(left.get_size())[-1], itemsize), tile


def _sizes(sizes: Sequence[Any]) -> list[int]:
    """Sizes as numbers; a dynamic size counts as its upper bound, where most of the time is spent."""
    from torch._inductor.virtualized import V

    def number(size: Any) -> int:
        upper = V.graph.sizevars.shape_env.bound_sympy(size).upper if hasattr(size, "free_symbols") else size
        if upper.is_Integer if hasattr(upper, "is_Integer") else isinstance(upper, int):
            return int(upper)
        return int(V.graph.sizevars.optimization_hint(size, fallback=64))

    return [number(size) for size in sizes]
