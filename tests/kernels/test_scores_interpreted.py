"""Softcapped scores and sinks in the kernels' own code, in Triton's interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from attention_cases import INTERVAL_MASKS, Case, build, check, exact, with_intervals
from mutants import mutant, own

from flashpte.kernels import split_k, tiled, tuning
from flashpte.kernels.dispatch import launch_dispatch
from flashpte.kernels.primitives import softcapped

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]

HALF, SINGLE = torch.float16, torch.float32
# Scores have a standard deviation of 1 and more, so a cap of 2 bends most of them and one of 50 hardly any.
SCORES = ((2.0, None), (0.0, HALF), (2.0, SINGLE), (50.0, HALF))
CAPPED_MASKS = ("none", "is_causal", "bool_window", "bool_head", "bool_empty_rows", "bool_all_empty")
FLOAT_MASKS = ("float_bias", "float_inf_context", "float_min_rows", "float_all_min")
ONE, FEW, TEN = (tuning.SplitKConfig(16, 32, splits, 4, 2, True, 2) for splits in (1, 3, 10))
SMALL = tuning.TiledConfig(16, 32, 4, 2, 16, 1)


def of_scores(case: Case) -> list[Case]:
    return [dataclasses.replace(case, softcap=softcap, sinks=sinks) for softcap, sinks in SCORES]


def run(launcher, case: Case, config=None):
    p = build(case)
    return p, launcher(own(launcher, p.call(case.dim_order)), config=config)


SPLIT_K_CASES = [
    scored
    for case in (
        *(Case(5, 130, heads_q=6, heads_kv=2, head_dim=16, mask=m) for m in (*CAPPED_MASKS, *FLOAT_MASKS)),
        *(Case(1, n, heads_q=8, heads_kv=1, head_dim=16, scale=0.5) for n in (1, 7, 63, 1025)),
        Case(3, 100, dtype=SINGLE, head_dim=16, mask="bool_ring", scale=1.0),
        Case(3, 100, dtype=SINGLE, head_dim=16, mask="float_min_rows", scale=1.0),
        Case(2, 77, batch=3, heads_kv=1, head_dim=80, v_head_dim=48, mask="bool_context", layout="sliced"),
        Case(16, 70, heads_q=8, heads_kv=1, head_dim=32, mask="is_causal", scale=-0.7),
    )
    for scored in of_scores(case)
]
TILED_CASES = [
    scored
    for case in (
        *(Case(20, 70, heads_q=2, heads_kv=1, head_dim=16, mask=m) for m in (*CAPPED_MASKS, *FLOAT_MASKS)),
        *(Case(17, n, heads_q=1, heads_kv=1, head_dim=16, scale=0.5) for n in (1, 7, 63, 300)),
        Case(20, 60, dtype=SINGLE, head_dim=16, mask="bool_ring", scale=1.0),
        Case(20, 60, dtype=SINGLE, head_dim=16, mask="float_min_rows", scale=1.0),
        Case(20, 77, batch=2, heads_q=3, heads_kv=1, head_dim=80, v_head_dim=48, mask="bool_context", layout="blhd"),
    )
    for scored in of_scores(case)
]


@pytest.mark.parametrize("case", SPLIT_K_CASES, ids=str)
def test_split_k(case):
    check(*run(split_k.launch_split_k, case, FEW))


@pytest.mark.parametrize("config", [ONE, FEW, TEN, None], ids=["one", "few", "ten", "own"])
@pytest.mark.parametrize("q_len", [1, 7])
@pytest.mark.parametrize("mask", ["none", "bool_ring", "bool_empty_rows", "float_all_min"])
def test_a_sink_joins_once_whatever_the_splits(config, q_len, mask):
    case = Case(q_len, 200, heads_q=6, heads_kv=2, head_dim=16, mask=mask, softcap=3.0, sinks=HALF)
    check(*run(split_k.launch_split_k, case, config))


@pytest.mark.parametrize("case", TILED_CASES, ids=str)
def test_tiled(case):
    check(*run(tiled.launch_tiled, case, SMALL if case.dtype == HALF else None))


@pytest.mark.parametrize("kind", INTERVAL_MASKS)
@pytest.mark.parametrize("q_len", [1, 5, 20])
def test_intervals(kind, q_len):
    launcher, config = (split_k.launch_split_k, FEW) if q_len <= 16 else (tiled.launch_tiled, SMALL)
    case = Case(q_len, 90, batch=2, heads_q=2, heads_kv=1, head_dim=16, softcap=2.0, sinks=SINGLE)
    problem, intervals = with_intervals(case, kind)
    check(problem, launcher(problem.call(case.dim_order, intervals), config=config))


@pytest.mark.parametrize("q_len", [1, 16, 17])
def test_dispatch(q_len):
    for case in of_scores(Case(q_len, 90, head_dim=16, mask="bool_context")):
        p = build(case)
        check(p, launch_dispatch(p.call()))


def test_sinks_with_a_stride():
    for launcher, rows in ((split_k.launch_split_k, 3), (tiled.launch_tiled, 20)):
        p = build(Case(rows, 50, head_dim=16, sinks=SINGLE))
        wide = torch.full((4, 3), float("nan"))
        wide[:, 1] = p.sinks
        check(p, launcher(p.call(sinks=wide[:, 1])))


@pytest.mark.parametrize("size", [-300.0, -30.0, 30.0, 300.0, float("-inf")])
def test_sinks_far_from_all_scores(size):
    """A sink far above all scores takes all weight, and one far below or of -inf none. Nothing overflows to NaN."""
    for launcher, rows in ((split_k.launch_split_k, 3), (tiled.launch_tiled, 20)):
        for mask in ("none", "bool_empty_rows", "float_min_rows"):
            p = build(Case(rows, 90, head_dim=16, mask=mask))
            p = dataclasses.replace(p, sinks=torch.full((4,), size))
            config = FEW if rows == 3 else SMALL
            check(p, launcher(p.call(), config=config))


def test_rows_that_see_nothing_are_0_and_minima_weigh_nothing_beside_a_sink():
    for launcher, rows in ((split_k.launch_split_k, 4), (tiled.launch_tiled, 20)):
        for mask in ("bool_empty_rows", "float_min_rows", "bool_all_empty", "float_all_min"):
            _, out = run(launcher, Case(rows, 90, head_dim=16, mask=mask, sinks=HALF))
            assert (out[:, :, ::2] == 0).all()


@triton.jit
def _softcapped_kernel(x_ptr, out_ptr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, softcapped(tl.load(x_ptr + at), SOFTCAP, EXACT))


@pytest.mark.parametrize("cap", [0.5, 30.0, 50.0])
def test_the_softcap_is_exact_to_two_units_of_float32(cap):
    """For scores of any size: tiny ones, those on both sides of where the formula changes, huge ones."""
    sizes = torch.cat((torch.logspace(-30, 4, 1000), torch.linspace(0.9, 1.1, 536), torch.linspace(0, 12, 512)))
    scores = torch.cat((sizes, -sizes)) * cap
    out = torch.full_like(scores, float("nan"))
    _softcapped_kernel[(4,)](scores, out, cap, True, 1024)
    answer = torch.tanh(scores.double() / cap) * cap
    error = ((out.double() - answer) / answer.where(answer != 0, torch.ones(()).double())).abs().max()
    assert error < 2 * 2.0**-22
    assert out.abs().max() <= cap


MUTATIONS = {
    "no softcap": ("primitives.py", "if SOFTCAP > 0.0:", "if SOFTCAP > 1e9:", "split_k"),
    "the cap in natural units": ("call.py", "self.softcap * (LOG2E / self.exp2_scale)", "self.softcap", "tiled"),
    "a softcap of masked scores": (
        "primitives.py",
        "    probs, rescale, row_max, row_sum = online_softmax(",
        "    if SOFTCAP > 0.0:\n        scores = softcapped(scores, SOFTCAP, EXACT)\n"
        "    probs, rescale, row_max, row_sum = online_softmax(",
        "tiled",
    ),
    "a linear softcap": ("primitives.py", "square * (105.0 + square)", "square * (420.0 + square * 15.0)", "split_k"),
    "a sink in natural units": ("primitives.py", "sink = sink * 1.4426950408889634", "sink = sink * 1.0", "split_k"),
    "a sink in log2 units": ("primitives.py", "tl.exp2((sink - base) * EXP2_SCALE)", "tl.exp2(sink - base)", "split_k"),
    "a sink without the maximum": ("primitives.py", "exp2((sink - base)", "exp2((sink - 0 * base)", "tiled"),
    "no sink if there are splits": ("split_k.py", "call.kv_len, call.sinks)", "call.kv_len)", "split_k"),
    "a sink in every split": (
        "split_k.py",
        "        partial = (bh.to",
        "        row_sum += 1.0\n        partial = (bh.to",
        "split_k",
    ),
    "the sink of another head": ("combine.py", "sinks_ptr, head, EXP2", "sinks_ptr, head * 0, EXP2", "split_k"),
    "the sink of another head of one split": (
        "split_k.py",
        "sinks_ptr, head, EXP2",
        "sinks_ptr, h * GROUP + 0 * head, EXP2",
        "split_k",
    ),
    "no sink in prefill": ("tiled.py", "row_sum = with_sink(", "with_sink(", "tiled"),
}


def is_wrong(launcher, kind: str) -> bool:
    """Whether any result for scores of every kind is wrong; stops at the first."""
    rows, configs = (20, [SMALL]) if kind == "tiled" else (3, [ONE, FEW])
    try:
        for config in configs:
            for mask, dtype in (("bool_context", HALF), ("float_bias", HALF), ("none", SINGLE)):
                for case in of_scores(Case(rows, 90, head_dim=32, scale=1.0, mask=mask, dtype=dtype)):
                    check(*run(launcher, case, config))
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("kind", ["split_k", "tiled"])
def test_what_is_mutated_is_right(kind):
    assert not is_wrong(tiled.launch_tiled if kind == "tiled" else split_k.launch_split_k, kind)


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_caught(name, tmp_path):
    file, old, new, kind = MUTATIONS[name]
    assert is_wrong(getattr(mutant(tmp_path, file, old, new, kind), f"launch_{kind}"), kind)


def test_the_float64_answer_is_the_written_formula():
    """The answer that all of this is compared with, written once more in plain operators."""
    p = build(Case(5, 40, mask="bool_window", softcap=1.5, sinks=HALF, dtype=SINGLE))
    scores = p.query.double() @ p.key.double().repeat_interleave(2, 1).transpose(2, 3) * p.scale
    scores = (torch.tanh(scores / 1.5) * 1.5).masked_fill(~p.mask, float("-inf"))
    joined = torch.cat((scores, p.sinks.double().reshape(1, -1, 1, 1).expand(1, -1, 5, -1)), -1)
    expected = torch.softmax(joined, -1)[..., :-1] @ p.value.double().repeat_interleave(2, 1)
    torch.testing.assert_close(exact(p), expected)
