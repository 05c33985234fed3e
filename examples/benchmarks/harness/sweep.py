"""All tiles of a shape, timed against the one that the table picks.

Everything that knows what a tile choice looks like and how a launcher takes one is in this file.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from flashpte.kernels import tuning
from flashpte.kernels.call import AttentionCall, GivenMap
from flashpte.kernels.intervals import Intervals
from flashpte.kernels.split_k import launch_split_k
from flashpte.kernels.tiled import launch_tiled
from harness.cases import Case
from harness.inputs import LARGEST_ERROR, Inputs
from harness.ours import DIM_ORDER, POSITIONS, map_makers
from harness.timing import graph_times

Config = tuning.SplitKConfig | tuning.TiledConfig | tuning.HopperConfig


def attention_shape(case: Case) -> tuning.AttentionShape:
    """What the table is asked for a case."""
    shape = case.shape
    dims = (shape.head_dim, shape.v_head_dim)
    return tuning.AttentionShape(
        case.batch, shape.heads_q, shape.heads_kv, case.rows, case.length, *dims, torch.bfloat16
    )


def table_choice(case: Case, arch: tuning.GpuArch) -> Config:
    """The tile that the launcher picks."""
    shape = attention_shape(case)
    if not case.prefills:
        return tuning.choose_hopper_split_k(shape, arch) or tuning.choose_split_k(shape, arch)
    return tuning.choose_hopper(shape, arch) or tuning.choose_tiled(shape, arch)


def _fits(block_n: int, stages: int, case: Case, arch: tuning.GpuArch) -> bool:
    """Whether keys and values of all stages may fit in shared memory; what does not after all is skipped later."""
    columns = tuning.padded_head_dim(case.shape.head_dim) + tuning.padded_head_dim(case.shape.v_head_dim)
    return stages * block_n * columns * 2 <= arch.shared_memory_per_block


def _split_k_tiles(case: Case, arch: tuning.GpuArch, wide: bool) -> Iterator[Config]:
    base, width = tuning.choose_split_k(attention_shape(case), arch), tuning.padded_head_dim(case.shape.v_head_dim)
    if arch.capability == (9, 0) and width >= 128 and case.shape.head_dim <= tuning.WIDEST_TILE:
        # Tiles of keys and of values, that is how many of each are in shared memory.
        slots = ((2, 2), (2, 3), (3, 2), (3, 3), (4, 4)) if wide else ((2, 2), (2, 3), (3, 2), (3, 3))
        for block_n, (stages, v_stages) in itertools.product((16, 32, 64) if wide else (32, 64), slots):
            left = arch.shared_memory_per_block - 1024 - 64 * width * 2
            if (stages + v_stages) * block_n * width * 2 <= left:
                registers = tuning.hopper_registers(width)
                splits = {"num_splits": base.num_splits, "short_splits": base.short_splits}
                more = v_stages - stages
                yield tuning.HopperConfig(
                    block_n, width // 2, stages, *registers, share_rows=True, more_v_stages=more, **splits
                )
    sizes = ((16, 32, 64), (2, 4, 8), (2, 3, 4)) if wide else ((32, 64), (4, 8), (2, 3, 4))
    for block_n, warps, stages in itertools.product(*sizes):
        # 128 registers of a thread for the accumulator.
        crowded = base.block_rows * width > warps * 32 * 128
        if _fits(block_n, stages, case, arch) and not crowded:
            yield dataclasses.replace(base, block_n=block_n, num_warps=warps, num_stages=stages)


def _prefill_tiles(case: Case, arch: tuning.GpuArch, wide: bool) -> Iterator[Config]:
    shape, width = attention_shape(case), tuning.padded_head_dim(case.shape.v_head_dim)
    map_n = tuning.tiled_map_block(shape.head_dim, shape.v_head_dim)[1]
    hopper = tuning.choose_hopper(shape, arch)
    if hopper is not None:
        yield dataclasses.replace(hopper, tma=not hopper.tma)
        for block_n, stages in itertools.product((32, 64, 128) if wide else (64, 128), (2, 3, 4)):
            too_small = hopper.two_blocks and block_n < 64
            if map_n % block_n == 0 and not too_small and _fits(block_n, stages, case, arch):
                more = max(hopper.more_v_stages, 2 - stages)
                yield dataclasses.replace(hopper, block_n=block_n, num_stages=stages, more_v_stages=more)
    base = tuning.choose_tiled(shape, arch)
    sizes = ((64, 128), (32, 64, 128), (4, 8), (2, 3)) if wide else ((128,), (64, 128), (8,), (2, 3))
    if case.shape.latent_values is not None:
        sizes = ((32, 64), (16, 32, 64), (4, 8), (2, 3))
    for rows, block_n, warps, stages in itertools.product(*sizes):
        crowded = rows * width > warps * 32 * 128
        if map_n % block_n == 0 and not crowded and _fits(block_n, stages, case, arch):
            edge = min(block_n, base.edge_block_n)
            yield dataclasses.replace(
                base, block_m=rows, block_n=block_n, num_warps=warps, num_stages=stages, edge_block_n=edge
            )


def tiles(case: Case, arch: tuning.GpuArch) -> list[Config]:
    """What has to be compiled for a sweep, the table's choice first; less in the benchmark than for tuning."""
    each = _prefill_tiles if case.prefills else _split_k_tiles
    more = each(case, arch, wide=not case.ours_alone)
    return list(dict.fromkeys([table_choice(case, arch), *more]))


def with_splits(case: Case, config: Config, arch: tuning.GpuArch) -> list[Config]:
    """Tiles with other numbers of splits, which take no compiling."""
    if case.prefills:
        return [config]
    rows = config.block_m if isinstance(config, tuning.HopperConfig) else config.block_rows
    packed = -(-case.rows * case.shape.group // rows)
    fill = arch.sm_count / (case.batch * case.shape.heads_kv * packed)
    most = min(512, case.live // config.block_n)
    # A single split is another kernel.
    counts = {max(2, min(most, int(fill * times))) for times in (0.5, 1, 2, 3, 4)}
    return [dataclasses.replace(config, num_splits=n, short_splits=n) for n in sorted(counts)]


def launcher(inputs: Inputs) -> Callable[[Any, Config], torch.Tensor]:
    """Calls the kernel for one set of inputs with a given tile."""
    tile_map, intervals = map_makers(inputs)[POSITIONS](), Intervals(inputs.bounds, None)
    launch = launch_tiled if inputs.case.prefills else launch_split_k
    given = GivenMap(*tile_map, None if inputs.case.prefills else tuning.SPLIT_K_MAP_BLOCK_N)

    def call(tensors: Any, config: Config) -> torch.Tensor:
        attention = AttentionCall(*tensors, inputs.case.shape.scale, dim_order=DIM_ORDER, intervals=intervals)
        return launch(attention, given, config=config)

    return call


def compile_part(inputs: Inputs, i: int, n: int) -> None:
    """Compiles this process's share of the tiles; those that do not compile are left to the sweep to skip."""
    call, arch = launcher(inputs), tuning.current_arch(torch.device("cuda"))
    for tile in tiles(inputs.case, arch)[i::n]:
        try:
            # What combines the splits is compiled for their number.
            for config in (tile, *with_splits(inputs.case, tile, arch)):
                call(inputs.sets[0], config)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{tile}: {type(error).__name__}", flush=True)


def sweep(inputs: Inputs, budget_us: float = 2e3) -> dict[str, Any]:
    """Times every tile and split; the table's choice and the best one are then timed again side by side.

    Returns:
        ``table`` and ``best`` microseconds with their tiles, their ``ratio``, how many were tried, and the ten best.
    """
    arch, call = tuning.current_arch(torch.device("cuda")), launcher(inputs)
    chosen = table_choice(inputs.case, arch)
    found: list[tuple[float, Config]] = []
    tried = 0
    for tile in tiles(inputs.case, arch):
        for config in dict.fromkeys([*([chosen] if tile == chosen else []), *with_splits(inputs.case, tile, arch)]):
            tried += 1
            try:
                if inputs.error(lambda c=config: call(inputs.sets[0], c)) > LARGEST_ERROR:
                    continue
            except Exception:  # does not compile or does not fit
                continue
            calls = [lambda s=s, c=config: call(s, c) for s in inputs.sets]
            (time,) = graph_times({"": calls}, budget_us).values()
            if isinstance(time, float):
                found.append((time, config))
    found.sort(key=lambda entry: entry[0])
    best = found[0][1]
    again = {
        name: [lambda s=s, c=c: call(s, c) for s in inputs.sets] for name, c in (("table", chosen), ("best", best))
    }
    times = graph_times(again)
    for value in times.values():
        if isinstance(value, Exception):
            raise value
    return {
        **times,
        "ratio": times["table"] / times["best"],
        "table tile": described(chosen),
        "best tile": described(best),
        "tried": tried,
        "first": [{"us": time, "tile": described(config)} for time, config in found[:10]],
    }


def described(config: Config) -> str:
    """A config as results hold it: the kernel and all of its numbers."""
    numbers = " ".join(f"{key}={value}" for key, value in dataclasses.asdict(config).items())
    return f"{type(config).__name__.removesuffix('Config')} {numbers}"
