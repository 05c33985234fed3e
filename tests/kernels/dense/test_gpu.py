"""The dense few-rows kernels on a GPU: every choice of tiles, sizes that do not fill them, and rows of x with gaps."""

import itertools

import pytest
import torch

from flashpte.kernels.dense import few_rows_linear

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

SIZES = ((576, 576), (960, 576), (576, 1536), (1030, 2050), (9000, 600), (64, 5376), (7, 33))


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_products(n, k, rows, dtype):
    """The error is at most twice that of cuBLAS, against float64."""
    torch.manual_seed(n + k + rows)
    for with_bias, activation, stride in itertools.product((False, True), ("", "silu", "gelu_tanh"), (0, 8)):
        weight = (torch.randn((2 if activation else 1) * n, k, device="cuda") * k**-0.5).to(dtype)
        x = torch.randn(1, rows, k + stride, device="cuda").to(dtype)[..., :k]
        bias = torch.randn(len(weight), device="cuda").to(dtype) if with_bias else None
        found = few_rows_linear(x, weight, bias, activation).double()

        def reference(wide, x=x, weight=weight, bias=bias, activation=activation):
            tensors = [None if tensor is None else tensor.to(wide) for tensor in (x, weight, bias)]
            y = torch.nn.functional.linear(*tensors)
            if activation:
                gate, up = y.chunk(2, -1)
                silu = torch.nn.functional.silu(gate)
                y = up * (silu if activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh"))
            return y.double()

        exact, library = reference(torch.float64), reference(dtype)
        assert found.shape == (1, rows, n)
        ulp = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
        assert bool(((found - exact).abs() <= exact.abs() * ulp + 1e-4).all())
        assert (found - exact).norm() <= 2 * (library - exact).norm() + 1e-4 * exact.norm()


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_the_same_bits_every_time(rows):
    x, weight = (torch.randn(size, 5376, device="cuda").bfloat16() for size in (rows, 4096))
    first = few_rows_linear(x, weight)
    assert all(torch.equal(few_rows_linear(x, weight), first) for _ in range(20))


@pytest.mark.parametrize("rows", [1, 8])
def test_more_than_four_billion_bytes_of_weights(rows):
    weight = torch.zeros(300_000, 8192, dtype=torch.bfloat16, device="cuda")
    weight[-1] = 1
    x = torch.ones(rows, 8192, dtype=torch.bfloat16, device="cuda")
    y = few_rows_linear(x, weight)
    assert bool((y[:, -1] == 8192).all())
    assert int(y.count_nonzero()) == rows
