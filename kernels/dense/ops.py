"""The operator ``flashpte::few_rows_linear``: contract, registration, fake and CPU implementations."""

from __future__ import annotations

from typing import cast

import torch
from torch.library import CustomOpDef, triton_op

from flashpte.kernels.contract import may_be_equal, printable
from flashpte.kernels.dense.few_rows import ACTIVATIONS, launch_few_rows
from flashpte.kernels.dense.tuning import MAX_ROWS
from flashpte.kernels.launch import static_int

DTYPES = (torch.bfloat16, torch.float16)


def why_not(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "") -> str | None:
    """Why the kernels refuse a call, as one sentence, or ``None``."""
    if x.dtype not in DTYPES:
        return f"x has dtype {x.dtype}: the kernels take bfloat16 or float16"
    if weight.dim() != 2 or not weight.is_contiguous():
        return "the weight must be a contiguous matrix"
    n, k = weight.shape
    if x.dim() == 0 or not may_be_equal(x.shape[-1], k):
        return f"x has the shape {[printable(size) for size in x.shape]}, the weight takes {printable(k)} columns"
    rows = x.shape[:-1].numel() if all(isinstance(size, int) for size in x.shape) else None
    if rows is None:
        return "the number of rows of x is dynamic"
    if rows > MAX_ROWS:
        return f"x has {rows} rows: the kernels take at most {MAX_ROWS}"
    if static_int(n) is None or static_int(k) is None or k == 0:
        return "the weight's sizes must be static, and K at least 1"
    if activation not in ACTIVATIONS:
        return f"the activation {activation!r} is none of {', '.join(filter(None, ACTIVATIONS))}"
    if activation and n % 2:
        return f"the weight has {n} rows: gate and up must have equally many"
    if bias is not None and (tuple(bias.shape) != (n,) or not bias.is_contiguous()):
        return f"the bias must be a contiguous tensor of {n} numbers"
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            return f"the {name} has dtype {tensor.dtype}, x {x.dtype}"
        if tensor is not None and tensor.device != x.device:
            return f"the {name} is on {tensor.device}, x on {x.device}"
    return None


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> None:
    if (reason := why_not(x, weight, bias, activation)) is not None:
        raise ValueError(reason)


def _few_rows_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = ""
) -> torch.Tensor:
    """``x @ weight^T + bias`` for few rows of x; everything up to the result is computed in float32.

    With an activation, the weight's rows are those of a gate and then those of "up", and the result is
    ``activation(gate) * up``.

    Programs are serialized with these arguments, so their names, order and types must not change.

    Args:
        x: ``[..., K]``, bfloat16 or float16, any strides; its leading sizes multiply to at most 16.
        weight: ``[N, K]`` in the dtype of x, contiguous; ``[2 N, K]`` with an activation.
        bias: one number for each row of the weight in the dtype of x, or ``None``.
        activation: ``""``, ``"silu"``, or ``"gelu_tanh"`` (``gelu(approximate="tanh")``).

    Returns:
        ``[..., N]`` in the dtype of x, contiguous.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    _check(x, weight, bias, activation)
    return launch_few_rows(x, weight, bias, activation)


few_rows_linear = cast(CustomOpDef, triton_op("flashpte::few_rows_linear", _few_rows_linear, mutates_args=()))
"""A linear layer with few rows of x; see :func:`_few_rows_linear` for its arguments."""


@few_rows_linear.register_fake
def _fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = ""
) -> torch.Tensor:
    _check(x, weight, bias, activation)
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if activation else 1)))


@few_rows_linear.register_kernel("cpu")
def _cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "") -> torch.Tensor:
    _check(x, weight, bias, activation)
    y = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if activation:
        gate, up = y.chunk(2, -1)
        silu = torch.nn.functional.silu(gate)
        y = up * (silu if activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh"))
    return y.to(x.dtype)
