"""The least work of a program's products."""

import pytest
import torch
import torch.nn.functional as F
from torch.export import Dim

from flashpte.export.pipeline.fused_products import rewrite_products
from flashpte.export.pipeline.work import product_work
from flashpte.passes import replace_linear

WIDTH, INNER, VOCABULARY = 64, 96, 256


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = torch.nn.Linear(WIDTH, 128, bias=False), torch.nn.Linear(WIDTH, 32, bias=False)
        self.gate, self.up = (torch.nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(INNER, WIDTH)
        self.embedding = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH))

    def forward(self, tokens):
        x = self.embedding[tokens]
        y = x + 1
        both = torch.cat([self.q(y), self.k(y)], -1).sum()
        x = x + self.down(F.silu(self.gate(x)) * self.up(x)) + both
        return x[:, -1:] @ self.embedding.t()


WEIGHTS = WIDTH * (128 + 32 + 2 * INNER) + INNER * WIDTH
HEAD = WIDTH * VOCABULARY
BIAS = WIDTH


def program(rows: int, dynamic: bool = False):
    torch.manual_seed(0)
    model = Layer().bfloat16().eval()
    shapes = ({1: Dim("tokens", min=2, max=512)},) if dynamic else None
    with torch.no_grad():
        return torch.export.export(model, (torch.zeros(1, rows, dtype=torch.int64),), dynamic_shapes=shapes)


@pytest.mark.parametrize("rows", [1, 4])
def test_of_few_rows(rows):
    """Rewriting changes nothing. The tied head is counted, the embedding lookup is not."""
    expected = {
        "weight_bytes": 2 * (WEIGHTS + HEAD + BIAS),
        "flop_per_call": 2 * (rows * WEIGHTS + HEAD),
        "flop_per_token": 0,
    }
    original = program(rows)
    rewritten, reports, _ = rewrite_products({"decode": original})
    assert any(outcome.applied for outcome in reports["decode"]["gated"].outcomes)
    assert product_work(original) == product_work(rewritten["decode"]) == expected
    assert product_work(original.run_decompositions()) == expected


def test_of_dynamic_rows():
    found = product_work(program(8, dynamic=True))
    assert found == {
        "weight_bytes": 2 * (WEIGHTS + HEAD + BIAS),
        "flop_per_call": 2 * HEAD,
        "flop_per_token": 2 * WEIGHTS,
    }


def test_of_packed_weights():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = torch.nn.Sequential(torch.nn.Linear(128, 64, bias=False)).bfloat16()
    quantize_(model, Int8WeightOnlyConfig())
    with torch.no_grad():
        packed, report = replace_linear(torch.export.export(model, (torch.randn(2, 128).bfloat16(),)))
    assert all(outcome.applied for outcome in report.outcomes)
    found = product_work(packed)
    assert found["flop_per_call"] == 2 * 2 * 128 * 64
    assert 128 * 64 < found["weight_bytes"] < 1.1 * 128 * 64


class Forms(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.w, self.e = torch.nn.Parameter(torch.randn(32, 16)), torch.nn.Parameter(torch.randn(8, 16, 24))
        self.register_buffer("cache", torch.zeros(64, 16))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def twice_the_same_part(m, x):
    return F.linear(x, m.w[:16]) + F.linear(x + 1, m.w[:16])


def all_and_a_part(m, x):
    return F.linear(x, m.w)[:, :16] + F.linear(x + 1, m.w[:16])


def parts(m, x):
    return sum(F.linear(x, part) for part in m.w.split(16))


def experts(m, x):
    return x[None] @ m.e


def one_expert(m, x):
    return x @ m.e[3]


def computed(m, x):
    return F.linear(x, (x.new_ones(64, 16) * x.sum())[:32])


def written_buffer(m, x):
    m.cache[:3] = x
    return torch.softmax(x @ m.cache.t(), -1) @ m.cache


@pytest.mark.parametrize(
    ("function", "weights", "flop"),
    [
        (twice_the_same_part, 16 * 16, 2 * 2 * 3 * 16 * 16),
        (all_and_a_part, 32 * 16, 2 * 3 * 16 * (32 + 16)),
        (parts, 32 * 16, 2 * 3 * 16 * 32),
        (experts, 8 * 16 * 24, 2 * 8 * 3 * 16 * 24),
        (one_expert, 16 * 24, 2 * 3 * 16 * 24),
        (computed, 0, 0),
        (written_buffer, 0, 0),
    ],
)
def test_forms_of_weights(function, weights, flop):
    with torch.no_grad():
        found = product_work(torch.export.export(Forms(function), (torch.randn(3, 16),)))
    assert found == {"weight_bytes": 4 * weights, "flop_per_call": flop, "flop_per_token": 0}


def test_a_part_of_a_dynamic_size():
    shapes = {"x": {1: Dim("columns", min=2, max=16)}}
    with torch.no_grad():
        model = Forms(lambda m, x: x @ m.w[: x.shape[1], :16])
        found = product_work(torch.export.export(model, (torch.randn(3, 5),), dynamic_shapes=shapes))
    assert found == {"weight_bytes": 4 * 32 * 16, "flop_per_call": 2 * 3 * 5 * 16, "flop_per_token": 0}


def test_several_rows_of_a_token():
    shapes = {"x": {0: Dim("tokens", min=2, max=512)}}
    with torch.no_grad():
        model = Forms(lambda m, x: F.linear(x.reshape(-1, 16), m.w))
        found = product_work(torch.export.export(model, (torch.randn(5, 4, 16),), dynamic_shapes=shapes))
    assert found == {"weight_bytes": 4 * 32 * 16, "flop_per_call": 0, "flop_per_token": 2 * 4 * 16 * 32}
