"""The operator ``flashpte::few_rows_linear`` on a CPU: values, contract, and that PyTorch can trace it."""

import pytest
import torch

from flashpte.kernels.dense import few_rows_linear


def tensors(rows=2, n=6, k=8, dtype=torch.bfloat16, bias=True):
    torch.manual_seed(0)
    return (
        torch.randn(1, rows, k).to(dtype),
        torch.randn(n, k).to(dtype),
        torch.randn(n).to(dtype) if bias else None,
    )


@pytest.mark.parametrize("activation", ["", "silu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_a_linear_layer(activation, bias):
    x, weight, b = tensors(bias=bias)
    y = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    if activation:
        gate, up = y[..., :3], y[..., 3:]
        gelu = torch.nn.functional.gelu(gate, approximate="tanh")
        y = (gate * gate.sigmoid() if activation == "silu" else gelu) * up
    torch.testing.assert_close(few_rows_linear(x, weight, b, activation).double(), y, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.randn(1, 2, 8)}, "x has dtype torch.float32"),
        ({"x": torch.randn(1, 2, 9).bfloat16()}, "the weight takes 8 columns"),
        ({"x": torch.tensor(1.0).bfloat16()}, "the weight takes 8 columns"),
        ({"x": torch.randn(17, 8).bfloat16()}, "x has 17 rows: the kernels take at most 16"),
        ({"weight": torch.randn(8, 6).bfloat16().t()}, "the weight must be a contiguous matrix"),
        ({"weight": torch.randn(6, 8).half()}, "the weight has dtype torch.float16"),
        ({"bias": torch.randn(5).bfloat16()}, "the bias must be a contiguous tensor of 6 numbers"),
        ({"bias": torch.randn(6)}, "the bias has dtype torch.float32"),
        ({"activation": "relu"}, "the activation 'relu' is none of silu, gelu_tanh"),
        ({"weight": torch.randn(5, 8).bfloat16(), "bias": None, "activation": "silu"}, "the weight has 5 rows"),
    ],
)
@pytest.mark.parametrize("fake", [False, True], ids=["cpu", "fake"])
def test_what_does_not_fit_is_refused(change, said, fake):
    x, weight, bias = tensors()
    arguments = {"x": x, "weight": weight, "bias": bias, "activation": "", **change}
    if fake:
        mode = torch._subclasses.FakeTensorMode()
        arguments = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
    with pytest.raises(ValueError, match=said):
        few_rows_linear(*arguments.values())


@pytest.mark.parametrize("activation", ["", "silu"])
def test_opcheck(activation):
    torch.library.opcheck(few_rows_linear, (*tensors(), activation), test_utils=("test_schema", "test_faketensor"))


def test_no_rows():
    x, weight, bias = tensors(rows=0)
    assert few_rows_linear(x, weight, bias).shape == (1, 0, 6)
