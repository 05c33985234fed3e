"""Linear layers with few rows: which are replaced, fused and gated, and that the program computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flashpte.passes import rewrite_program
from flashpte.passes.linear.few_rows import FewRowsRewrite
from flashpte.passes.linear.fuse import FuseLinears, agreed
from flashpte.passes.linear.gated import GatedRewrite

WIDTH, INNER = 64, 96
few_rows = torch.ops.flashpte.few_rows_linear.default


class Layer(nn.Module):
    def __init__(self, activation=nn.functional.silu, bias=False, up_first=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n, bias=bias) for n in (WIDTH, 32, 32))
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=bias) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=bias)
        self.activation, self.up_first = activation, up_first

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + q * torch.cat([k, v], -1)
        if self.up_first:
            up = self.up(x)
            return self.down(up * self.activation(self.gate(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


def program_of(module=None, rows=2, dtype=torch.bfloat16, dynamic=False):
    torch.manual_seed(0)
    module = (module or Layer()).to(dtype).eval()
    x = torch.randn(1, rows, WIDTH).to(dtype)
    shapes = {"x": {1: torch.export.Dim("rows", min=2, max=64)}} if dynamic else None
    return torch.export.export(module, (x,), dynamic_shapes=shapes, strict=False), x


def rewritten(program, *rewrites):
    program, reports = rewrite_program(program, rewrites or (FuseLinears(), FewRowsRewrite(), GatedRewrite()))
    return program, {name: [o.decision.reason for o in report.outcomes] for name, report in reports.items()}


def shapes(program, op=few_rows):
    return [list(node.args[1].meta["val"].shape) for node in program.graph.nodes if node.target is op]


def same(found, expected, x):
    """Within the rounding of intermediate results, which the kernels do not do."""
    torch.testing.assert_close(found.module()(x), expected.module()(x), rtol=0.02, atol=0.02)


def tanh(x):
    return nn.functional.gelu(x, approximate="tanh")


@pytest.mark.parametrize("activation", [nn.functional.silu, tanh])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_a_layer_becomes_three_products(activation, bias, rows):
    program, x = program_of(Layer(activation, bias), rows)
    found, reasons = rewritten(program)
    assert shapes(found) == [[128, WIDTH], [2 * INNER, WIDTH], [WIDTH, INNER]]
    assert [node.args[3] for node in found.graph.nodes if node.target is few_rows and len(node.args) > 3] == [
        "gelu_tanh" if activation is tanh else "silu"
    ]
    same(found, program, x)
    assert reasons["few-rows"][0] == f"{rows} row{'s' * (rows > 1)} of x by [128, 64]: read once"
    assert set(found.state_dict) >= {"q_and_k_and_v.weight", "gate_and_up.weight", "down.weight"}
    assert "q.weight" not in found.state_dict


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: program_of(rows=17), "x has 17 rows: the kernels take at most 16"),
        (lambda: program_of(dtype=torch.float32), "x has dtype torch.float32"),
        (lambda: program_of(dynamic=True), "the number of rows of x is dynamic"),
    ],
)
def test_what_stays(make, reason):
    program, x = make()
    found, reasons = rewritten(program)
    assert shapes(found) == []
    assert shapes(found, torch.ops.aten.linear.default) == [[128, WIDTH], [2 * INNER, WIDTH], [WIDTH, INNER]]
    assert all(text.startswith(reason) for text in reasons["few-rows"])
    torch.testing.assert_close(found.module()(x), program.module()(x), rtol=0.02, atol=0.02)


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return x @ self.weight


def test_a_transposed_weight_stays():
    program, _ = program_of(Transposed())
    found, reasons = rewritten(program)
    assert shapes(found) == []
    assert reasons["few-rows"] == ["the weight is [K, N]: the kernels read rows of [N, K]"]


def exact_gelu(x):
    return nn.functional.gelu(x)


class Reused(Layer):
    """The gate's value is read twice."""

    def forward(self, x):
        gate = self.gate(x)
        return self.down(nn.functional.silu(gate) * self.up(x) + gate)


@pytest.mark.parametrize("make", [lambda: Layer(exact_gelu), lambda: Layer(up_first=True), Reused])
def test_other_gates_stay_apart(make):
    program, x = program_of(make())
    found, reasons = rewritten(program)
    assert reasons["gated"] == []
    same(found, program, x)


class TiedTwice(nn.Module):
    """Two products of one x, and one of their weights is read once more."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))

    def forward(self, x):
        return self.a(x) + self.b(x) + self.a.weight.sum()


def test_a_weight_that_is_read_elsewhere_is_not_copied():
    program, x = program_of(TiedTwice())
    found, reasons = rewritten(program)
    assert reasons["linear-fusion"] == ["one of their weights is also read elsewhere"]
    assert set(found.state_dict) == {"a.weight", "b.weight"}
    same(found, program, x)


class Apart(Layer):
    """Like the layer, but k and v have inputs of their own."""

    def forward(self, x):
        q, k, v = self.q(x), self.k(x + 1), self.v(x + 2)
        x = x + q * torch.cat([k, v], -1)
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def test_methods_fuse_what_all_of_them_fuse():
    programs = [program_of(module)[0] for module in (Layer(), Layer(), Apart())]
    qkv, gate_up = ("q.weight", "k.weight", "v.weight"), ("gate.weight", "up.weight")
    assert agreed(programs[:2]) == {qkv, gate_up}
    assert agreed(programs) == {gate_up}
    found, reasons = rewritten(programs[0], FuseLinears(agreed(programs)))
    assert shapes(found, torch.ops.aten.linear.default)[:3] == [[WIDTH, WIDTH], [32, WIDTH], [32, WIDTH]]
    assert reasons["linear-fusion"][0] == "another method that reads these weights does not fuse them"
