"""The dense few-rows kernels in Triton's interpreter."""

import pytest
import torch

from flashpte.kernels.dense.few_rows import launch_few_rows
from flashpte.kernels.dense.tuning import DenseConfig

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]


def bound(x, weight, bias):
    """What rounding allows: sums of K products in float32, in any order, and the result's own dtype."""
    k = x.shape[-1]
    size = x.double().abs() @ weight.double().abs().t() + (0 if bias is None else bias.double().abs())
    return size * (k + 2) * 2**-24


def check(rows, n, k, config, with_bias=False, stride=None):
    generator = torch.Generator().manual_seed(rows * n + k)
    x = torch.randn(rows, stride or k, generator=generator).half()[:, :k]
    weight = torch.randn(n, k, generator=generator).half()
    bias = torch.randn(n, generator=generator).half() if with_bias else None
    found = launch_few_rows(x, weight, bias, "", config).double()
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    ulp = exact.abs() * 2**-11 + 2**-25
    assert found.shape == (rows, n)
    assert bool(((found - exact).abs() <= bound(x, weight, bias) + ulp).all())


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_rows(rows, with_bias):
    check(rows, 40, 200, None, with_bias)


@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 33), (16, 64), (33, 256), (130, 1030)])
def test_sizes_that_do_not_fill_tiles(rows, n, k):
    config = DenseConfig(4, 128, num_warps=4) if rows <= 4 else DenseConfig(16, 16, num_warps=4, tiles=4)
    check(rows, n, k, config)


@pytest.mark.parametrize("rows", [2, 7])
def test_rows_of_x_that_are_not_adjacent(rows):
    check(rows, 24, 96, None, stride=128)


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_and_up(rows, with_bias, activation):
    generator = torch.Generator().manual_seed(rows)
    n, k = 37, 90
    x, weight = (torch.randn(size, k, generator=generator).half() for size in (rows, 2 * n))
    bias = torch.randn(2 * n, generator=generator).half() if with_bias else None
    found = launch_few_rows(x, weight, bias, activation).double()
    both = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    gate, up = both.chunk(2, -1)
    gelu = torch.nn.functional.gelu(gate, approximate="tanh")
    exact = up * (torch.nn.functional.silu(gate) if activation == "silu" else gelu)
    assert found.shape == (rows, n)
    error = (found - exact).abs()
    # Both activations and up have slopes of at most 1.2 times the other factor.
    slack = bound(x, weight, bias)
    slack = 1.2 * (slack[:, :n] * up.abs() + slack[:, n:] * gate.abs()) + 2**-20 * exact.abs()
    assert bool((error <= slack + exact.abs() * 2**-11 + 2**-25).all())
