"""The operators on a GPU, compared with float64 on random problems with poisoned memory."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from attention_cases import INTERVAL_MASKS, LAYOUTS, MASKS, Case, build, check, with_intervals

from flashpte.kernels import sdpa_decode, sdpa_dispatch, sdpa_prefill, sdpa_verify, split_k, tiled, tuning

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

LENGTHS = (1, 7, 50, 63, 64, 100, 130, 511, 1000, 1025, 2048, 3000)
HEAD_DIMS = (16, 64, 72, 80, 96, 112, 128, 160, 192, 256, 320, 512)


def run(case: Case):
    p = build(case, "cuda")
    op = sdpa_decode if case.q_len == 1 else sdpa_verify if case.q_len <= 16 else sdpa_prefill
    return p, op(p.query, p.key, p.value, p.mask, None, None, p.is_causal, p.scale, list(case.dim_order))


def random_cases(count: int, rows: tuple[int, ...], seed: int) -> list[Case]:
    rng = random.Random(seed)
    cases = []
    for i in range(count):
        heads_kv = rng.choice((1, 2, 4))
        head_dim = rng.choice(HEAD_DIMS)
        cases.append(
            Case(
                q_len=rng.choice(rows),
                kv_len=rng.choice(LENGTHS),
                batch=rng.choice((1, 1, 3)),
                heads_q=heads_kv * rng.choice((1, 2, 3, 8)),
                heads_kv=heads_kv,
                head_dim=head_dim,
                v_head_dim=rng.choice((None, None, None, 64)),
                dtype=rng.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)),
                mask=rng.choice(MASKS),
                layout=rng.choice(LAYOUTS),
                scale=rng.choice((None, 1.0)) if head_dim <= 128 else None,
                seed=i,
            )
        )
    return cases


@pytest.mark.parametrize("case", random_cases(120, (1,), 1), ids=str)
def test_decode(case):
    check(*run(case))


@pytest.mark.parametrize("case", random_cases(120, (2, 3, 5, 8, 16), 2), ids=str)
def test_verify(case):
    check(*run(case))


@pytest.mark.parametrize("case", random_cases(140, (17, 63, 100, 128, 300, 1025), 3), ids=str)
def test_prefill(case):
    check(*run(case))


@pytest.mark.parametrize("case", random_cases(70, (100, 128, 300, 1025), 4), ids=str)
def test_prefill_by_the_kernel_of_other_archs(case, monkeypatch):
    monkeypatch.setattr(tuning, "choose_hopper", lambda shape, arch: None)
    check(*run(case))


@pytest.mark.parametrize("case", random_cases(100, (1, 2, 5, 8, 16), 5), ids=str)
def test_few_rows_by_the_kernel_of_other_archs(case, monkeypatch):
    monkeypatch.setattr(tuning, "choose_hopper_split_k", lambda shape, arch: None)
    check(*run(case))


@pytest.mark.parametrize("case", random_cases(60, (2, 5, 8, 16), 6), ids=str)
def test_few_rows_and_keys_by_the_kernel_for_hopper(case, monkeypatch):
    """The tuning table leaves these cases to the other kernel."""
    monkeypatch.setattr(tuning.hopper, "little_for_each", lambda shape, arch: False)
    check(*run(case))


@pytest.mark.parametrize("kv_len", [2047, 2048, 5000])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 160, 192, 256, 512])
@pytest.mark.parametrize("mask", ["none", "bool_context", "bool_window", "float_min_rows"])
def test_prefill_of_few_rows_splits_the_keys(kv_len, head_dim, mask):
    check(*run(Case(200, kv_len, heads_q=4, heads_kv=2, head_dim=head_dim, dtype=torch.bfloat16, mask=mask)))


@pytest.mark.parametrize("mask", ["none", "bool_context"])
def test_prefill_of_a_batch_of_windows(mask):
    """The heads of all windows together exceed the second dimension of a grid."""
    p = build(Case(80, 80, heads_q=16, heads_kv=16, dtype=torch.bfloat16, mask=mask), "cuda")
    out = sdpa_prefill(
        *(tensor.expand(4200, -1, -1, -1) for tensor in (p.query, p.key, p.value)),
        *(p.mask, None, None, False, p.scale, [0, 2, 1, 3]),
    )
    check(p, out[:1])
    assert torch.equal(out, out[:1].expand_as(out))


def test_prefill_of_an_empty_batch():
    q, kv = (torch.empty(0, 4, rows, 64, dtype=torch.bfloat16, device="cuda") for rows in (200, 4096))
    assert sdpa_prefill(q, kv, kv, None, None, None, False, 0.1, [0, 2, 1, 3]).shape == q.shape


REAL_SHAPES = {
    "gemma-full": dict(heads_q=32, heads_kv=4, head_dim=512, scale=0.06),
    "gemma-sliding": dict(heads_q=32, heads_kv=16, head_dim=256, scale=0.08),
    "qwen3.5": dict(heads_q=16, heads_kv=2, head_dim=256),
    "llama-8b": dict(heads_q=32, heads_kv=8, head_dim=128),
}


@pytest.mark.parametrize("shape", REAL_SHAPES)
@pytest.mark.parametrize("q_len", [1, 4, 8, 16, 512])
@pytest.mark.parametrize("mask", ["none", "bool_context", "bool_ring"])
def test_shapes_of_real_models(shape, q_len, mask):
    check(*run(Case(q_len, 4100, dtype=torch.bfloat16, mask=mask, **REAL_SHAPES[shape])))


@pytest.mark.parametrize("heads_q", [16, 128])
@pytest.mark.parametrize("q_len", [1, 4, 16, 200])
@pytest.mark.parametrize("mask", ["none", "is_causal", "bool_context", "float_bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_wider_than_one_tile(heads_q, q_len, mask, dtype):
    """Multi-head latent attention in its absorbed form."""
    sizes = dict(heads_kv=1, head_dim=576, v_head_dim=512, scale=0.05)
    check(*run(Case(q_len, 1100, heads_q=heads_q, dtype=dtype, mask=mask, **sizes)))


@pytest.mark.parametrize("q_len", [1, 7, 60])
@pytest.mark.parametrize("head_dim", [513, 520, 545, 560])
def test_the_rest_of_wide_keys_has_any_width(q_len, head_dim):
    for dtype in (torch.bfloat16, torch.float32):
        check(*run(Case(q_len, 300, head_dim=head_dim, v_head_dim=48, dtype=dtype, mask="bool_dense")))


@pytest.mark.parametrize("kv_len", [50, 100, 130])
@pytest.mark.parametrize("q_len", [1, 5, 60])
def test_no_mask_and_a_tail_does_not_count_padding_keys(q_len, kv_len):
    check(*run(Case(q_len, kv_len, dtype=torch.bfloat16)))


@pytest.mark.parametrize("head_dim", [320, 384])
@pytest.mark.parametrize("q_len", [1, 5, 60])
def test_every_column_of_a_wide_odd_head_dim_is_written(q_len, head_dim):
    check(*run(Case(q_len, 200, head_dim=head_dim, dtype=torch.bfloat16)))


def test_causal_decode_sees_only_the_first_key():
    problem, out = run(Case(1, 100, mask="is_causal", dtype=torch.bfloat16))
    check(problem, out)
    torch.testing.assert_close(out[:, ::2], problem.value[:, :, :1], atol=0, rtol=0)


def test_large_scores_do_not_overflow():
    """Scores of several hundred, which would overflow with a fixed softmax maximum."""
    for q_len in (1, 8, 100):
        p = build(Case(q_len, 500, dtype=torch.bfloat16, mask="bool_context"), "cuda")
        p = type(p)(p.query * 12, p.key * 12, p.value, p.mask, p.is_causal, p.scale)
        op = sdpa_prefill if q_len > 16 else sdpa_verify
        check(p, op(p.query, p.key, p.value, p.mask, None, None, False, p.scale, [0, 2, 1, 3]))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256, 512])
@pytest.mark.parametrize("kv_len", [1, 7, 130, 3000])
def test_prefill_of_keys_that_lie_in_memory_in_any_way(kv_len, head_dim):
    """One row for all keys, heads inside rows, wider rows, and a longer cache with no numbers after the keys."""
    p = build(Case(200, kv_len, heads_q=8, heads_kv=2, head_dim=head_dim, dtype=torch.bfloat16, mask="none"), "cuda")
    one_row = [x[:, :, :1].expand_as(x) for x in (p.key, p.value)]
    heads_inside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (p.key, p.value)]
    wider = [
        torch.nn.functional.pad(x, (16, 48), value=float("nan"))[..., 16 : 16 + head_dim] for x in (p.key, p.value)
    ]
    behind = (0, 0, 0, 100)
    longer = [torch.nn.functional.pad(x, behind, value=float("nan"))[:, :, :kv_len] for x in (p.key, p.value)]
    for key, value in (one_row, heads_inside, wider, longer):
        found = sdpa_prefill(p.query, key, value, None, None, None, False, p.scale, [0, 2, 1, 3])
        check(dataclasses.replace(p, key=key, value=value), found)


def test_masked_values_are_never_read():
    """NaN in the values of every fully masked key tile must not reach the result."""
    for case in (Case(1, 1000, mask="bool_ring"), Case(5, 1000, mask="bool_ring"), Case(200, 1000, mask="bool_window")):
        p = build(case, "cuda")
        block = 64 if case.q_len <= 16 else 128
        value = p.value.clone()
        for start in range(0, 1000, block):
            if not p.mask[..., start : start + block].any():
                value[:, :, start : start + block] = float("nan")
        assert value.isnan().any()
        op = sdpa_prefill if case.q_len > 16 else sdpa_verify
        check(p, op(p.query, p.key, value, p.mask, None, None, False, p.scale, [0, 2, 1, 3]))


@pytest.mark.parametrize("q_len", [1, 5, 16, 17, 300])
@pytest.mark.parametrize("mask", ["none", "is_causal", "bool_context", "float_min_rows"])
def test_dispatch(q_len, mask):
    p = build(Case(q_len, 1000, batch=2, dtype=torch.bfloat16, mask=mask), "cuda")
    check(p, sdpa_dispatch(p.query, p.key, p.value, p.mask, None, None, p.is_causal, p.scale, [0, 2, 1, 3]))


@pytest.mark.parametrize(
    ("op", "q_len"), [(sdpa_decode, 1), (sdpa_verify, 5), (sdpa_prefill, 40), (sdpa_dispatch, 5), (sdpa_dispatch, 40)]
)
@pytest.mark.parametrize("mask", ["none", "bool_context", "float_min_context"])
def test_opcheck(op, q_len, mask):
    p = build(Case(q_len, 100, mask=mask), "cuda")
    args = (p.query, p.key, p.value, p.mask, None, None, p.is_causal, p.scale, [0, 2, 1, 3])
    torch.library.opcheck(op, args)


def test_tile_map_on_gpu_equals_its_reference():
    for mask in MASKS:
        if mask in ("none", "is_causal"):
            continue
        for options in ((16, 64, 2), (16, 64, 2, 1), (16, 64, 2, 15), (128, 128, 1), (64, 64, 1)):
            case = Case(200, 1500, batch=2, mask=mask)
            p = build(case)
            expected = torch.ops.flashpte.tile_map(p.mask, 200, 1500, *options)
            tiles, counts = torch.ops.flashpte.tile_map(p.mask.cuda(), 200, 1500, *options)
            assert torch.equal(counts.cpu(), expected[1])
            listed = torch.arange(tiles.shape[-1]) < expected[1][..., :2].sum(-1, keepdim=True)
            assert torch.equal(tiles.cpu()[listed], expected[0][listed])


FEW_ROWS = (tuning.choose_split_k, tuning.choose_hopper_split_k)
MANY_ROWS = (tuning.choose_tiled, tuning.choose_hopper)

# Needs compute capability 9.0.
HOPPER_TILES = (
    tuning.HopperConfig(128, 128, 3),
    tuning.HopperConfig(64, 128, 2),
    tuning.HopperConfig(32, 64, 4),
    tuning.HopperConfig(64, 64, 3),
    tuning.HopperConfig(64, 128, 3, wide_stores=True),
    tuning.HopperConfig(32, 64, 4, wide_stores=True),
    tuning.HopperConfig(128, 128, 2, tma=True),
    tuning.HopperConfig(64, 128, 3, more_v_stages=-1, tma=True),
    tuning.HopperConfig(32, 64, 4, wide_stores=True, tma=True),
)
HOPPER_TILES_OF_FEW_ROWS = tuple(
    tuning.HopperConfig(n, 64, stages, share_rows=True, num_splits=splits, short_splits=splits)
    for n, stages, splits in ((64, 4, 1), (64, 2, 7), (32, 3, 16), (16, 4, 100))
)


def test_results_do_not_depend_on_the_tiles():
    p = build(Case(8, 1500, heads_q=16, heads_kv=2, head_dim=128, dtype=torch.bfloat16, mask="bool_ring"), "cuda")
    for config in (
        tuning.SplitKConfig(64, 64, 1, 8, 2),
        tuning.SplitKConfig(16, 16, 5, 4, 1),
        tuning.SplitKConfig(64, 32, 100, 4, 3),
        *HOPPER_TILES_OF_FEW_ROWS,
    ):
        check(p, split_k.launch_split_k(p.call(), config=config))
    for config in (
        tuning.TiledConfig(128, 64, 8, 2, 64, 1),
        tuning.TiledConfig(16, 16, 4, 1, 16, 1),
        tuning.TiledConfig(64, 128, 4, 3, 64, 1),
        *HOPPER_TILES,
    ):
        check(p, tiled.launch_tiled(p.call(), config=config))


@pytest.mark.parametrize("q_len", [1, 4, 16, 300])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 160, 192, 256, 320, 512])
def test_every_tile_of_the_table(q_len, head_dim):
    """The table's choice for this GPU and any length, group and batch, on one problem with its own splits."""
    arch, tiles = tuning.current_arch(torch.device("cuda")), {}
    for group, kv_len, batch in itertools.product((1, 2, 4, 8, 16), (128, 1000, 5000, 40000, 200000, None), (1, 2)):
        shape = tuning.AttentionShape(batch, 4 * group, 4, q_len, kv_len, head_dim, head_dim, torch.bfloat16, 1)
        for choose in FEW_ROWS if q_len <= 16 else MANY_ROWS:
            config = choose(shape, arch)
            if isinstance(config, tuning.TiledConfig):
                tiles[config] = config
            elif config is not None:
                tiles[dataclasses.replace(config, num_splits=1, short_splits=1), config.num_splits > 1] = config
    mask = "bool_context" if q_len < 300 else "bool_window"
    p = build(Case(q_len, 1500, heads_q=16, heads_kv=2, head_dim=head_dim, dtype=torch.bfloat16, mask=mask), "cuda")
    launch = split_k.launch_split_k if q_len <= 16 else tiled.launch_tiled
    assert tiles
    for config in tiles.values():
        check(p, launch(p.call(), config=config))


@pytest.mark.parametrize("head_dim", [80, 96, 128, 192, 256, 512])
@pytest.mark.parametrize("q_len", [8, 16, 70])
def test_splits_leave_values_of_any_size(q_len, head_dim):
    """Partial results of the Hopper kernel's splits are exact for powers of 2; an infinity changes no other column."""
    p = build(Case(q_len, 5000, heads_q=8, heads_kv=2, head_dim=head_dim, dtype=torch.bfloat16), "cuda")
    op = sdpa_verify if q_len <= 16 else sdpa_prefill

    def attend(value):
        return op(p.query, p.key, value, None, None, None, False, p.scale, [0, 2, 1, 3])

    size = torch.tensor([2.0**100, 2.0**-60], device="cuda").view(1, 2, 1, 1)
    plain = attend(p.value)
    assert torch.equal(attend((p.value * size).to(p.value.dtype)), plain * size.repeat_interleave(4, 1))
    value = p.value.clone()
    value[:, 0, 3000, 5] = float("inf")
    spoiled = attend(value)
    assert spoiled[:, :4, :, 5].isposinf().all()
    spoiled[:, :4, :, 5] = plain[:, :4, :, 5]
    assert torch.equal(spoiled, plain)


@pytest.mark.parametrize("dim_order", [(0, 2, 1, 3), (0, 1, 2, 3), (0, 1, 3, 2)])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 160, 192, 256])
def test_wide_stores(head_dim, dim_order, poisoned_memory):
    """Stores results in every memory order, including problems where columns beyond the head dim are computed."""
    p = build(Case(300, 700, batch=2, heads_q=4, heads_kv=2, head_dim=head_dim, dtype=torch.bfloat16), "cuda")
    registers = tuning.hopper_registers(head_dim)
    for two_blocks, wide in ((False, True), (True, True), (True, False)):
        width, rest = tuning.hopper_columns(head_dim, two_blocks)
        blocks = {"two_blocks": two_blocks, "rest_dv": rest}
        config = tuning.HopperConfig(64, width, 2, *registers, wide_stores=wide, **blocks)
        check(p, tiled.launch_tiled(p.call(dim_order), config=config))


def steps_in_a_graph(op, rows: int, buffer: int, form: str):
    """Captures one attention whose mask follows ``position``; returns what a replay needs."""
    p = build(Case(rows, buffer, heads_q=8, heads_kv=2, dtype=torch.bfloat16), "cuda")
    keys, position = torch.arange(buffer, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    offsets, least = torch.arange(rows, device="cuda"), torch.full((rows,), torch.iinfo(torch.int64).min, device="cuda")

    def step():
        positions = position + offsets
        if form == "tensor":
            mask = (keys[None] <= positions[:, None])[None, None]
            out = op(p.query, p.key, p.value, mask, None, None, False, p.scale, [0, 2, 1, 3])
        else:
            bounds = torch.stack([least, positions])[:, None]
            out = op(p.query, p.key, p.value, None, None, None, False, p.scale, [0, 2, 1, 3], bounds)
        # The position advances inside the graph, as in a captured decode loop.
        position.add_(rows)
        return out

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    # The tensors that the graph reads must outlive this function.
    return p, keys, (offsets, least), position, graph, out


@pytest.mark.parametrize(("op", "rows"), [(sdpa_decode, 1), (sdpa_verify, 5), (sdpa_verify, 16)])
@pytest.mark.parametrize("form", ["tensor", "positions"])
@pytest.mark.parametrize("start", [0, 17000])
def test_a_captured_graph_advances_for_100_steps(op, rows, form, start):
    """Every replay recomputes the map on the device; the host does not know the position."""
    p, keys, (offsets, _least), position, graph, out = steps_in_a_graph(op, rows, 20000, form)
    position.fill_(start)
    for step in range(100):
        graph.replay()
        positions = start + step * rows + offsets
        mask = (keys[None] <= positions[:, None])[None, None]
        check(type(p)(p.query, p.key, p.value, mask, False, p.scale), out)
    assert position.item() == start + 100 * rows


def interval_cases(count: int) -> list[tuple[Case, str]]:
    rng = random.Random(7)
    cases = random_cases(count, (1, 1, 4, 8, 16, 63, 300), 8)
    return [(dataclasses.replace(case, mask="none"), rng.choice(INTERVAL_MASKS)) for case in cases]


@pytest.mark.parametrize(("case", "kind"), interval_cases(120), ids=str)
def test_intervals(case, kind):
    p, intervals = with_intervals(case, kind, "cuda")
    op = sdpa_decode if case.q_len == 1 else sdpa_verify if case.q_len <= 16 else sdpa_prefill
    args = (p.query, p.key, p.value, None, None, None, False, p.scale, list(case.dim_order))
    check(p, op(*args, intervals.bounds, intervals.values))


@pytest.mark.parametrize("shape", REAL_SHAPES)
@pytest.mark.parametrize("q_len", [1, 8, 512])
@pytest.mark.parametrize("kind", ["causal", "window", "ring", "documents"])
def test_intervals_in_shapes_of_real_models(shape, q_len, kind):
    p, intervals = with_intervals(Case(q_len, 4100, dtype=torch.bfloat16, **REAL_SHAPES[shape]), kind, "cuda")
    op = sdpa_decode if q_len == 1 else sdpa_verify if q_len <= 16 else sdpa_prefill
    args = (p.query, p.key, p.value, None, None, None, False, p.scale, [0, 2, 1, 3])
    check(p, op(*args, intervals.bounds, intervals.values))


@pytest.mark.parametrize("kind", ["causal", "window"])
def test_prefill_with_a_map_made_before_is_bit_identical(kind):
    p, intervals = with_intervals(Case(700, 1500, head_dim=128, dtype=torch.bfloat16), kind, "cuda")
    tile = tuning.tiled_map_block(128, 128)
    maps = {
        "tensor": torch.ops.flashpte.tile_map(p.mask, 700, 1500, *tile, 1),
        "positions": torch.ops.flashpte.interval_map(intervals.bounds, intervals.values, 1500, *tile),
    }
    for form, made in maps.items():
        mask = p.mask if form == "tensor" else None
        bounds = () if form == "tensor" else (intervals.bounds, intervals.values)
        options = (False, p.scale, [0, 2, 1, 3], *bounds)
        with_map = sdpa_prefill(p.query, p.key, p.value, mask, *made, *options)
        assert torch.equal(with_map, sdpa_prefill(p.query, p.key, p.value, mask, None, None, *options))
    assert torch.equal(maps["tensor"][1], maps["positions"][1])


def test_prefill_skipping_empty_tiles_is_bit_identical():
    """Compares with a map without empty or full tiles, where every tile is visited under the mask."""
    p = build(Case(700, 1500, head_dim=128, dtype=torch.bfloat16, mask="bool_dense"), "cuda")
    mask = p.mask.clone()
    mask[..., 512:1024] = False
    block_m, block_n = tuning.tiled_map_block(128, 128)
    rows, keys = -(-700 // block_m), -(-1500 // block_n)
    everything = torch.arange(keys, device="cuda", dtype=torch.int32).expand(1, 1, rows, keys).contiguous()
    counts = torch.tensor([0, keys, -1, 0], device="cuda", dtype=torch.int32).expand(1, 1, rows, 4).contiguous()
    options = (False, p.scale, [0, 2, 1, 3])
    unmapped = sdpa_prefill(p.query, p.key, p.value, mask, everything, counts, *options)
    assert torch.equal(sdpa_prefill(p.query, p.key, p.value, mask, None, None, *options), unmapped)


def test_interval_map_on_gpu_equals_its_reference():
    for kind in INTERVAL_MASKS:
        for tile in ((16, 64, 1), (128, 128, None), (64, 64, None)):
            _, intervals = with_intervals(Case(200, 1500, batch=2), kind)
            expected = torch.ops.flashpte.interval_map(intervals.bounds, intervals.values, 1500, *tile)
            values = None if intervals.values is None else intervals.values.cuda()
            tiles, counts = torch.ops.flashpte.interval_map(intervals.bounds.cuda(), values, 1500, *tile)
            assert torch.equal(counts.cpu(), expected[1])
            listed = torch.arange(tiles.shape[-1]) < expected[1][..., :2].sum(-1, keepdim=True)
            assert torch.equal(tiles.cpu()[listed], expected[0][listed])
