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
    """Fusing products and giving them kernels changes nothing. The tied head counts, the embedding's rows do not."""
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


def test_of_one_expert_of_many():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.Parameter(torch.randn(8, 32, 16))

        def forward(self, x, number):
            return F.linear(x, self.weights[3])

    found = product_work(torch.export.export(Experts(), (torch.randn(2, 16), torch.tensor(1))))
    assert found == {"weight_bytes": 4 * 32 * 16, "flop_per_call": 2 * 2 * 32 * 16, "flop_per_token": 0}
