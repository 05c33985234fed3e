"""The kernels' own code in Triton's interpreter: tests call launchers, never operators (the reference on a CPU)."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import triton
import triton.language as tl
from attention_cases import INTERVAL_MASKS, MASKS, Case, Problem, build, check, with_intervals
from mutants import mutant, own

from flashpte.kernels import combine, split_k, tile_map, tiled, tuning
from flashpte.kernels.call import NO_MAP, NO_SPLIT_K_MAP, AttentionCall, GivenMap, Launch, MapTiling, Partials
from flashpte.kernels.dispatch import launch_dispatch
from flashpte.kernels.intervals import launch_interval_map
from flashpte.kernels.mask import kernel_mask

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]


def run(launcher, case: Case, config=None):
    p = build(case)
    return p, launcher(own(launcher, p.call(case.dim_order)), config=config)


SPLIT_K_CASES = [
    *[Case(1, 200, mask=m) for m in MASKS],
    *[Case(5, 130, batch=2, heads_q=6, heads_kv=2, head_dim=32, mask=m) for m in MASKS],
    *[Case(3, 100, mask=m, dtype=torch.float32, head_dim=16) for m in ("none", "float_min_rows", "bool_ring")],
    *[Case(1, n, head_dim=32) for n in (1, 7, 50, 63, 64, 100, 130, 1000, 1025)],
    *[Case(2, 77, head_dim=d) for d in (16, 80, 96, 112, 192)],
    Case(1, 90, head_dim=320),
    *[Case(2, 77, heads_kv=1, head_dim=d, v_head_dim=512, mask="bool_context") for d in (520, 545, 576)],
    Case(1, 40, head_dim=576, v_head_dim=32, dtype=torch.float32),
    Case(2, 90, head_dim=48, v_head_dim=80),
    Case(16, 70, heads_q=8, heads_kv=1, head_dim=32, mask="bool_context"),
    *[
        Case(4, 120, batch=3, layout=layout, mask="bool_window", head_dim=40)
        for layout in ("blhd", "sliced", "expanded")
    ],
    Case(3, 90, dim_order=(0, 1, 2, 3)),
    Case(3, 90, scale=-0.7, mask="bool_dense"),
    Case(3, 90, scale=1.0, mask="float_bias"),
]

TILED_CASES = [
    *[Case(37, 150, head_dim=32, mask=m) for m in MASKS],
    *[
        Case(130, 140, batch=2, heads_q=3, heads_kv=1, head_dim=16, mask=m)
        for m in ("is_causal", "bool_context", "bool_head")
    ],
    *[Case(40, 100, mask=m, dtype=torch.float32, head_dim=16) for m in ("none", "float_min_rows", "bool_ring")],
    *[Case(20, n, head_dim=32) for n in (1, 7, 50, 63, 100, 130, 1025)],
    *[Case(20, 77, head_dim=d, mask="is_causal") for d in (16, 80, 96, 112, 192, 320)],
    Case(20, 90, head_dim=48, v_head_dim=80),
    *[Case(20, 77, heads_kv=1, head_dim=d, v_head_dim=512, mask="is_causal") for d in (545, 576)],
    *[
        Case(33, 120, batch=3, layout=layout, mask="bool_window", head_dim=40)
        for layout in ("blhd", "sliced", "expanded")
    ],
    Case(150, 60, head_dim=32, mask="is_causal"),
    Case(1, 90, mask="is_causal"),
    Case(5, 90, mask="bool_context"),
    Case(20, 90, dim_order=(0, 1, 2, 3), scale=-0.7, mask="bool_dense"),
]


@pytest.mark.parametrize("case", SPLIT_K_CASES, ids=str)
def test_split_k_matches_the_float64_answer(case):
    check(*run(split_k.launch_split_k, case))


@pytest.mark.parametrize("case", TILED_CASES, ids=str)
def test_tiled_matches_the_float64_answer(case):
    check(*run(tiled.launch_tiled, case))


def run_intervals(launcher, case: Case, kind: str, config=None):
    p, intervals = with_intervals(case, kind)
    return p, launcher(own(launcher, p.call(case.dim_order, intervals)), config=config)


@pytest.mark.parametrize("kind", INTERVAL_MASKS)
@pytest.mark.parametrize("q_len", [1, 5])
def test_split_k_with_intervals(kind, q_len):
    case = Case(q_len, 300, batch=2, heads_q=6, heads_kv=2, head_dim=32)
    check(*run_intervals(split_k.launch_split_k, case, kind))
    check(*run_intervals(split_k.launch_split_k, case, kind, tuning.SplitKConfig(16, 32, 3, 4, 2, False, 2)))


@pytest.mark.parametrize("kind", INTERVAL_MASKS)
def test_tiled_with_intervals(kind):
    check(*run_intervals(tiled.launch_tiled, Case(150, 200, batch=2, head_dim=16), kind))
    config = tuning.TiledConfig(32, 32, 4, 2, 16, 1)
    check(*run_intervals(tiled.launch_tiled, Case(37, 150, batch=2, head_dim=16), kind, config))


@pytest.mark.parametrize("q_len", [1, 5, 16])
@pytest.mark.parametrize("mask", ["none", "is_causal", "bool_context", "bool_head", "float_min_rows"])
def test_split_k_with_the_tiles_of_a_dynamic_length(q_len, mask):
    case = Case(q_len, 130, batch=2, heads_q=6, heads_kv=2, head_dim=16, mask=mask)
    p = build(case)
    shape = dataclasses.replace(p.call().shape(), q_len=None)
    check(*run(split_k.launch_split_k, case, tuning.choose_split_k(shape, tuning.limits("sm_90"))))


@pytest.mark.parametrize("q_len", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("row_tiles", [None, 1, 4])
@pytest.mark.parametrize("mask", ["bool_context", "bool_head", "bool_padding", "float_min_rows"])
def test_tile_map_is_its_reference(q_len, row_tiles, mask):
    p = build(Case(q_len, 300, batch=2, mask=mask))
    # Surrounds it with NaN or True only: a read out of bounds makes a tile partial.
    filler = True if p.mask.dtype == torch.bool else float("nan")
    around = torch.full([size + 2 for size in p.mask.shape], filler, dtype=p.mask.dtype)
    inside = around[tuple(slice(1, size + 1) for size in p.mask.shape)].copy_(p.mask)
    tiling = MapTiling(16, 64, 2, row_tiles)
    expected = tile_map.tile_map_reference(p.mask, q_len, 300, tiling)
    tiles, counts = tile_map.launch_tile_map(inside, q_len, 300, tiling)
    assert torch.equal(counts, expected[1])
    listed = torch.arange(tiles.shape[-1]) < counts[..., :2].sum(-1, keepdim=True)
    assert torch.equal(tiles[listed], expected[0][listed])


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 40])
@pytest.mark.parametrize(("block_rows", "block_n", "separate_full"), [(16, 16, True), (16, 64, False), (32, 32, True)])
def test_split_k_does_not_depend_on_its_tiles(num_splits, block_rows, block_n, separate_full):
    config = tuning.SplitKConfig(block_rows, block_n, num_splits, 4, 2, separate_full)
    for mask in ("none", "bool_ring", "float_min_rows"):
        check(*run(split_k.launch_split_k, Case(7, 300, heads_q=6, heads_kv=2, head_dim=16, mask=mask), config))


@pytest.mark.parametrize("edge_weight", [2, 7])
@pytest.mark.parametrize("kind", ["causal", "ring", "documents", "empty"])
def test_split_k_does_not_depend_on_what_edges_weigh(kind, edge_weight):
    case = Case(5, 200, heads_q=4, heads_kv=2, head_dim=16)
    for splits in (5, 40):
        config = tuning.SplitKConfig(16, 16, splits, 4, 2, edge_weight=edge_weight)
        check(*run_intervals(split_k.launch_split_k, case, kind, config))


@triton.jit
def _shares_kernel(out_ptr, active, steps, full_steps, WEIGHT: tl.constexpr):
    split = tl.program_id(0)
    tl.store(out_ptr + split, combine.share_of(split, active, steps, full_steps, WEIGHT))


@pytest.mark.parametrize("weight", [1, 2, 4])
def test_shares_cover_all_steps_and_weigh_edges(weight):
    for full, edges, active in (
        (0, 1, 1),
        (62, 1, 33),
        (62, 2, 16),
        (3, 1, 4),
        (0, 9, 4),
        (100, 0, 7),
        (1000, 30, 132),
    ):
        steps = full + edges
        shares = torch.full((active + 1,), -1, dtype=torch.int32)
        _shares_kernel[(active + 1,)](shares, active, steps, full, weight)
        assert (shares[0], shares[-1]) == (0, steps)
        assert (shares.diff() >= 0).all()
        costs = [
            sum(1 if step < full else weight for step in range(first, last))
            for first, last in itertools.pairwise(shares)
        ]
        assert max(costs) <= -(-(full + weight * edges) // active) + weight - 1


@pytest.mark.parametrize(
    ("kv_len", "splits", "v_head_dim"), [(300, 3, 96), (300, 64, 128), (300, 1, 128), (3, 40, 160)]
)
def test_combining_what_the_kernel_for_hopper_leaves(kv_len, splits, v_head_dim):
    """Partial results in the Hopper kernel's column order and units, of very different size; a lone split has none."""
    config = tuning.HopperConfig(16, 64, 2, share_rows=True, num_splits=splits, short_splits=splits)
    heads_kv, q_len, group, width = 2, 3, 2, -(-v_head_dim // 128) * 128
    out = torch.full((1, heads_kv * group, q_len, v_head_dim), float("nan"), dtype=torch.float16)
    partials = Partials.make(out, config, heads_kv * splits * q_len * group)
    rows = (heads_kv, splits, q_len * group)
    torch.manual_seed(0)
    row_max, row_sum = torch.randn(rows) * 9, torch.rand(rows) + 0.5
    row_max[:, -1, 0] = -float("inf")  # this split saw no key
    unit = torch.tensor([2.0**-40, 1.0, 2.0**-9, 3.0])[torch.randint(4, (*rows, width // 64))]
    stored = torch.randint(-(2**14), 2**14, (*rows, width)).to(torch.float16)
    partials.acc.copy_(stored.flatten(0, 2))
    partials.stats.copy_(torch.cat([row_max[..., None], row_sum[..., None], unit], -1).flatten(0, 2))
    call = AttentionCall(out, out[:, ::group], out[:, ::group], 1.0)
    mask = kernel_mask(call, NO_SPLIT_K_MAP, MapTiling(16, 64))
    combine.launch_combine(mask, Launch(config, out, partials, splits), heads_kv, kv_len)

    active = max(1, min(splits, -(-kv_len // 16)))
    if active == 1:
        assert out.isnan().all()
        return
    # A thread of a row holds columns 2 l and 2 l + 1 of every 8, and stores those of 32 columns together.
    held = stored.view(*rows, width // 32, 4, 4, 2).transpose(-2, -3).reshape(*rows, width).double()
    acc = held * unit.double().repeat_interleave(64, -1)
    weight = torch.exp2(row_max.double() - row_max[:, :active].amax(1, keepdim=True))[:, :active]
    expected = (acc[:, :active] * weight[..., None]).sum(1) / (row_sum[:, :active] * weight).sum(1)[..., None]
    expected = expected.view(heads_kv, q_len, group, width).transpose(1, 2).flatten(0, 1)[..., :v_head_dim]
    torch.testing.assert_close(out[0].double(), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (32, 128), (128, 64)])
def test_tiled_does_not_depend_on_its_tiles(block_m, block_n):
    config = tuning.TiledConfig(block_m, block_n, 4, 2, block_n, 1)
    for mask in ("none", "is_causal", "bool_window", "float_min_context"):
        check(*run(tiled.launch_tiled, Case(150, 200, head_dim=16, mask=mask), config))


def test_strides_in_memory_order():
    for order in ((0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (3, 2, 1, 0)):
        for launcher in (split_k.launch_split_k, tiled.launch_tiled):
            problem, out = run(launcher, Case(3, 50, batch=2, dim_order=order))
            check(problem, out)
            assert sorted(range(4), key=lambda d: -out.stride(d)) == list(order)


@pytest.mark.parametrize("q_len", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("mask", ["none", "is_causal", "bool_context", "bool_head", "bool_batch", "float_min_rows"])
@pytest.mark.parametrize("mapped", [False, True])
def test_dispatch_takes_one_kernel(monkeypatch, q_len, mask, mapped):
    case = Case(q_len, 190, batch=2, head_dim=16, mask=mask)
    counted = {module: CountedTiles(monkeypatch, module) for module in (split_k, tiled)}
    p = build(case)
    given = NO_MAP
    if mapped and p.mask is not None:
        tiling = MapTiling(*tuning.tiled_map_block(16, 16))
        given = GivenMap(*tile_map.launch_tile_map(p.mask, q_len, 190, tiling), None)
    check(p, launch_dispatch(p.call(case.dim_order), given))
    used = [module for module, tiles in counted.items() if tiles.visited]
    assert used == [split_k if q_len <= 16 else tiled]


class CountedTiles:
    """Counts the key tiles that a launcher's kernel attends to, by their first key."""

    def __init__(self, monkeypatch, module):
        self.visited: list[int] = []
        original = module.attend_tile

        def counting(*args, **kwargs):
            self.visited.append(int(args[4].handle.data.item()))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, "attend_tile", counting)


def _live_tiles(mask: torch.Tensor, block_m: int, block_n: int) -> int:
    """Counts live (row tile, key tile) pairs of a mask ``[1, 1, L_q, L_kv]`` by brute force."""
    _, _, q_len, kv_len = mask.shape
    return sum(
        bool(mask[0, 0, m : m + block_m, n : n + block_n].any())
        for m in range(0, q_len, block_m)
        for n in range(0, kv_len, block_n)
    )


@pytest.mark.parametrize("mask", ["bool_context", "bool_window", "bool_ring", "bool_all_empty"])
@pytest.mark.parametrize("q_len", [1, 5])
def test_split_k_visits_live_tiles_only(monkeypatch, mask, q_len):
    case = Case(q_len, 1000, heads_q=2, heads_kv=1, head_dim=16, mask=mask)
    counted = CountedTiles(monkeypatch, split_k)
    problem, out = run(split_k.launch_split_k, case, tuning.SplitKConfig(16, 64, 4, 4, 2))
    check(problem, out)
    assert len(counted.visited) == _live_tiles(problem.mask, q_len, 64)
    assert len(counted.visited) < 16


@pytest.mark.parametrize("kind", ["causal", "window", "ring", "documents", "empty"])
def test_intervals_visit_live_tiles_only(monkeypatch, kind):
    for module, launcher, case, config, tile in (
        (split_k, split_k.launch_split_k, Case(4, 1000), tuning.SplitKConfig(16, 64, 4, 4, 2), (16, 64)),
        (tiled, tiled.launch_tiled, Case(200, 900), tuning.TiledConfig(128, 128, 4, 2, 128, 1), (128, 128)),
    ):
        case = dataclasses.replace(case, heads_q=1, heads_kv=1, head_dim=16)
        counted = CountedTiles(monkeypatch, module)
        problem, out = run_intervals(launcher, case, kind, config)
        check(problem, out)
        live = _live_tiles(problem.mask, *tile)
        assert len(counted.visited) == live
        assert live < _live_tiles(torch.ones_like(problem.mask), *tile)


def test_interval_map_equals_its_reference():
    for kind in INTERVAL_MASKS:
        for tile in ((16, 64), (128, 128), (32, 16)):
            _, intervals = with_intervals(Case(200, 1100, batch=2), kind)
            tiles, counts = launch_interval_map(intervals, 1100, MapTiling(*tile))
            expected = torch.ops.flashpte.interval_map(intervals.bounds, intervals.values, 1100, *tile)
            assert torch.equal(counts, expected[1])
            listed = torch.arange(tiles.shape[-1]) < counts[..., :2].sum(-1, keepdim=True)
            assert torch.equal(tiles[listed], expected[0][listed])


def test_short_contexts_use_fewer_splits():
    """Splits past the last used one write nothing, and the combine kernel does not read their (poisoned) memory."""
    for keys, kind in ((1000, "causal"), (17000, "causal"), (17000, "window")):
        case = Case(2, keys, heads_q=2, heads_kv=1, head_dim=16)
        check(*run_intervals(split_k.launch_split_k, case, kind, tuning.SplitKConfig(16, 64, 9, 4, 2, True, 4)))


def test_split_k_causal_visits_visible_keys_only(monkeypatch):
    counted = CountedTiles(monkeypatch, split_k)
    check(*run(split_k.launch_split_k, Case(3, 1000, heads_kv=4, head_dim=16, mask="is_causal")))
    assert counted.visited == [0] * 4


@pytest.mark.parametrize("mask", ["bool_context", "bool_window", "bool_ring", "bool_all_empty", "float_min_context"])
def test_tiled_visits_live_tiles_only(monkeypatch, mask):
    case = Case(200, 900, heads_q=1, heads_kv=1, head_dim=16, mask=mask, dtype=torch.float32)
    counted = CountedTiles(monkeypatch, tiled)
    problem, out = run(tiled.launch_tiled, case, tuning.TiledConfig(128, 128, 4, 2, 128, 1))
    check(problem, out)
    seen = problem.mask if problem.mask.dtype == torch.bool else problem.mask == 0
    assert len(counted.visited) == _live_tiles(seen, 128, 128)
    assert len(counted.visited) < 2 * 8


def test_tiled_causal_visits_visible_keys_only(monkeypatch):
    counted = CountedTiles(monkeypatch, tiled)
    case = Case(256, 1000, heads_q=1, heads_kv=1, head_dim=16, mask="is_causal")
    check(*run(tiled.launch_tiled, case, tuning.TiledConfig(64, 64, 4, 2, 64, 1)))
    assert len(counted.visited) == 1 + 2 + 3 + 4


TAIL = "scores = tl.where((n < n_keys)[None, :], scores"
RESCALE = "acc * rescale[:, None]"
SPLIT = Case(3, 90, head_dim=32, scale=1.0)
MUTATIONS = {
    "split_k without the tail mask": ("primitives.py", TAIL, "scores = tl.where((n >= 0)[None, :], scores", "split_k"),
    "split_k without the rescale": ("primitives.py", RESCALE, "acc", "split_k"),
    "more splits combined than worked": (
        "combine.py",
        "tl.where(s < active",
        "tl.where(s < active + 1",
        "split_k",
    ),
    "combine without the weights": ("combine.py", "split_sum * weight, 0", "split_sum, 0", "split_k"),
    "tiled without the tail mask": ("primitives.py", TAIL, "scores = tl.where((n >= 0)[None, :], scores", "tiled"),
    "tiled without the rescale": ("primitives.py", RESCALE, "acc", "tiled"),
    "causal aligned to the bottom": ("primitives.py", "<= q_pos[:, None]", "<= q_pos[:, None] + 30", "tiled"),
    "map that drops partial tiles": ("tile_map.py", "(state == 1) |", "(state == 7) |", "tiled"),
    "map that calls partial tiles full": ("tile_map.py", "tl.where(all_open != 0, 2, 1)", "2", "tiled"),
    "map that skips every floor tile": ("tile_map.py", "(anchored == 0)", "(anchored == 9)", "tiled"),
    "intervals that drop the lower bound": ("primitives.py", "(value >= lower[:, None]) &", "", "intervals"),
    "intervals off by one": ("primitives.py", "value <= upper", "value < upper", "intervals"),
    "interval map that calls partial tiles full": ("intervals.py", "tl.where(all_open != 0, 2, 1)", "2", "intervals"),
    "interval map that ignores lower bounds": ("intervals.py", "open_ & (lower <= smallest)", "open_", "intervals"),
    "float mask in log2 units": ("launch.py", "return LOG2E if", "return 1.0 if", "split_k"),
}


def attempts(launcher, kind: str):
    """Problems and a launcher's results for them, for one kind of mutation."""
    if kind == "tiled":
        rows, config = 40, tuning.TiledConfig(16, 16, 4, 2, 16, 1)
    else:
        rows, config = 3, tuning.SplitKConfig(16, 16, 3, 4, 2, True, 2)
    if kind == "intervals":
        for structure in ("causal", "window", "documents"):
            yield run_intervals(launcher, Case(rows, 200, head_dim=32), structure, config)
        return
    for mask in ("none", "is_causal", "bool_context", "float_min_rows", "float_all_min", "float_bias"):
        dtype = torch.float32 if "min" in mask else torch.float16
        yield run(launcher, Case(rows, 90, head_dim=32, scale=1.0, mask=mask, dtype=dtype), config)


def is_wrong(launcher, kind: str) -> bool:
    """Whether any result is wrong; stops at the first."""
    try:
        for problem, out in attempts(launcher, kind):
            check(problem, out)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("kind", ["split_k", "tiled", "intervals"])
def test_what_is_mutated_is_right(kind):
    assert not is_wrong(tiled.launch_tiled if kind == "tiled" else split_k.launch_split_k, kind)


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_caught(name, tmp_path):
    file, old, new, kind = MUTATIONS[name]
    module = "tiled" if kind == "tiled" else "split_k"
    assert is_wrong(getattr(mutant(tmp_path, file, old, new, module), f"launch_{module}"), kind)


def test_float16_scores_that_bridge_the_masks_minimum():
    """Keys masked by -65504 still win by their scores, so skipping their tiles would be wrong."""
    query = torch.full((1, 1, 1, 64), 40.0, dtype=torch.float16)
    key = torch.full((1, 1, 256, 64), -20.0, dtype=torch.float16)
    key[:, :, 128:] = 40.0
    value = torch.randn(1, 1, 256, 64, generator=torch.Generator().manual_seed(0)).half()
    mask = torch.zeros(1, 1, 1, 256, dtype=torch.float16)
    mask[..., 128:] = torch.finfo(torch.float16).min
    problem = Problem(query, key, value, mask, False, 1.0)
    for launcher in (split_k.launch_split_k, tiled.launch_tiled):
        check(problem, launcher(problem.call()))
