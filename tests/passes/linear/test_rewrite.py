"""Products with quantized weights become one operator each, which computes what the program computed."""

from __future__ import annotations

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

from flashpte.passes import replace_linear, replace_sdpa

K, HIDDEN = 128, 192
OPERATOR = torch.ops.flashpte.quantized_linear.default


class Block(torch.nn.Module):
    """A gated layer with a bias, a normalization that stays, and a head without a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = torch.nn.Linear(K, HIDDEN)
        self.up = torch.nn.Linear(K, HIDDEN, bias=False)
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.head = torch.nn.Linear(HIDDEN, 80, bias=False)

    def forward(self, x):
        return self.head(self.norm(torch.sigmoid(self.gate(x)) * self.up(x)))


def int4():
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64))


def quantized(config, module=None, only=None):
    module = (Block() if module is None else module).bfloat16().eval()
    keep = (lambda layer, name: isinstance(layer, torch.nn.Linear) and name in only) if only else None
    quantize_(module, config, keep)
    rows = torch.export.Dim("rows", min=2, max=50)
    return torch.export.export(module, (torch.randn(2, 7, K).bfloat16(),), dynamic_shapes=({1: rows},))


def check(new, program, x):
    """The results differ by the rounding of bfloat16: of products, and of weights that the program rounded."""
    results = [module.module()(x) for module in (new, program)]
    for out, expected in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
        assert (out.dtype, out.shape) == (expected.dtype, expected.shape)
        assert (out - expected).float().norm() <= 2**-7 * expected.float().norm()


def calls(program, target=OPERATOR):
    return [node for node in program.graph.nodes if node.target is target]


@pytest.mark.parametrize("config", [int4, Int8WeightOnlyConfig])
def test_every_product_is_replaced(config):
    program = quantized(config())
    new, report = replace_linear(program, fuse=False)
    assert [outcome.applied for outcome in report.outcomes] == [True] * 3
    assert len(calls(new)) == 3
    assert not calls(program)
    x = torch.randn(2, 20, K).bfloat16()
    check(new, program, x)
    # The packed weights are all that is left of the weights.
    assert all(tensor.numel() < 2 * HIDDEN * 3 for tensor in new.state_dict.values() if tensor.is_floating_point())
    packed = {name: tensor.dtype for name, tensor in new.state_dict.items() if name.endswith("_packed")}
    dtype = torch.int16 if config is int4 else torch.int8
    assert packed == {f"{name}.weight_packed": dtype for name in ("gate", "up", "head")}
    new.validate()


def test_the_report_gives_the_format():
    _, report = replace_linear(quantized(int4()))
    reasons = {outcome.module_path: outcome.decision.reason for outcome in report.outcomes}
    assert reasons == {
        "gate": "4-bit weight [192, 128], symmetric, a scale per 64 columns",
        "up": "4-bit weight [192, 128], symmetric, a scale per 64 columns",
        "head": "4-bit weight [80, 192], symmetric, a scale per 64 columns",
    }


def test_what_is_not_quantized_stays():
    program = quantized(int4(), only=("up",))
    new, report = replace_linear(program, fuse=False)
    assert {outcome.module_path: outcome.applied for outcome in report.outcomes} == {
        "gate": False,
        "up": True,
        "head": False,
    }
    assert report.outcomes[0].decision.reason == "the weight stays as it is: it is bfloat16, not quantized"
    assert {"gate.weight", "head.weight"} <= new.state_dict.keys()
    assert torch.equal(new.state_dict["gate.weight"], program.state_dict["gate.weight"])


def test_a_program_without_quantized_weights_keeps_its_graph():
    program = torch.export.export(Block().bfloat16().eval(), (torch.randn(1, 7, K).bfloat16(),))
    new, report = replace_linear(program, fuse=False)
    assert not any(outcome.applied for outcome in report.outcomes)
    assert [str(node) for node in new.graph.nodes] == [str(node) for node in program.graph.nodes]
    assert new.state_dict.keys() == program.state_dict.keys()


class Nibbles(torch.nn.Module):
    """A weight of two codes per byte, unpacked in the graph, and what is done with it."""

    def __init__(self, use):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("packed", torch.randint(256, (48, K // 2), generator=generator, dtype=torch.uint8))
        self.register_buffer("scales", (torch.rand(48, 2, 1, generator=generator) + 0.5).bfloat16())
        self.use = use

    def weight(self, scales):
        codes = torch.stack((self.packed & 15, self.packed >> 4), -1).view(48, 2, 64)
        return ((codes.bfloat16() - 8) * scales).view(48, K)

    def forward(self, x):
        return self.use(self, x)


USES = {
    "linear": lambda self, x: torch.nn.functional.linear(x, self.weight(self.scales)),
    "matmul": lambda self, x: x @ self.weight(self.scales).t(),
    "the same weight twice": lambda self, x: (x @ self.weight(self.scales).t()) @ self.weight(self.scales),
    "also returned": lambda self, x: (x @ self.weight(self.scales).t(), self.weight(self.scales)),
    "rows of a matrix": lambda self, x: torch.mm(x[0], self.weight(self.scales).t()),
    "a vector": lambda self, x: x[0, 0] @ self.weight(self.scales).t(),
}


@pytest.mark.parametrize("use", USES)
def test_nibbles_in_the_graph(use):
    program = torch.export.export(Nibbles(USES[use]), (torch.randn(2, 7, K).bfloat16(),))
    new, report = replace_linear(program, fuse=False)
    assert any(outcome.applied for outcome in report.outcomes)
    x = torch.randn(2, 7, K).bfloat16()
    check(new, program, x)
    # As the second factor of another product it has other rows, 48 of which are no group.
    assert ("packed" in new.state_dict) == (use in ("also returned", "the same weight twice"))


LEFT = {
    "a scale computed at run time": (
        lambda self, x: torch.nn.functional.linear(x, self.weight(self.scales * x.amax())),
        "its codes, scale or zero point are not known when the program is compiled",
    ),
    "columns of K that are no group": (
        lambda self, x: x[..., :48] @ self.weight(self.scales).t()[:48],
        "the weight stays as it is: its scales are not shared by groups of 32, 64 or 128 of 48 columns",
    ),
    "another dtype": (
        lambda self, x: torch.nn.functional.linear(x.double(), self.weight(self.scales).double()),
        "x is torch.float64 and the result torch.float64",
    ),
}


@pytest.mark.parametrize("use", LEFT)
def test_left_alone(use):
    make, reason = LEFT[use]
    program = torch.export.export(Nibbles(make), (torch.randn(2, 7, K).bfloat16(),))
    new, report = replace_linear(program, fuse=False)
    assert [outcome.decision.reason for outcome in report.outcomes] == [reason]
    x = torch.randn(2, 7, K).bfloat16()
    assert torch.equal(new.module()(x), program.module()(x))


def test_a_weight_that_the_program_writes_stays():
    class Written(Nibbles):
        def forward(self, x):
            out = torch.nn.functional.linear(x, self.weight(self.scales))
            self.scales.mul_(2)
            return out

    program = torch.export.export(Written(None), (torch.randn(2, 7, K).bfloat16(),))
    _, report = replace_linear(program, fuse=False)
    assert [outcome.decision.reason for outcome in report.outcomes] == [
        "its codes, scale or zero point are not known when the program is compiled"
    ]


def test_attention_after_it():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(K, 3 * K)

        def forward(self, x):
            q, k, v = self.qkv(x).view(2, -1, 3, 4, 32).permute(2, 0, 3, 1, 4)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    program = quantized(int4(), Attention())
    new, report = replace_sdpa(replace_linear(program)[0])
    assert len(report.replaced) == 1
    assert len(calls(new)) == 1
    x = torch.randn(2, 9, K).bfloat16()
    check(new, program, x)
