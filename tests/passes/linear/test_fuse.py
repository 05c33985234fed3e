"""Products that share their input become one, and the program computes the same."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

from flashpte.passes import replace_linear

WIDTH = 64


class Attention(nn.Module):
    """Heads of 16: q has 4, k and v have 2; then a product of its own, and gate and up."""

    def __init__(self, bias=False, q_rows=WIDTH, transform=None):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n, bias=bias) for n in (q_rows, 32, 32))
        self.o = nn.Linear(q_rows, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, 96, bias=False) for _ in range(2))
        self.transform = transform

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.transform is not None:
            q = self.transform(q)
        heads = [t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in (k, v)]
        y = x + self.o(q * heads[0].mean() + heads[1].sum())
        return y + (torch.nn.functional.silu(self.gate(y)) * self.up(y))[..., :WIDTH]


def program_of(module, rows=5, group=32, dynamic=False):
    torch.manual_seed(0)
    module = module.bfloat16().eval()
    quantize_(module, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group)))
    x = torch.randn(1, rows, WIDTH).bfloat16()
    shapes = {"x": {1: torch.export.Dim("rows", min=1, max=64)}} if dynamic else None
    return torch.export.export(module, (x,), dynamic_shapes=shapes, strict=False), x


def products(program) -> list[int]:
    """The rows of the program's products, in order."""
    op = torch.ops.flashpte.quantized_linear.default
    return [node.args[8] for node in program.graph.nodes if node.target is op]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_q_k_v_and_gate_up_become_one_product_each(rows, bias, dynamic):
    program, x = program_of(Attention(bias), max(rows, 2) if dynamic else rows, dynamic=dynamic)
    plain, _ = replace_linear(program, fuse=False)
    fused, report = replace_linear(program)
    assert products(plain) == [64, 32, 32, 64, 96, 96]
    assert products(fused) == [128, 64, 192]
    for length in (rows, 17) if dynamic else (rows,):
        x = torch.randn(1, length, WIDTH).bfloat16()
        assert torch.equal(fused.module()(x), plain.module()(x))
    reasons = [outcome.decision.reason for outcome in report.outcomes]
    assert sum("4-bit weight" in reason for reason in reasons) == 6
    assert [reason.split(" share ")[1] for reason in reasons if " share x" in reason] == [
        "x: one product of 128 rows",
        "x: one product of 192 rows",
    ]
    held = {name: tensor.dtype for name, tensor in fused.state_dict.items() if name.endswith("_packed")}
    assert held == dict.fromkeys(
        ("q_and_k_and_v.weight_packed", "o.weight_packed", "gate_and_up.weight_packed"), torch.int16
    )


def unfused(program, x):
    return replace_linear(program, fuse=False)[0].module()(x)


def test_a_fused_program_decomposes():
    program, x = program_of(Attention(True), dynamic=True)
    fused, _ = replace_linear(program)
    again = fused.run_decompositions({})
    assert products(again) == [128, 64, 192]
    assert torch.equal(again.module()(x), unfused(program, x))


class Sum(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, rows, bias=False), nn.Linear(WIDTH, 32, bias=False)

    def forward(self, x):
        return self.a(x).sum() + self.b(x)


@pytest.mark.parametrize(
    ("module", "expected", "reason"),
    [
        (
            lambda: Attention(transform=lambda q: q.view(-1).view(q.shape)),
            [64, 32, 32, 64, 192],
            "another memory layout",
        ),
        (lambda: Sum(24), [24, 32], r"their rows \[24, 32\] do not fill tiles of 16"),
    ],
    ids=["flattened", "ragged"],
)
def test_products_that_stay_apart(module, expected, reason):
    program, x = program_of(module())
    fused, report = replace_linear(program)
    assert products(fused) == expected
    (refused,) = (outcome for outcome in report.outcomes if not outcome.applied)
    assert re.search(reason, refused.decision.reason)
    assert torch.equal(fused.module()(x), unfused(program, x))


class TwoFormats(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, 32, bias=bias) for bias in (False, True, False))

    def forward(self, x):
        return self.a(x) + self.b(x) + self.c(x + 1)


def test_other_formats_and_other_inputs_are_not_siblings():
    program, _ = program_of(TwoFormats())
    fused, report = replace_linear(program)
    assert products(fused) == [32, 32, 32]
    assert len(report.outcomes) == 3


class WrittenBetween(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Linear(WIDTH, 32, bias=False) for _ in range(2))

    def forward(self, x):
        x = x * 2
        first = self.a(x)
        x.add_(1)
        return first + self.b(x)


def test_an_input_that_changes_in_place_is_not_shared():
    program, x = program_of(WrittenBetween())
    fused, report = replace_linear(program)
    assert products(fused) == [32, 32]
    assert len(report.outcomes) == 2
    assert torch.equal(fused.module()(x), unfused(program, x))


def test_one_weight_used_twice_is_not_doubled():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(WIDTH, 32, bias=False)

        def forward(self, x):
            return self.a(x) * self.a(x)

    program, x = program_of(Twice())
    fused, _ = replace_linear(program)
    assert products(fused) == [32, 32]
    assert torch.equal(fused.module()(x), unfused(program, x))
