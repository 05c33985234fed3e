"""Kernels with a map equal the dense definition for any mask, tiles and lengths (hypothesis)."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from attention_cases import Problem, check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashpte.kernels import split_k, tiled, tuning
from flashpte.kernels.call import AttentionCall
from flashpte.kernels.intervals import Intervals

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]

POWERS = st.sampled_from([16, 32, 64])


def examples(**strategies):
    """Runs a property on 8 examples; a second test, which only ``make test-sweep`` runs, uses 100."""

    def test(check):
        def at(count):
            chosen = settings(
                max_examples=count,
                derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
            )
            return chosen(given(**strategies)(copied(check)))

        sys.modules[__name__].__dict__[f"{check.__name__}_at_length"] = pytest.mark.sweep(at(100))
        return at(8)

    return test


def copied(check):
    """A copy of a check, because hypothesis keeps its state on the function."""
    return types.FunctionType(check.__code__, check.__globals__, check.__name__, check.__defaults__, check.__closure__)


@st.composite
def sizes(draw, most_rows: int):
    """``(batch, heads_kv, group, L_q, L_kv, seed)``."""
    small = st.integers(1, 2)
    return (
        draw(small),
        draw(small),
        draw(st.integers(1, 3)),
        draw(st.integers(1, most_rows)),
        draw(st.integers(1, 210)),
        draw(st.integers(0, 2**16)),
    )


def tensors(shape, generator):
    """Random float16 query, key and value of head dim 16."""
    batch, heads_kv, group, q_len, kv_len, _ = shape
    lengths = ((heads_kv * group, q_len), (heads_kv, kv_len), (heads_kv, kv_len))
    return [torch.randn(batch, heads, length, 16, generator=generator).half() for heads, length in lengths]


def runs_mask(shape, per_batch: bool, per_head: bool, kind: str, generator) -> torch.Tensor:
    """A mask with random runs of visible and hidden keys, so that tiles of every kind occur."""
    batch, heads_kv, group, q_len, kv_len, _ = shape
    size = (batch if per_batch else 1, heads_kv * group if per_head else 1, q_len, 1)
    keys = torch.arange(kv_len)
    mask = torch.zeros(*size[:3], kv_len, dtype=torch.bool)
    for _ in range(2):
        start = torch.randint(-20, kv_len + 20, size, generator=generator)
        length = torch.randint(0, kv_len + 40, size, generator=generator)
        # Most rows share a run, as in real masks; some have their own.
        shared = torch.rand(size, generator=generator) < 0.8
        start, length = (torch.where(shared, t[:, :, :1], t) for t in (start, length))
        mask |= (keys >= start) & (keys < start + length)
    if kind == "bool":
        return mask
    hidden = {"inf": float("-inf"), "min": torch.finfo(torch.float32).min}[kind]
    bias = torch.where(torch.rand(size, generator=generator) < 0.3, 0.5, 0.0)
    return torch.where(mask, bias, hidden)


def launch(launcher, query, key, value, mask, config, intervals=None):
    """A launcher's result, in ``[B, H, L_q, D]`` memory order."""
    call = AttentionCall(query, key, value, 0.25, False, (0, 1, 2, 3), mask, intervals)
    return launcher(call, config=config)


@examples(
    shape=sizes(16),
    form=st.tuples(st.booleans(), st.booleans(), st.sampled_from(["bool", "inf", "min"])),
    config=st.builds(
        tuning.SplitKConfig, st.sampled_from([16, 32]), POWERS, st.integers(1, 9), st.just(4), st.just(2), st.booleans()
    ),
)
def test_split_k_with_random_masks(shape, form, config):
    generator = torch.Generator().manual_seed(shape[-1])
    query, key, value = tensors(shape, generator)
    mask = runs_mask(shape, *form, generator)
    check(
        Problem(query, key, value, mask, False, 0.25), launch(split_k.launch_split_k, query, key, value, mask, config)
    )


@examples(
    shape=sizes(150),
    form=st.tuples(st.booleans(), st.booleans(), st.sampled_from(["bool", "inf", "min"])),
    block_m=st.sampled_from([16, 64, 128]),
    block_n=st.sampled_from([16, 64, 128]),
)
def test_tiled_with_random_masks(shape, form, block_m, block_n):
    generator = torch.Generator().manual_seed(shape[-1])
    query, key, value = tensors(shape, generator)
    mask = runs_mask(shape, *form, generator)
    config = tuning.TiledConfig(block_m, block_n, 4, 2, 16, 1)
    check(Problem(query, key, value, mask, False, 0.25), launch(tiled.launch_tiled, query, key, value, mask, config))


@examples(shape=sizes(60), terms=st.integers(1, 3), index_term=st.booleans(), spread=st.integers(1, 300))
def test_random_intervals(shape, terms, index_term, spread):
    batch, _, _, q_len, kv_len, seed = shape
    generator = torch.Generator().manual_seed(seed)
    query, key, value = tensors(shape, generator)
    middle = torch.randint(-50, kv_len + 50, (terms, batch, q_len), generator=generator)
    around = torch.randint(-5, spread, (2, terms, batch, q_len), generator=generator)
    bounds = torch.stack([middle - around[0], middle + around[1]], 1).flatten(0, 1)
    others = terms - index_term
    values = torch.randint(kv_len, (others, 1, kv_len), generator=generator).sort(-1).values if others else None
    intervals = Intervals(bounds, values)
    problem = Problem(query, key, value, intervals.dense(kv_len), False, 0.25)
    if q_len <= 16:
        config = tuning.SplitKConfig(16, 32, 5, 4, 2, True, 3)
        check(problem, launch(split_k.launch_split_k, query, key, value, None, config, intervals))
    config = tuning.TiledConfig(32, 64, 4, 2, 32, 1)
    check(problem, launch(tiled.launch_tiled, query, key, value, None, config, intervals))
