import json
import math
import types
from pathlib import Path

import pytest

from flashpte.export.lowering import find_arch
from flashpte.export.lowering.cross_compile.gemm_choice import GemmProblem, GemmTile, estimate_seconds, make_chooser

DECODE = GemmProblem(batch=1, m=1, n=5376, k=5376, itemsize=2)
PREFILL = GemmProblem(batch=1, m=1024, n=5376, k=5376, itemsize=2)
NARROW = GemmTile(m=16, n=32, k=128, stages=4, warps=4)
WIDE = GemmTile(m=128, n=128, k=64, stages=3, warps=8)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_one_row_takes_the_narrow_tile_and_many_rows_the_wide_one(arch):
    arch = find_arch(arch)
    assert estimate_seconds(DECODE, NARROW, arch) < estimate_seconds(DECODE, WIDE, arch)
    assert estimate_seconds(PREFILL, WIDE, arch) < estimate_seconds(PREFILL, NARROW, arch)


def test_a_tile_that_does_not_fit_is_never_taken():
    tile = GemmTile(m=128, n=256, k=64, stages=4, warps=8)  # 196,608 bytes of shared memory
    assert tile.shared_bytes(2) == 196608
    assert math.isinf(estimate_seconds(PREFILL, tile, find_arch("sm_80")))
    assert math.isfinite(estimate_seconds(PREFILL, tile, find_arch("sm_90")))


def test_never_faster_than_the_memory_allows():
    arch = find_arch("sm_90")
    bytes_read = DECODE.k * DECODE.n * 2
    assert estimate_seconds(DECODE, NARROW, arch) >= bytes_read / (arch.memory_gb_per_s * 1e9)


def choice(**info):
    node = types.SimpleNamespace(get_dtype=lambda: types.SimpleNamespace(itemsize=2), get_size=lambda: [16, 64])
    layout = types.SimpleNamespace(size=[16, 64])
    return types.SimpleNamespace(log_info=info, input_nodes=[node, node], layout=layout)


def test_choices_that_are_not_modelled_keep_their_order():
    first, second = choice(), choice()
    chooser = make_chooser(find_arch("sm_90"))
    assert chooser([first, second]) == [first]
    assert chooser([second]) == [second]
    assert chooser([]) == []


def test_picks_are_near_the_best_of_an_h200():
    """Compares with recorded times of Inductor's choices; among equal estimates the slowest counts."""
    recorded = Path(__file__).parents[3] / "examples" / "benchmarks" / "results" / "h200" / "gemm.json"
    arch = find_arch("sm_90")
    cases: dict[GemmProblem, dict[GemmTile, float]] = {}
    for row in json.loads(recorded.read_text())["rows"]:
        problem = GemmProblem(batch=1, m=row["m"], n=row["n"], k=row["k"], itemsize=2)
        tile = GemmTile(row["tile_m"], row["tile_n"], row["tile_k"], row["stages"], row["warps"])
        if "time_us" in row:
            cases.setdefault(problem, {})[tile] = row["time_us"]
    ratios = []
    for problem, times in cases.items():
        estimates = {tile: estimate_seconds(problem, tile, arch) for tile in times}
        picked = [tile for tile, estimate in estimates.items() if estimate == min(estimates.values())]
        ratios.append(max(times[tile] for tile in picked) / min(times.values()))
    assert len(ratios) == 27
    assert sum(ratios) / len(ratios) < 1.03
    assert max(ratios) < 1.27
