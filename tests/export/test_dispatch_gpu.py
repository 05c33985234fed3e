"""One method of dynamic length on a GPU: few rows run the split-K kernel, more rows the tiled one, over shared caches.

The dtype is float32, so that the comparison with the eager model is tight.
"""

from __future__ import annotations

import copy

import pytest
import torch
from dynamic_attention import KEYS, LONGEST, WIDTH, DynamicAttention, dynamic_program

from flashpte.export.lowering import lower
from flashpte.export.runtime import Program
from flashpte.passes import replace_sdpa

pytestmark = pytest.mark.gpu

# Rows of consecutive calls from the start of the cache; they fill 741 of its 768 positions.
CALLS = (5, 17, 1, 16, 500, 1, 17, 1, 16, 5, 1, 160, 1)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    program, report = replace_sdpa(dynamic_program(dtype=torch.float32))
    assert all(len(n.branches) == 2 for n in report.nodes)
    folder = tmp_path_factory.mktemp("dispatch")
    lower({"forward": program}, output_dir=folder / "out", arch=None)
    return Program.open(folder / "out")


@pytest.fixture(scope="module")
def eager():
    return DynamicAttention(dtype=torch.float32).eval()


def call(runner, model, rows, start, seed):
    """The rows' results from the library and from eager PyTorch on the CPU."""
    x = torch.randn(1, rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    position = torch.arange(start, start + rows)
    (out,) = runner.run("forward", x.cuda(), position.cuda())
    with torch.no_grad():
        return out.cpu(), model(x, position)


def check(out, expected):
    assert out.shape == expected.shape
    assert not out.isnan().any()
    # Matrix multiplies in a build for ExecuTorch may round to TF32, which has 10 mantissa bits.
    torch.testing.assert_close(out, expected, atol=5e-3 * expected.abs().max().item(), rtol=0)


def test_calls_that_follow_each_other(runner, eager):
    assert sum(CALLS) <= KEYS
    model, start = copy.deepcopy(eager), 0
    for seed, rows in enumerate(CALLS):
        check(*call(runner, model, rows, start, seed))
        start += rows


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 500])
@pytest.mark.parametrize("start", [0, 63, 200])
def test_each_length_at_each_position(runner, eager, rows, start):
    """The cache is prefilled up to the position; the mask excludes rows that other calls left after it."""
    assert rows <= LONGEST
    model = copy.deepcopy(eager)
    if start:
        check(*call(runner, model, start, 0, 7))
    check(*call(runner, model, rows, start, 8))
