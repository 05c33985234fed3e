"""The operator without a GPU: its CPU implementation, its fake, its arguments, and which kernels a program gets."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from linear_cases import Case, build, check, exact
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from flashpte.kernels import quantized_linear
from flashpte.kernels.launch import cdiv
from flashpte.kernels.linear import dispatch, plain
from flashpte.kernels.linear.contract import why_not
from flashpte.kernels.linear.tuning import LinearShape, choose_few_rows, choose_many_rows
from flashpte.kernels.tuning import ARCHES

NOT_LAUNCHING = ("test_schema", "test_autograd_registration", "test_faketensor")
CASES = [
    Case(1, 48, 256),
    Case(3, 50, 320, zeros="real", bias=True),
    Case(17, 33, 320, group=128, zeros="integer", scale_dtype=torch.float16),
    Case(40, 64, 256, bits=8, group=64, bias=True),
    Case(3, 50, 320, bits=8, group=320, zeros="real"),
    Case(3, 50, 320, zeros="offsets", bias=True),
    Case(17, 33, 320, bits=8, group=320, zeros="offsets", scale_dtype=torch.float16),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_implementation_is_the_linear_layer(case, dtype):
    problem = build(dataclasses.replace(case, dtype=dtype))
    check(problem, quantized_linear(**problem.arguments))


@pytest.mark.parametrize("layout", ["sliced", "transposed", "batched"])
def test_any_layout_of_x(layout):
    problem = build(Case(3, 48, 256, layout=layout))
    check(problem, quantized_linear(**problem.arguments))


def test_one_row_without_leading_sizes_and_no_rows():
    problem = build(Case(1, 48, 256))
    x = problem.call.x
    whole = quantized_linear(**problem.arguments)
    assert torch.equal(quantized_linear(**problem.arguments | dict(x=x[0])), whole[0])
    assert quantized_linear(**problem.arguments | dict(x=x.new_empty(2, 0, 256))).shape == (2, 0, 48)


def test_the_bound_does_not_admit_weights_of_fewer_bits():
    """A float32 result from weights rounded to bfloat16, or from scales rounded to 8 bits, is above the bound."""
    problem = build(Case(3, 48, 320, dtype=torch.float32, scale_dtype=torch.float32))
    rounded = dataclasses.replace(problem.call, scales=problem.call.scales.bfloat16().float())
    out = quantized_linear(**dataclasses.replace(problem, call=rounded).arguments)
    with pytest.raises(AssertionError, match="above the bound"):
        check(problem, out)
    with pytest.raises(AssertionError, match="above the bound"):
        check(problem, exact(problem).to(torch.float16).float())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case):
    torch.library.opcheck(quantized_linear, (), build(case).arguments, test_utils=NOT_LAUNCHING)


def on_cpu(arguments):
    quantized_linear(**arguments)


def fake(arguments):
    with torch._subclasses.FakeTensorMode() as mode:
        quantized_linear(**{n: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for n, a in arguments.items()})


def on_cuda(arguments):
    """Runs the CUDA implementation up to its first launch, which raises a Triton error for CPU tensors."""
    quantized_linear._init_fn(**arguments)


PACKED = dict(scales=torch.ones(3, 2, 8, 2, 4, dtype=torch.bfloat16), weight=torch.zeros(3, 2, 16, 32).short())
WRONG = [
    (dict(x=torch.zeros(2, 256, dtype=torch.float64)), "x has dtype torch.float64"),
    (dict(x=torch.zeros(())), "x has no dimensions"),
    (dict(x=torch.zeros(2, 255)), "x has 255 columns, the weight takes 256"),
    (dict(in_features=255), "x has 256 columns, the weight takes 255"),
    (dict(out_features=49), r"weight must have the shape \[4, 2, 16, 32\], got \[3, 2, 16, 32\]"),
    (dict(weight=PACKED["weight"].int()), "weight must have dtype torch.int16, got torch.int32"),
    (dict(weight=PACKED["weight"].transpose(0, 1).contiguous().transpose(0, 1)), "weight must be contiguous"),
    (dict(bits=3), "weights of 3 bits"),
    (dict(bits=8), "weight must have dtype torch.int8, got torch.int16"),
    (dict(group=16), "groups of 16 columns"),
    (dict(group=64), r"scales must have the shape \[3, 2, 8, 2, 2\], got \[3, 2, 8, 2, 4\]"),
    (dict(group=256), "groups of 256 columns: the kernels take 32, 64 or 128 with 4 bits"),
    (dict(scales=PACKED["scales"].double()), "scales must have dtype bfloat16, float16 or float32, got torch.float64"),
    (dict(scales=PACKED["scales"][..., :1].expand(3, 2, 8, 2, 4)), "scales must be contiguous"),
    (dict(zeros=PACKED["scales"].float()), "zeros must have dtype torch.bfloat16, got torch.float32"),
    (dict(zeros=PACKED["scales"][1:]), r"zeros must have the shape \[3, 2, 8, 2, 4\], got \[2, 2, 8, 2, 4\]"),
    (dict(offsets=PACKED["scales"].float()), "offsets must have dtype torch.bfloat16, got torch.float32"),
    (dict(offsets=PACKED["scales"][1:]), r"offsets must have the shape \[3, 2, 8, 2, 4\], got \[2, 2, 8, 2, 4\]"),
    (dict(zeros=PACKED["scales"], offsets=PACKED["scales"]), "zeros and offsets are both given"),
    (dict(bias=torch.zeros(47)), r"bias must have the shape \[48\], got \[47\]"),
    (dict(bias=torch.zeros(48).half()), "bias must have dtype torch.float32, got torch.float16"),
    (dict(bias=torch.zeros(96)[::2]), "bias must be contiguous"),
    (dict(out_features=0), "a weight of 0 x 256 is empty"),
]


def right() -> dict:
    return build(Case(2, 48, 256, dtype=torch.float32)).arguments


@pytest.mark.parametrize("run", [on_cpu, fake, on_cuda])
@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_arguments_are_named(run, changes, message):
    with pytest.raises(ValueError, match=message):
        run(right() | changes)


def test_tensors_on_different_devices():
    with pytest.raises(ValueError, match="scales is on meta, x on cpu"):
        on_cuda(right() | dict(scales=PACKED["scales"].to("meta")))


def test_launchers_refuse_as_the_operator_does():
    call = build(Case(17, 48, 256)).call
    with pytest.raises(ValueError, match="at most 16 rows of x, got 17"):
        plain.launch_few_rows(call)
    for launch in (plain.launch_few_rows, plain.launch_many_rows, dispatch.launch_linear):
        with pytest.raises(ValueError, match="zeros must be None for this format"):
            launch(dataclasses.replace(call, zeros=call.scales))
        with pytest.raises(ValueError, match="offsets must be None for this format"):
            launch(dataclasses.replace(call, offsets=call.scales))


def symbolic(call, least: int, most: int):
    """The call with a symbolic number of rows in a known range, and its environment of shapes."""
    env = ShapeEnv()
    mode = torch._subclasses.FakeTensorMode(shape_env=env)
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(call.x, symbolic_context=context, source=ConstantSource("x"))
    torch._check(x.shape[0] >= least)
    torch._check(x.shape[0] <= most)
    tensors = {f: mode.from_tensor(getattr(call, f)) for f in ("weight", "scales")}
    env.guards.clear()
    return mode, dataclasses.replace(call, x=x, **tensors)


@pytest.mark.parametrize(
    ("least", "most", "expected"), [(2, 16, ["few"]), (17, 512, ["many"]), (2, 512, ["few", "many"])]
)
def test_a_dynamic_number_of_rows_gets_the_kernels_of_its_range(monkeypatch, least, most, expected):
    launched = []

    def recording(name):
        return lambda call, config=None, into=None: launched.append((name, into)) or call.empty_output()

    monkeypatch.setattr(dispatch, "launch_few_rows", recording("few"))
    monkeypatch.setattr(dispatch, "launch_many_rows", recording("many"))
    mode, call = symbolic(build(Case(max(least, 5), 48, 256)).call, least, most)
    with mode:
        assert not isinstance(call.rows, int)
        assert why_not(call) is None
        out = dispatch.launch_linear(call)
    assert out.shape[1] == 48
    assert [name for name, _ in launched] == expected
    if len(expected) == 2:
        rows = call.rows.node.expr
        for value, enabled in ((5, [1, 0]), (16, [1, 0]), (17, [0, 1]), (512, [0, 1])):
            assert [into.enabled.node.expr.subs(rows, value) for _, into in launched] == enabled


def test_export_keeps_one_operator_for_any_number_of_rows():
    problem = build(Case(5, 48, 256))
    given = problem.arguments
    x = given.pop("x")

    class Layer(torch.nn.Module):
        def forward(self, x):
            return quantized_linear(x, **given)

    rows = torch.export.Dim("rows", min=1, max=512)
    program = torch.export.export(Layer(), (x[None],), dynamic_shapes=({1: rows},))
    calls = [node for node in program.graph.nodes if node.target is torch.ops.flashpte.quantized_linear.default]
    assert len(calls) == 1
    check(problem, program.module()(x[None])[0])


@pytest.mark.parametrize("arch", ARCHES.values(), ids=list(ARCHES))
def test_choices_are_whole_tiles_and_leave_no_split_empty(arch):
    for rows in (1, 16, 17, 64, 4096, None):
        for n, k in ((48, 128), (5376, 5376), (262144, 5376), (5376, 21504), (256, 21504)):
            for dtype in DTYPES:
                shape = LinearShape(rows, n, k, 4, dtype)
                few, many = choose_few_rows(shape, arch), choose_many_rows(shape, arch)
                steps = cdiv(cdiv(k, 128), few.tiles_at_once)
                per_split = cdiv(steps, few.num_splits)
                assert (few.num_splits - 1) * per_split < steps
                assert few.num_splits == 1 or per_split >= 4
                assert few.block_n % 16 == many.block_n % 16 == many.block_m % 16 == 0
