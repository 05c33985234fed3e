"""Linear layers with packed weights for tests: inputs, the float64 answer and the allowed error."""

from __future__ import annotations

import dataclasses
import math

import torch

from flashpte.kernels.linear.call import LinearCall
from flashpte.kernels.linear.format import Groupwise, PackedFormat, PackedWeight, pack
from flashpte.kernels.linear.reference import dequantize, linear_reference


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem. ``zeros`` are ``none``, ``integer``, ``real`` or ``offsets``; ``layout`` is that of x."""

    rows: int
    out_features: int
    in_features: int
    bits: int = 4
    group: int = 32
    zeros: str = "none"
    bias: bool = False
    dtype: torch.dtype = torch.float16
    scale_dtype: torch.dtype = torch.bfloat16
    layout: str = "contiguous"
    seed: int = 0

    def __str__(self) -> str:
        bias = "-bias" if self.bias else ""
        return (
            f"M{self.rows}-N{self.out_features}-K{self.in_features}-int{self.bits}-G{self.group}-zeros_{self.zeros}{bias}"
            f"-{str(self.dtype)[6:]}-{str(self.scale_dtype)[6:]}-{self.layout}"
        )


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case's tensors: the weight in natural order, and the call with the packed weight."""

    natural: Groupwise
    call: LinearCall

    @property
    def arguments(self) -> dict:
        """The operator's arguments by name."""
        call, fmt = self.call, self.call.fmt
        given = dict(x=call.x, **call.packed._asdict(), bias=call.bias)
        sizes = dict(out_features=fmt.out_features, in_features=fmt.in_features)
        return given | dict(bits=fmt.bits, group=fmt.group) | sizes

    def call_on(self, device: str) -> LinearCall:
        """The call with its tensors, their strides and the memory around them on another device."""
        names = ("x", "weight", "scales", "zeros", "offsets", "bias")
        tensors = {name: _to(getattr(self.call, name), device) for name in names}
        return dataclasses.replace(self.call, **tensors)


def _to(tensor: torch.Tensor | None, device: str) -> torch.Tensor | None:
    if tensor is None:
        return None
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _surrounded(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same contiguous tensor, with NaN (or the largest integer) in memory before and after it."""
    if tensor is None:
        return None
    poison = float("nan") if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).max
    around = torch.full((tensor.numel() + 128,), poison, dtype=tensor.dtype)
    return around[64:-64].view(tensor.shape).copy_(tensor)


def _input(case: Case, generator: torch.Generator) -> torch.Tensor:
    """x in the case's layout: ``contiguous``, ``sliced`` (NaN around), ``transposed`` or ``batched``."""
    m, k = case.rows, case.in_features
    x = torch.randn(m, k, generator=generator).to(case.dtype)
    if case.layout == "sliced":
        buffer = torch.full((m + 2, k + 16), float("nan"), dtype=case.dtype)
        buffer[1:-1, 8:-8] = x
        return buffer[1:-1, 8:-8]
    if case.layout == "transposed":
        return x.t().contiguous().t()
    if case.layout == "batched":
        return x.view(1, m, 1, k)
    return _surrounded(x)


def build(case: Case) -> Problem:
    """Makes a case's tensors; the same seed gives the same tensors."""
    generator = torch.Generator().manual_seed(case.seed)
    n, k = case.out_features, case.in_features
    has_zeros, has_offsets = case.zeros in ("integer", "real"), case.zeros == "offsets"
    fmt = PackedFormat(case.bits, case.group, n, k, has_zeros, case.scale_dtype, has_offsets)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    codes = (rand(n, k) * 2**case.bits).to(torch.uint8)
    scales = ((rand(n, fmt.groups) - 0.3) / 2**case.bits).to(case.scale_dtype)
    zeros = offsets = None
    if fmt.has_zeros:
        zeros = rand(n, fmt.groups) * (2**case.bits - 1)
        zeros = (zeros.round() if case.zeros == "integer" else zeros).to(case.scale_dtype)
    if fmt.has_offsets:
        # About half of a group's range below zero, as in files whose groups have a least value.
        offsets = (-rand(n, fmt.groups) * scales.float() * 2**case.bits).to(case.scale_dtype)
    natural = Groupwise(codes, scales, zeros, offsets)
    packed = PackedWeight(*map(_surrounded, pack(natural, fmt)))
    bias = _surrounded(torch.randn(n, generator=generator).to(case.dtype)) if case.bias else None
    return Problem(natural, LinearCall(_input(case, generator), *packed[:3], bias, fmt, packed.offsets))


def _dense(problem: Problem, dtype: torch.dtype) -> torch.Tensor:
    fmt = problem.call.fmt
    return dequantize(*problem.natural, fmt.bits, fmt.group, dtype)


def exact(problem: Problem) -> torch.Tensor:
    """The float64 answer ``[..., N]``."""
    call = problem.call
    return linear_reference(call.x.double(), _dense(problem, torch.float64), call.bias, torch.float64)


def plain_error(problem: Problem, answer: torch.Tensor) -> float:
    """The largest error of a plain product of dequantized weights, over four orders of its terms.

    The weight is rounded to the dtype of x, as in a dense layer. Sums are float32 and written out, one accumulator and
    one term after the other. So the error is the same on every processor; a BLAS adds in an order of its own.
    """
    call = problem.call
    x, weight = call.x.float(), _dense(problem, torch.float32).to(call.x.dtype).float()
    forwards = torch.arange(x.shape[-1])
    generator = torch.Generator().manual_seed(0)
    shuffled = (torch.randperm(x.shape[-1], generator=generator) for _ in range(2))
    worst = 0.0
    for order in (forwards, forwards.flip(0), *shuffled):
        total = x.new_zeros(answer.shape)
        for k in order.tolist():
            total += x[..., k, None] * weight[:, k]
        if call.bias is not None:
            total += call.bias.float()
        worst = max(worst, (total.to(call.x.dtype).double() - answer).abs().max().item())
    return worst


def check(problem: Problem, out: torch.Tensor) -> float:
    """Asserts that ``out``, on any device, is close enough to the float64 answer; returns error over bound.

    The bound is 2 ulp of the output dtype at the largest value, or twice :func:`plain_error` if that is more.
    """
    assert out.is_contiguous()
    answer, out = exact(problem), out.cpu()
    assert out.dtype == problem.call.x.dtype
    assert out.shape == answer.shape
    assert not out.isnan().any(), "NaN in the result: an element was not written, or memory out of bounds was used"
    largest = answer.abs().max().item()
    bound = 2 * torch.finfo(out.dtype).eps * 2.0 ** math.floor(math.log2(largest))
    error = (out.double() - answer).abs().max().item()
    if error > bound:
        bound = max(bound, 2 * plain_error(problem, answer))
    assert error <= bound, f"max error {error:.3e} is above the bound {bound:.3e}"
    return error / bound
