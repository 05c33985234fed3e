"""Embeddings with quantized tables become one operator, which reads the packed rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

from flashpte.passes import replace_linear

N, K = 48, 128
LOOKUP, LINEAR = torch.ops.flashpte.quantized_embedding.default, torch.ops.flashpte.quantized_linear.default


class Table(nn.Module):
    """A table of signed codes with a scale per 32 columns, dequantized in the graph."""

    def __init__(self, bits=4, zeros=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        low, high = -(1 << (bits - 1)), 1 << (bits - 1)
        codes = torch.randint(low, high, (N, K), generator=generator, dtype=torch.int8)
        codes[0, :2] = torch.tensor([low, high - 1])
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.rand(N, K // 32, generator=generator) + 0.1)
        self.zeros = zeros

    def weight(self):
        grouped = self.codes.view(N, -1, 32).float()
        grouped = grouped - 3 if self.zeros else grouped
        return (grouped * self.scales[..., None]).view(N, K)

    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight())


def targets(program):
    return [node.target for node in program.graph.nodes if node.target in (LOOKUP, LINEAR)]


def exported(module, dtype=torch.int64):
    rows = torch.export.Dim("rows", min=2, max=50)
    return torch.export.export(module.eval(), (torch.zeros(2, 7, dtype=dtype),), dynamic_shapes=({1: rows},))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("bits", "zeros"), [(4, False), (4, True), (8, False)])
def test_a_lookup_is_replaced(bits, zeros, dtype):
    program = exported(Table(bits, zeros), dtype)
    new, report = replace_linear(program)
    assert targets(new) == [LOOKUP]
    (outcome,) = report.outcomes
    kind = "with zero points" if zeros else "symmetric"
    assert outcome.decision.reason == f"{bits}-bit weight [48, 128], {kind}, a scale per 32 columns"
    ids = torch.tensor([[0, 47, 3], [5, 5, 1]], dtype=dtype)
    torch.testing.assert_close(new.module()(ids), program.module()(ids))
    assert sorted(new.state_dict) == ["codes_packed", "codes_scales", *(["codes_zeros"] if zeros else [])]


def test_the_factor_of_the_rows_stays_behind_the_lookup():
    class Scaled(Table):
        def forward(self, ids):
            return super().forward(ids) * 11.5

    program = exported(Scaled())
    new, _ = replace_linear(program)
    assert targets(new) == [LOOKUP]
    ids = torch.arange(48).view(2, 24)
    torch.testing.assert_close(new.module()(ids), program.module()(ids))


def test_a_tied_head_reads_the_same_packed_table():
    class Tied(Table):
        def forward(self, ids):
            return nn.functional.linear(super().forward(ids), self.weight())

    program = exported(Tied())
    new, _ = replace_linear(program)
    assert targets(new) == [LOOKUP, LINEAR]
    assert sorted(new.state_dict) == ["codes_packed", "codes_scales"]
    ids = torch.tensor([[0, 47, 3], [5, 5, 1]])
    torch.testing.assert_close(new.module()(ids), program.module()(ids), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "granularity", "reason"),
    [
        (torch.int4, PerGroup(32), "4-bit weight [48, 128], symmetric, a scale per 32 columns"),
        (torch.int8, PerAxis(0), "8-bit weight [48, 128], symmetric, a scale per 128 columns"),  # that is a row
    ],
    ids=["int4", "int8"],
)
def test_torchao(dtype, granularity, reason):
    module = nn.Sequential(nn.Embedding(N, K)).bfloat16()
    quantize_(module, IntxWeightOnlyConfig(dtype, granularity), lambda layer, name: isinstance(layer, nn.Embedding))
    program = exported(module)
    new, report = replace_linear(program)
    assert [outcome.decision.reason for outcome in report.outcomes] == [reason]
    assert targets(new) == [LOOKUP]
    ids = torch.tensor([[0, 47, 3], [5, 5, 1]])
    out, expected = new.module()(ids), program.module()(ids)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-9)


class Written(Table):
    def forward(self, ids):
        self.scales.mul_(1.0)
        return super().forward(ids)


class FromInput(Table):
    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight() * ids.sum())


class Uneven(Table):
    def weight(self):
        return super().weight() + torch.arange(K) * 0.01  # another offset for each column


@pytest.mark.parametrize(
    ("make", "reason"),
    [(Written, "not known"), (FromInput, "not known"), (Uneven, "the weight stays as it is")],
)
def test_what_stays(make, reason):
    program = exported(make())
    new, report = replace_linear(program)
    assert not targets(new)
    assert all(reason in outcome.decision.reason for outcome in report.outcomes)
    ids = torch.tensor([[0, 47, 3], [5, 5, 1]])
    torch.testing.assert_close(new.module()(ids), program.module()(ids))


def test_a_dense_embedding_is_not_reported():
    _, report = replace_linear(exported(nn.Sequential(nn.Embedding(N, K))))
    assert not report.outcomes
