"""Softcapped scores and sinks on a GPU, compared with float64 on random problems with poisoned memory."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from attention_cases import INTERVAL_MASKS, LAYOUTS, MASKS, Case, build, check, with_intervals

from flashpte.kernels import sdpa_decode, sdpa_dispatch, sdpa_prefill, sdpa_verify, split_k, tiled, tuning

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
REAL_SHAPES = {
    "gemma 2 9B": dict(heads_q=16, heads_kv=8, head_dim=256, softcap=50.0, scale=256**-0.5),
    "gemma 2 27B": dict(heads_q=32, heads_kv=16, head_dim=128, softcap=50.0, scale=144**-0.5),
    "gpt-oss": dict(heads_q=64, heads_kv=8, head_dim=64, sinks=BF16),
    "granite swa": dict(heads_q=32, heads_kv=8, head_dim=128, sinks=BF16, scale=1 / 128),
}


def operator(q_len: int):
    return sdpa_decode if q_len == 1 else sdpa_verify if q_len <= 16 else sdpa_prefill


def attend(op, p, dim_order=(0, 2, 1, 3), bounds=()):
    mask = None if bounds else p.mask
    causal = p.is_causal and not bounds
    args = (p.query, p.key, p.value, mask, None, None, causal, p.scale, list(dim_order), *bounds)
    return op(*args, softcap=p.softcap, sinks=p.sinks)


def random_cases(count: int, rows: tuple[int, ...], seed: int) -> list[Case]:
    rng = random.Random(seed)
    cases = []
    for i in range(count):
        heads_kv = rng.choice((1, 2, 4))
        softcap, sinks = rng.choice(((2.0, None), (0.0, BF16), (5.0, FP32), (50.0, FP16), (0.0, FP32)))
        cases.append(
            Case(
                q_len=rng.choice(rows),
                kv_len=rng.choice((1, 7, 63, 64, 130, 511, 1025, 3000)),
                batch=rng.choice((1, 1, 3)),
                heads_q=heads_kv * rng.choice((1, 2, 3, 8)),
                heads_kv=heads_kv,
                head_dim=rng.choice((16, 64, 80, 112, 128, 192, 256, 512)),
                v_head_dim=rng.choice((None, None, None, 64)),
                dtype=rng.choice((BF16, BF16, FP16, FP32)),
                mask=rng.choice(MASKS),
                layout=rng.choice(LAYOUTS),
                seed=i,
                softcap=softcap,
                sinks=sinks,
            )
        )
    return cases


@pytest.mark.parametrize("case", random_cases(60, (1,), 31), ids=str)
def test_decode(case):
    p = build(case, "cuda")
    check(p, attend(sdpa_decode, p, case.dim_order))


@pytest.mark.parametrize("case", random_cases(80, (2, 3, 5, 8, 16), 32), ids=str)
def test_verify(case):
    p = build(case, "cuda")
    check(p, attend(sdpa_verify, p, case.dim_order))


@pytest.mark.parametrize("case", random_cases(80, (17, 63, 100, 300), 33), ids=str)
def test_prefill(case):
    p = build(case, "cuda")
    check(p, attend(sdpa_prefill, p, case.dim_order))


@pytest.mark.parametrize("shape", REAL_SHAPES)
@pytest.mark.parametrize("q_len", [1, 8, 16, 512])
@pytest.mark.parametrize("kind", ["causal", "window", "ring"])
def test_shapes_of_real_models(shape, q_len, kind):
    p, intervals = with_intervals(Case(q_len, 4100, dtype=BF16, **REAL_SHAPES[shape]), kind, "cuda")
    check(p, attend(operator(q_len), p, bounds=(intervals.bounds, intervals.values)))


@pytest.mark.parametrize("kind", INTERVAL_MASKS)
@pytest.mark.parametrize("q_len", [1, 5, 200])
def test_intervals(kind, q_len):
    case = Case(q_len, 700, batch=2, heads_q=6, heads_kv=2, dtype=BF16, softcap=2.0, sinks=FP32)
    p, intervals = with_intervals(case, kind, "cuda")
    check(p, attend(operator(q_len), p, bounds=(intervals.bounds, intervals.values)))


@pytest.mark.parametrize("q_len", [1, 16, 17, 200])
@pytest.mark.parametrize("mask", ["bool_context", "bool_head"])
def test_dispatch(q_len, mask):
    p = build(Case(q_len, 700, batch=2, dtype=BF16, mask=mask, softcap=3.0, sinks=BF16), "cuda")
    check(p, attend(sdpa_dispatch, p))


@pytest.mark.parametrize("splits", [1, 2, 7, 40])
@pytest.mark.parametrize("mask", ["none", "bool_ring", "bool_empty_rows", "float_all_min"])
def test_a_sink_joins_once_whatever_the_splits(splits, mask):
    config = tuning.SplitKConfig(16, 32, splits, 4, 2, True, splits)
    p = build(Case(5, 1500, heads_q=6, heads_kv=2, dtype=BF16, mask=mask, softcap=3.0, sinks=BF16), "cuda")
    check(p, split_k.launch_split_k(p.call(), config=config))


@pytest.mark.parametrize("size", [-300.0, -30.0, 30.0, 300.0, float("-inf")])
@pytest.mark.parametrize("q_len", [3, 40])
def test_sinks_far_from_all_scores(size, q_len):
    for mask in ("none", "bool_empty_rows", "float_min_rows"):
        p = build(Case(q_len, 500, dtype=BF16, mask=mask), "cuda")
        p = dataclasses.replace(p, sinks=torch.full((4,), size, device="cuda"))
        check(p, attend(operator(q_len), p))


@pytest.mark.parametrize("q_len", [1, 5, 40])
def test_float32_is_as_exact_as_the_plain_formula(q_len):
    """The softcap's own error: scores of every size against caps of every size."""
    for scale in (0.05, 0.5, 3.0):
        for softcap in (0.5, 2.0, 10.0, 50.0, 1000.0):
            case = Case(q_len, 300, dtype=FP32, head_dim=32, mask="bool_window", scale=scale, softcap=softcap)
            p = build(case, "cuda")
            check(p, attend(operator(q_len), p))


@pytest.mark.parametrize("q_len", [1, 5, 40])
def test_opcheck(q_len):
    p = build(Case(q_len, 90, mask="bool_context", dtype=BF16, softcap=5.0, sinks=BF16), "cuda")
    args = (p.query, p.key, p.value, p.mask, None, None, False, p.scale, [0, 2, 1, 3])
    torch.library.opcheck(operator(q_len), args, dict(softcap=5.0, sinks=p.sinks))


def test_hopper_leaves_them_to_the_other_kernels():
    p = build(Case(300, 1000, dtype=BF16, head_dim=128), "cuda")
    plain = tiled.launch_tiled(p.call())
    sinks = torch.full((4,), float("-inf"), device="cuda")
    other = tiled.launch_tiled(p.call(sinks=sinks))
    check(p, plain)
    check(p, other)
