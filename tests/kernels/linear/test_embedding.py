"""Rows of a packed table: the CPU implementation and the fake, and the arguments that all implementations refuse."""

from __future__ import annotations

import pytest
import torch
from compile_only import compiling_for
from linear_cases import Case, build

from flashpte.kernels import quantized_embedding
from flashpte.kernels.linear.embedding import _as_call, launch_embedding
from flashpte.kernels.linear.reference import dequantize

NOT_LAUNCHING = ("test_schema", "test_autograd_registration", "test_faketensor")
TABLES = [
    Case(1, 50, 320, zeros="real"),
    Case(1, 33, 1100, group=64),
    Case(1, 48, 640, group=128, zeros="integer", scale_dtype=torch.float16),
    Case(1, 50, 256, bits=8, group=64, zeros="real"),
    Case(1, 17, 77, bits=8, group=77),
    Case(1, 33, 320, zeros="offsets", scale_dtype=torch.float16),
    Case(1, 33, 320, bits=8, group=320, zeros="offsets"),
]
INDICES = torch.tensor([[0, 16], [15, 9]])


def arguments(case: Case, dtype=torch.bfloat16, indices=INDICES):
    """The operator's arguments, and the exact rows ``[..., K]`` in float64."""
    problem = build(case)
    given = {name: value for name, value in problem.arguments.items() if name not in ("x", "bias")}
    dense = dequantize(*problem.natural, case.bits, case.group, torch.float64)
    return given | dict(indices=indices, dtype=dtype), dense[indices]


def check(out: torch.Tensor, rows: torch.Tensor) -> None:
    """Each value is the correctly rounded one, or its neighbor."""
    assert out.shape == rows.shape
    assert not out.isnan().any()
    assert ((out.double() - rows).abs() <= torch.finfo(out.dtype).eps * rows.abs()).all()


def on_cpu(given):
    quantized_embedding(**given)


def fake(given):
    with torch._subclasses.FakeTensorMode() as mode:
        quantized_embedding(**{n: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for n, a in given.items()})


def on_cuda(given):
    quantized_embedding._init_fn(**given)


@pytest.mark.parametrize("case", TABLES, ids=str)
def test_cpu_implementation_picks_rows(case):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        given, rows = arguments(case, dtype)
        check(quantized_embedding(**given), rows)
    torch.library.opcheck(quantized_embedding, (), given, test_utils=NOT_LAUNCHING)


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", TABLES, ids=str)
def test_the_kernel_picks_rows(case):
    for dtype, indices in ((torch.float16, INDICES.int().t()), (torch.float32, INDICES[:0])):
        given, rows = arguments(case, dtype, indices.long())
        numbers = (given[name] for name in ("bits", "group", "out_features", "in_features"))
        call = _as_call(indices, given["weight"], given["scales"], given["zeros"], given["offsets"], dtype, *numbers)
        check(launch_embedding(call, indices), rows)


@pytest.mark.parametrize("run", [on_cpu, fake, on_cuda])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(indices=torch.zeros(3)), "indices must have dtype torch.int64 or torch.int32, got torch.float32"),
        (dict(dtype=torch.float64), "dtype torch.float64: the kernels give one of"),
        (dict(bits=8), "weight must have dtype torch.int8"),
        (dict(in_features=400), r"weight must have the shape \[4, 4, 16, 32\], got \[4, 3, 16, 32\]"),
        (dict(zeros=None, group=64), "scales must have the shape"),
    ],
)
def test_wrong_arguments_are_named(run, changes, message):
    given, _ = arguments(Case(1, 50, 320, zeros="real"))
    with pytest.raises(ValueError, match=message):
        run(given | changes)


def test_it_compiles():
    given, _ = arguments(Case(1, 48, 640, zeros="real"))
    with compiling_for("sm_80") as kernels:
        quantized_embedding._init_fn(**given)
    assert [kernel.name for kernel in kernels] == ["_quantized_embedding_kernel"]
    assert kernels[0].spilled == 0
