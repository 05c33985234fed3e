"""The delta rule's kernels on a GPU: random shapes against float64, the same bits each time, opcheck."""

import dataclasses
import random

import pytest
import torch
from delta_cases import Case, build, check

from flashpte.kernels import delta_recurrent
from flashpte.kernels.delta.call import DeltaCall
from flashpte.kernels.delta.scan import launch_chunked

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

DIMS = [(64, 64), (96, 80), (48, 32), (128, 64), (16, 112)]
RECURRENT_DIMS = [*DIMS, (40, 24), (1, 16), (256, 256)]


def arguments(call):
    return [getattr(call, field.name) for field in dataclasses.fields(call)]


def delta_chunked(*given):
    """Prefill's kernels, which no operator launches yet."""
    return launch_chunked(DeltaCall(*given))


def random_case(seed: int, longest: int) -> Case:
    """A case of any length and number of heads; head dims come from a list, as each pair has its own kernels."""
    pick = random.Random(seed)
    heads_k = pick.randint(1, 4)
    dtype = pick.choice([torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float16, torch.float16, torch.float32])
    others = RECURRENT_DIMS if longest <= 16 else DIMS
    dims = pick.choice([(64, 64), (48, 32)] if dtype == torch.float32 else [(128, 128)] * 3 + others)
    length = pick.choice([pick.randint(1, longest), pick.randint(1, min(70, longest))])
    return Case(
        *(length, pick.randint(1, 3), heads_k, heads_k * pick.randint(1, 4), *dims, dtype),
        *(pick.choice([0.0, 0.02, 0.3, 3.0]), pick.choice(["random", "random", "alike"])),
        *(pick.choice(["split", "contiguous"]), pick.random() < 0.8, pick.random() < 0.8, seed),
    )


@pytest.mark.parametrize("group", range(10))
@pytest.mark.parametrize("kind", ["recurrent", "chunked"])
def test_random_shapes(kind, group):
    op, longest = {"recurrent": (delta_recurrent, 16), "chunked": (delta_chunked, 700)}[kind]
    for seed in range(30 * group, 30 * group + 30):
        call = build(random_case(seed, longest), "cuda")
        check(call, op(*arguments(call)), kind == "chunked")


@pytest.mark.parametrize(("op", "length"), [(delta_recurrent, 4), (delta_chunked, 1000)])
def test_the_same_bits_every_time(op, length):
    given = arguments(build(Case(length, 1, 16, 32, 128, 128, torch.bfloat16), "cuda"))
    first = op(*given)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(op(*given), first, strict=True))


def test_opcheck():
    torch.library.opcheck(delta_recurrent, tuple(arguments(build(Case(4, dtype=torch.bfloat16), "cuda"))))
