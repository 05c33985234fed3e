"""Operators without a GPU: registration, fakes, layouts, arguments, and the semantics of the CPU implementation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from attention_cases import INTERVAL_MASKS, MASKS, Case, build, check, with_intervals, written_out
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from flashpte.kernels import sdpa_decode, sdpa_dispatch, sdpa_prefill, sdpa_verify
from flashpte.kernels.contract import why_not_tensors
from flashpte.kernels.intervals import interval_map
from flashpte.kernels.tile_map import tile_map
from flashpte.kernels.tuning import tiled_map_block

OPS = {1: sdpa_decode, 5: sdpa_verify, 40: sdpa_prefill, 39: sdpa_dispatch}
NOT_LAUNCHING = ("test_schema", "test_autograd_registration", "test_faketensor")


def arguments(case: Case):
    p = build(case)
    return p, (p.query, p.key, p.value, p.mask, None, None, p.is_causal, p.scale, list(case.dim_order))


@pytest.mark.parametrize("q_len", OPS)
@pytest.mark.parametrize("mask", MASKS)
def test_cpu_implementation_is_attention(q_len, mask):
    case = Case(q_len, 90, batch=2, heads_q=6, heads_kv=2, head_dim=48, mask=mask, dtype=torch.float32)
    problem, args = arguments(case)
    check(problem, OPS[q_len](*args))


@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("mask", ["none", "bool_context", "float_row_bias"])
def test_the_bound_admits_any_order_of_sums_and_nothing_less_exact(q_len, mask):
    """The bound admits any order of sums, as any BLAS may use, but not rounding to TF32."""
    case = Case(q_len, 90, batch=2, heads_q=6, heads_kv=2, head_dim=48, mask=mask, dtype=torch.float32)
    problem, _ = arguments(case)
    generator = torch.Generator().manual_seed(8)
    for _ in range(3):
        orders = [torch.randperm(count, generator=generator) for count in (48, 90)]
        check(problem, written_out(problem, *orders))
    tf32 = (problem.query.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
    with pytest.raises(AssertionError, match="above the bound"):
        check(problem, written_out(dataclasses.replace(problem, query=tf32), *orders))


SCORES = ((2.0, None), (0.0, torch.bfloat16), (5.0, torch.float32))


@pytest.mark.parametrize("q_len", OPS)
@pytest.mark.parametrize(("softcap", "sinks"), SCORES)
@pytest.mark.parametrize("mask", ["is_causal", "bool_empty_rows", "float_min_rows"])
def test_cpu_implementation_takes_a_softcap_and_sinks(q_len, softcap, sinks, mask):
    shape = dict(batch=2, heads_q=6, heads_kv=2, head_dim=48, dtype=torch.float32, scale=0.5)
    problem, args = arguments(Case(q_len, 90, mask=mask, softcap=softcap, sinks=sinks, **shape))
    check(problem, OPS[q_len](*args, softcap=softcap, sinks=problem.sinks))


@pytest.mark.parametrize("q_len", OPS)
@pytest.mark.parametrize(("softcap", "sinks"), SCORES)
def test_opcheck_with_a_softcap_and_sinks(q_len, softcap, sinks):
    problem, args = arguments(Case(q_len, 90, mask="bool_context", sinks=sinks))
    torch.library.opcheck(OPS[q_len], args, dict(softcap=softcap, sinks=problem.sinks), test_utils=NOT_LAUNCHING)


@pytest.mark.parametrize("op", [*OPS.values()], ids=lambda op: op._name)
def test_a_softcap_and_sinks_are_the_last_arguments_and_have_defaults(op):
    """Programs that were saved before there were any still load: other arguments keep their names, order and types."""
    names = [argument.name for argument in op._opoverload._schema.arguments]
    maps = ["few_tiles", "few_tile_counts"] if op is sdpa_dispatch else []
    assert names[9:] == ["key_bounds", "key_values", *maps, "softcap", "sinks"]
    assert [argument.default_value for argument in op._opoverload._schema.arguments[-2:]] == [0.0, None]


@pytest.mark.parametrize("q_len", OPS)
@pytest.mark.parametrize("mask", ["none", "is_causal", "bool_head", "float_min_rows"])
def test_opcheck(q_len, mask):
    _, args = arguments(Case(q_len, 90, mask=mask, v_head_dim=32))
    torch.library.opcheck(OPS[q_len], args, test_utils=NOT_LAUNCHING)


@pytest.mark.parametrize("q_len", OPS)
@pytest.mark.parametrize("kind", INTERVAL_MASKS)
def test_cpu_implementation_takes_intervals(q_len, kind):
    case = Case(q_len, 90, batch=2, heads_q=6, heads_kv=2, head_dim=48, dtype=torch.float32)
    p, intervals = with_intervals(case, kind)
    args = (p.query, p.key, p.value, None, None, None, False, p.scale, list(case.dim_order))
    check(p, OPS[q_len](*args, intervals.bounds, intervals.values))


@pytest.mark.parametrize("kind", ["causal", "documents", "ring"])
def test_opcheck_with_intervals(kind):
    p, intervals = with_intervals(Case(5, 90), kind)
    args = (p.query, p.key, p.value, None, None, None, False, p.scale, [0, 2, 1, 3], intervals.bounds, intervals.values)
    torch.library.opcheck(sdpa_verify, args, test_utils=NOT_LAUNCHING)
    torch.library.opcheck(
        torch.ops.flashpte.interval_map.default,
        (intervals.bounds, intervals.values, 90, 16, 64),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("row_tiles", [None, 1, 5])
def test_opcheck_of_tile_map(row_tiles):
    p = build(Case(40, 300, mask="float_min_context"))
    torch.library.opcheck(
        torch.ops.flashpte.tile_map.default,
        (p.mask, 40, 300, 16, 64, 1, row_tiles),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("mask", ["bool_context", "bool_head", "bool_single", "bool_padding", "float_min_context"])
def test_a_tile_map_of_some_rows_is_the_top_of_the_whole(mask):
    p = build(Case(40, 300, heads_q=4, batch=2, mask=mask))
    tiles, counts = torch.ops.flashpte.tile_map(p.mask, 40, 300, 16, 64, 2)
    assert tiles.shape[2] == 3
    for row_tiles in (1, 2):
        top_tiles, top_counts = torch.ops.flashpte.tile_map(p.mask, 40, 300, 16, 64, 2, row_tiles)
        assert torch.equal(top_tiles, tiles[:, :, :row_tiles])
        assert torch.equal(top_counts, counts[:, :, :row_tiles])
    more_tiles, more_counts = torch.ops.flashpte.tile_map(p.mask, 40, 300, 16, 64, 2, 5)
    assert torch.equal(more_tiles[:, :, :3], tiles)
    assert (more_counts[:, :, 3:] == torch.tensor([0, 0, -1, -1])).all()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)])
def test_fake_and_cpu_agree_on_the_memory_layout(order):
    _, args = arguments(Case(5, 30, batch=2, dim_order=order))
    real = sdpa_verify(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = sdpa_verify(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args])
    assert fake.stride() == real.stride()
    assert sorted(range(4), key=lambda d: -real.stride(d)) == list(order)


def test_causal_is_aligned_to_the_top_left():
    problem, args = arguments(Case(1, 100, mask="is_causal", dtype=torch.float32))
    out = sdpa_decode(*args)
    assert torch.equal(out[:, ::2], problem.value[:, :, :1])


def test_agrees_with_torch_where_a_row_attends_to_nothing():
    problem, args = arguments(Case(5, 40, heads_kv=4, mask="bool_empty_rows", dtype=torch.float32))
    expected = F.scaled_dot_product_attention(problem.query, problem.key, problem.value, attn_mask=problem.mask)
    out = sdpa_verify(*args)
    assert (out[:, :, ::2] == 0).all()
    torch.testing.assert_close(out, expected)


def shapes_of(**changes):
    """Arguments of an attention with 5 rows and 40 keys, some of them changed, by the operators' names."""
    p = build(Case(5, 40, batch=2))
    given = dict(query=p.query, key=p.key, value=p.value, attn_mask=None, tiles=None, tile_counts=None, is_causal=False)
    given |= dict(scale=1.0, dim_order=[0, 2, 1, 3])
    return given | {name: change(given) if callable(change) else change for name, change in changes.items()}


def on_cpu(op, arguments):
    op(**arguments)


def fake(op, arguments):
    with torch._subclasses.FakeTensorMode() as mode:
        op(**{n: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for n, a in arguments.items()})


def on_cuda(op, arguments):
    """Runs the CUDA implementation up to its first launch, which raises a Triton error for CPU tensors."""
    op._init_fn(**arguments)


def a_mask(*shape, dtype=torch.bool):
    return torch.ones(*shape, dtype=dtype)


def ints(*shape, dtype=torch.int32):
    return torch.zeros(*shape, dtype=dtype)


# Of verify: 1 row of tiles of 64 keys, of which 40 keys have one.
MAPPED = dict(attn_mask=a_mask(1, 1, 5, 40), tiles=ints(1, 1, 1, 1), tile_counts=ints(1, 1, 1, 4))
WRONG = [
    (dict(query=torch.randn(4, 5, 64)), "have 3, 4, 4 dimensions"),
    (dict(query=torch.randn(2, 4, 5, 64, dtype=torch.float64)), "the kernels take one of"),
    (dict(query=torch.randn(2, 4, 5, 32, dtype=torch.float16)), "different head dims, 32 and 64"),
    (dict(query=torch.randn(2, 3, 5, 64, dtype=torch.float16)), "3 query heads on 2 key/value heads"),
    (dict(value=lambda given: given["value"][:, :, :39]), "key has length 40, value 39"),
    (dict(value=lambda given: given["value"][:, :1]), "key has 2 heads, value 1"),
    (dict(key=lambda given: given["key"][:1]), "different batch sizes, 2, 1, 2"),
    (dict(value=lambda given: given["value"][:1]), "different batch sizes, 2, 2, 1"),
    (dict(query=torch.randn(3, 4, 5, 64, dtype=torch.float16)), "different batch sizes, 3, 2, 2"),
    (dict(query=torch.randn(2, 4, 40, 64, dtype=torch.float16)), "at most 16 query rows, got 40"),
    (dict(attn_mask=a_mask(5, 40)), "4 dimensions"),
    (dict(attn_mask=a_mask(1, 1, 5, 40, dtype=torch.int32)), "bool or float"),
    (dict(attn_mask=a_mask(1, 1, 5, 40, dtype=torch.float64)), "float64"),
    (dict(attn_mask=a_mask(1, 1, 5, 39)), "mask size 39 does not match 40"),
    (dict(attn_mask=a_mask(1, 1, 4, 40)), "mask size 4 does not match 5"),
    (dict(attn_mask=a_mask(1, 2, 5, 40)), "mask size 2 does not match 4"),
    (dict(attn_mask=a_mask(3, 1, 5, 40)), "mask size 3 does not match 2"),
    (dict(attn_mask=a_mask(1, 1, 5, 40), is_causal=True), "ambiguous"),
    (dict(dim_order=[0, 1, 2, 2]), "permutation"),
    (dict(softcap=-1.0), "softcap is -1.0; it must be positive"),
    (dict(softcap=float("inf")), "softcap is inf"),
    (dict(softcap=float("nan")), "softcap is nan"),
    (dict(sinks=torch.zeros(3)), r"sinks \[3\] are not one number for each of 4 query heads"),
    (dict(sinks=torch.zeros(1, 4)), r"sinks \[1, 4\] are not one number"),
    (dict(sinks=torch.zeros(4, dtype=torch.float64)), "sinks are torch.float64"),
    (dict(sinks=ints(4)), "sinks are torch.int32"),
    (dict(sinks=torch.zeros(4, device="meta")), "the sinks are on meta, the query on"),
    (dict(key_bounds=torch.zeros(2, 1, 5)), "must be int64"),
    (dict(key_bounds=ints(4, 1, 5, dtype=torch.int64)), "without key_values there can be one"),
    (dict(key_values=ints(1, 1, 40, dtype=torch.int64)), "key_values without key_bounds"),
    (dict(key_bounds=ints(2, 1, 5, dtype=torch.int64), is_causal=True), "ambiguous"),
    (dict(key_bounds=ints(2, 1, 5, dtype=torch.int64), attn_mask=a_mask(1, 1, 5, 40)), "ambiguous"),
    (dict(key_bounds=ints(2, 1, 4, dtype=torch.int64)), "are for 4 rows"),
    (dict(key_bounds=ints(2, 3, 5, dtype=torch.int64)), "batch of 3"),
    (
        dict(key_bounds=ints(2, 1, 5, dtype=torch.int64), key_values=ints(1, 1, 41, dtype=torch.int64)),
        "41 keys",
    ),
    (MAPPED | dict(tile_counts=None), "belong together"),
    (MAPPED | dict(tile_counts=torch.zeros(1, 1, 1, 4)), "tile_counts must be int32"),
    (MAPPED | dict(tiles=ints(1, 1, 1, 1, dtype=torch.int64)), "tiles must be int32"),
    (MAPPED | dict(tile_counts=ints(1, 1, 4)), "of 4 dimensions"),
    (MAPPED | dict(tile_counts=ints(1, 1, 1, 3)), "do not fit tiles"),
    (MAPPED | dict(tile_counts=ints(1, 2, 1, 4)), "do not fit tiles"),
    (MAPPED | dict(tiles=ints(3, 1, 1, 1), tile_counts=ints(3, 1, 1, 4)), "not of 1 or 2, but of 3"),
    (MAPPED | dict(tiles=ints(1, 4, 1, 1), tile_counts=ints(1, 4, 1, 4)), "not of 1 or 2, but of 4"),
    (MAPPED | dict(tiles=ints(1, 1, 1, 2)), "not of 1 tiles of 64 keys"),
    (MAPPED | dict(tiles=ints(1, 1, 0, 1), tile_counts=ints(1, 1, 0, 4)), "fewer than 1 rows of tiles"),
    (MAPPED | dict(tiles=ints(2, 1, 1, 2)[..., :1], tile_counts=ints(2, 1, 1, 4)), "contiguous"),
]


@pytest.mark.parametrize("run", [on_cpu, fake, on_cuda])
@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_arguments_are_named(run, changes, message):
    with pytest.raises(ValueError, match=message):
        run(sdpa_verify, shapes_of(**changes))


@pytest.mark.parametrize("run", [on_cpu, fake, on_cuda])
def test_each_operator_has_its_rows_and_its_map(run):
    rows = dict(query=torch.randn(2, 4, 40, 64, dtype=torch.float16), attn_mask=a_mask(1, 1, 40, 40))
    with pytest.raises(ValueError, match="at most 1 query rows, got 5"):
        run(sdpa_decode, shapes_of())
    block_n = tiled_map_block(64, 64)[1]
    short = rows | dict(key=torch.randn(2, 2, 400, 64).half(), value=torch.randn(2, 2, 400, 64).half())
    short |= dict(attn_mask=a_mask(1, 1, 40, 400), tiles=ints(1, 1, 1, 1), tile_counts=ints(1, 1, 1, 4))
    for op in (sdpa_prefill, sdpa_dispatch):
        with pytest.raises(ValueError, match=f"not of {-(-400 // block_n)} tiles of {block_n} keys"):
            run(op, shapes_of(**short))
    long = rows | dict(query=torch.randn(2, 4, 400, 64).half(), attn_mask=a_mask(1, 1, 400, 40))
    with pytest.raises(ValueError, match=r"fewer than \d rows of tiles"):
        run(sdpa_prefill, shapes_of(**long, tiles=ints(1, 1, 1, 1), tile_counts=ints(1, 1, 1, 4)))
    few = dict(few_tiles=ints(1, 4, 1, 1), few_tile_counts=ints(1, 4, 1, 4))
    with pytest.raises(ValueError, match="not of 1 or 2, but of 4"):
        run(sdpa_dispatch, shapes_of(**rows, **few))


@pytest.mark.parametrize("run", [on_cpu, fake, on_cuda])
def test_maps_of_masks_of_other_lengths(run):
    for op, arguments, message in (
        (tile_map, dict(mask=a_mask(1, 1, 5, 39), q_len=5, kv_len=40, head_group=2), "for 39 keys, not for 40"),
        (tile_map, dict(mask=a_mask(1, 1, 4, 40), q_len=5, kv_len=40, head_group=2), "for 4 rows, not for 5"),
        (
            interval_map,
            dict(key_bounds=ints(2, 1, 5, dtype=torch.int64), key_values=ints(1, 1, 39, dtype=torch.int64), kv_len=40),
            "39 keys",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(op, arguments | dict(block_m=16, block_n=64))


def test_sizes_that_may_be_equal_are_no_reason():
    """In a program of dynamic shapes, only sizes known to differ are refused, and no size gets a guard."""
    shape_env = ShapeEnv()
    sizes = [DimDynamic.STATIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
    mode = torch._subclasses.FakeTensorMode(shape_env=shape_env)
    query, key, value = (
        mode.from_tensor(
            torch.randn(1, 2, rows, 16),
            symbolic_context=StatelessSymbolicContext(sizes),
            source=ConstantSource(name),
        )
        for name, rows in (("q", 5), ("k", 40), ("v", 41))
    )
    with mode:
        assert not isinstance(key.shape[2], int)
        assert why_not_tensors(query, key, value) is None
        assert not shape_env.guards
        reason = why_not_tensors(query, key, key[:, :, 1:])
        assert reason is not None
        assert "key has length" in reason
        assert not shape_env.guards
