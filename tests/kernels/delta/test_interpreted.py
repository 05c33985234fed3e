"""The delta rule's kernels in Triton's interpreter: tests call launchers, never operators (the reference on a CPU)."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from delta_cases import Case, build, check
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutants import mutant

from flashpte.kernels.delta import recurrent, scan
from flashpte.kernels.delta.tuning import ChunkedConfig, RecurrentConfig

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]

RECURRENT = [
    Case(1),
    Case(1, state=False, heads_k=2, heads=2, dtype=torch.float32),
    Case(4, batch=2, heads_k=2, heads=6, k_dim=24, v_dim=40),
    Case(16, k_dim=16, v_dim=20, l2norm=False, layout="contiguous"),
    Case(7, dtype=torch.float32, keys="same", decay=0.0),
    Case(3, decay=30.0, dtype=torch.float32),
]
CHUNKED = [
    Case(1),
    Case(63, state=False, dtype=torch.float32),
    Case(64, heads_k=2, heads=2, k_dim=16, v_dim=16),
    Case(65, batch=2, heads_k=1, heads=3, k_dim=48, v_dim=80),
    Case(200, keys="alike", decay=0.01),
    Case(130, keys="alike", decay=0.0, dtype=torch.float32),
    Case(100, keys="same", decay=0.0, dtype=torch.float32),
    Case(150, decay=30.0, l2norm=False, layout="contiguous"),
    Case(129, dtype=torch.float32, k_dim=80, v_dim=48),
]


@pytest.mark.parametrize("case", RECURRENT, ids=str)
def test_recurrent_matches_the_float64_answer(case):
    call = build(case)
    check(call, recurrent.launch_recurrent(call), chunked=False)


@pytest.mark.parametrize("case", CHUNKED, ids=str)
def test_chunked_matches_the_float64_answer(case):
    call = build(case)
    check(call, scan.launch_chunked(call), chunked=True)


@pytest.mark.parametrize("block_v", [16, 32])
def test_tiles_change_nothing(block_v):
    call = build(Case(70, v_dim=48))
    check(call, scan.launch_chunked(call, ChunkedConfig(4, block_v, 4, 1)), chunked=True)
    call = build(Case(5, v_dim=40))
    check(call, recurrent.launch_recurrent(call, RecurrentConfig(block_v, 1)), chunked=False)


@pytest.mark.parametrize("parts", [(100, 30), (64, 64, 2), (1, 129)], ids=str)
def test_a_prompt_in_parts_is_the_prompt(parts):
    call = build(Case(sum(parts), dtype=torch.float32))
    rows, state, begin = [], call.state, 0
    for length in parts:
        part = slice(begin, begin + length)
        tensors = {name: getattr(call, name)[:, part] for name in ("query", "key", "value", "g", "beta")}
        launch = scan.launch_chunked if length > 2 else recurrent.launch_recurrent
        out, state = launch(dataclasses.replace(call, **tensors, state=state))
        rows, begin = [*rows, out], begin + length
    check(call, (torch.cat(rows, 1), state), chunked=True)


@pytest.mark.parametrize("launch", [recurrent.launch_recurrent, scan.launch_chunked])
def test_the_given_state_stays(launch):
    call = build(Case(5))
    before = call.state.clone()
    launch(call)
    assert torch.equal(call.state, before)


@pytest.mark.parametrize("launch", [recurrent.launch_recurrent, scan.launch_chunked])
@pytest.mark.parametrize("sizes", [dict(length=0), dict(length=3, batch=0)], ids=str)
def test_nothing_to_do(launch, sizes):
    call = build(Case(**sizes, layout="contiguous"))
    out, state = launch(call)
    assert out.shape == call.value.shape
    assert torch.equal(state, call.state)


# Without shrinking: an example takes a second.
@settings(max_examples=10, derandomize=True, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
@given(
    length=st.integers(1, 140),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    decay=st.sampled_from([0.0, 0.05, 1.0, 20.0]),
    keys=st.sampled_from(["random", "alike"]),
    flags=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
def test_random_shapes(length, sizes, decay, keys, flags, dtype):
    batch, heads_k, group, k_tiles, v_tiles = sizes
    fields = (batch, heads_k, heads_k * group, 16 * k_tiles, 16 * v_tiles, dtype, decay, keys)
    call = build(Case(length, *fields, state=flags[0], l2norm=flags[1], seed=length))
    check(call, scan.launch_chunked(call), chunked=True)
    if length <= 16:
        call = build(dataclasses.replace(Case(length, *fields), k_dim=7 * k_tiles, v_dim=9 * v_tiles))
        check(call, recurrent.launch_recurrent(call), chunked=False)


MUTATIONS = {
    "no decay": ("recurrent.py", "state * tl.exp(g)", "state", "recurrent"),
    "no correction": ("recurrent.py", "(v - tl.sum(state * k[:, None], 0))", "v", "recurrent"),
    "the query does not see its token": ("recurrent.py", "+ tl.sum(k * q, 0) * delta", "", "recurrent"),
    "keys of another head": ("recurrent.py", "head // GROUP * stride_kh", "head % GROUP * stride_kh", "recurrent"),
    "the first token again": ("recurrent.py", "t + 1, t + 1 < L", "0, t + 1 < L", "recurrent"),
    "no norm": ("device.py", "if L2NORM else", "if not L2NORM else", "recurrent"),
    "tokens past the end": ("prepare.py", "there = t < rest", "there = t >= 0", "chunked"),
    "pairs do not decay": ("prepare.py", "tl.exp(decay[:, None] - decay[None, :])", "1.0", "chunked"),
    "solved without beta": ("prepare.py", "(lower) * beta[None, :]", "(lower)", "chunked"),
    "queries see later keys": ("prepare.py", "t[:, None] >= t[None, :], tl.exp", "t[:, None] >= 0, tl.exp", "chunked"),
    "the last decay of another token": ("prepare.py", "t == 63", "t == 62", "chunked"),
    "substitution ends early": ("device.py", "range(1, 16)", "range(1, 15)", "chunked"),
    "blocks of 16 stay apart": ("device.py", ", _below(first, bottom_16, second)", ", 0 * bottom_16", "chunked"),
    "blocks of 32 stay apart": ("device.py", ", _below(first, bottom, second)", ", 0 * bottom", "chunked"),
    "the state does not decay": ("scan.py", "state * decay", "state", "chunked"),
    "queries do not see the state": ("scan.py", "tl.dot(q, before, input_precision=DOT) *", "0.0 *", "chunked"),
    "one chunk less": ("scan.py", "tl.range(0, chunks", "tl.range(0, chunks - 1", "chunked"),
    "no first state": ("scan.py", "state = tl.load(state_ptr + at, mask=ok, other=0.0)", "pass", "chunked"),
}  # fmt: skip


def is_wrong(launch, kind: str) -> bool:
    """Whether any result of a (mutant's) launcher is wrong; stops at the first."""
    call_class = sys.modules[f"{launch.__module__.rpartition('.')[0]}.call"].DeltaCall
    length = 5 if kind == "recurrent" else 100
    try:
        for case in (
            Case(length, batch=1, heads_k=2, heads=4, k_dim=48, v_dim=80),
            Case(length, keys="alike", decay=0.02, dtype=torch.float32),
        ):
            call = build(case)
            own = call_class(**{field.name: getattr(call, field.name) for field in dataclasses.fields(call)})
            check(call, launch(own), chunked=kind == "chunked")
    except AssertionError:
        return True
    return False


def test_what_is_mutated_is_right():
    assert not is_wrong(recurrent.launch_recurrent, "recurrent")
    assert not is_wrong(scan.launch_chunked, "chunked")


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_caught(name, tmp_path):
    file, old, new, kind = MUTATIONS[name]
    changed = mutant(tmp_path, f"delta/{file}", old, new, "delta.recurrent" if kind == "recurrent" else "delta.scan")
    assert is_wrong(changed.launch_recurrent if kind == "recurrent" else changed.launch_chunked, kind)
