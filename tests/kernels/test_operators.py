"""Operators without a GPU: registration, fakes, layout, arguments, and the CPU implementation's semantics."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from attention_cases import INTERVAL_MASKS, MASKS, Case, build, check, with_intervals, written_out

from flashpte.kernels import sdpa_decode, sdpa_dispatch, sdpa_prefill, sdpa_verify

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
    """Whatever BLAS a processor has: an order that no yardstick took passes, rounding to TF32 does not."""
    case = Case(q_len, 90, batch=2, heads_q=6, heads_kv=2, head_dim=48, mask=mask, dtype=torch.float32)
    problem, _ = arguments(case)
    generator = torch.Generator().manual_seed(8)
    for _ in range(3):
        orders = [torch.randperm(count, generator=generator) for count in (48, 90)]
        check(problem, written_out(problem, *orders))
    tf32 = (problem.query.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
    with pytest.raises(AssertionError, match="above the bound"):
        check(problem, written_out(dataclasses.replace(problem, query=tf32), *orders))


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


def bad(**changes):
    p = build(Case(5, 40))
    given = dict(q=p.query, k=p.key, v=p.value, mask=None, causal=False, order=[0, 2, 1, 3]) | changes
    intervals = given.get("bounds"), given.get("values")
    return sdpa_verify(
        given["q"], given["k"], given["v"], given["mask"], None, None, given["causal"], 1.0, given["order"], *intervals
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(q=torch.randn(4, 5, 64)), "tensors, got 3"),
        (dict(q=torch.randn(1, 4, 5, 64, dtype=torch.float64)), "must share one of"),
        (dict(q=torch.randn(1, 4, 5, 32, dtype=torch.float16)), "head dims differ: 32 and 64"),
        (dict(q=torch.randn(1, 3, 5, 64, dtype=torch.float16)), "multiple of key/value heads; got 3, 2, 2"),
        (dict(mask=torch.ones(5, 40, dtype=torch.bool)), "4 dimensions"),
        (dict(mask=torch.ones(1, 1, 5, 40, dtype=torch.int32)), "bool or float"),
        (dict(mask=torch.ones(1, 1, 5, 40, dtype=torch.bool), causal=True), "ambiguous"),
        (dict(order=[0, 1, 2, 2]), "permutation"),
        (dict(bounds=torch.zeros(2, 1, 5)), "must be int64"),
        (dict(bounds=torch.zeros(4, 1, 5, dtype=torch.int64)), "without key_values there can be one"),
        (dict(values=torch.zeros(1, 1, 40, dtype=torch.int64)), "key_values without key_bounds"),
        (dict(bounds=torch.zeros(2, 1, 5, dtype=torch.int64), causal=True), "ambiguous"),
        (
            dict(bounds=torch.zeros(2, 1, 5, dtype=torch.int64), mask=torch.ones(1, 1, 5, 40, dtype=torch.bool)),
            "ambiguous",
        ),
        (dict(bounds=torch.zeros(2, 1, 4, dtype=torch.int64)), "are for 4 rows"),
        (dict(bounds=torch.zeros(2, 3, 5, dtype=torch.int64)), "batch of 3"),
        (
            dict(bounds=torch.zeros(2, 1, 5, dtype=torch.int64), values=torch.zeros(1, 1, 41, dtype=torch.int64)),
            "41 keys",
        ),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        bad(**changes)
