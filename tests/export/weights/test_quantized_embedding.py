"""Embeddings of 4 and 8 bits: rows, factors, dtypes, and output projections that read the same codes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextScaledWordEmbedding

from flashpte.export.common.errors import ExportError
from flashpte.export.weights.formats import FORMATS
from flashpte.export.weights.quantized_embedding import QuantizedEmbedding

N, K, SCALE = 50, 96, 8.0
NAMES = ["int4-g32", "int8", "int8-g64", "int4-g32-hqq", "int8-g32-z-f16"]


def table():
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0))


def embedding(name, dtype=torch.bfloat16, scaled=False):
    dense = Gemma4TextScaledWordEmbedding(N, K, 0, SCALE) if scaled else nn.Embedding(N, K)
    holder = nn.Sequential(dense)
    FORMATS[name].adapt(holder, "0.weight")
    holder.load_state_dict(FORMATS[name].encode("0.weight", table()), assign=True)
    module = holder[0]
    assert isinstance(module, QuantizedEmbedding)
    module.dtype = dtype
    return module.eval()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_the_dequantized_table(name, scaled):
    module, ids = embedding(name, scaled=scaled), torch.tensor([[3, 49, 3], [0, 17, 16]])
    dense = Gemma4TextScaledWordEmbedding(N, K, None, SCALE) if scaled else nn.Embedding(N, K)
    dense.weight.data = module.dequantized().bfloat16()
    assert torch.equal(module(ids), dense(ids))
    assert torch.equal(module.weight, dense.weight)
    # int4 is half a step of 7.5 per group off, int8 of 127.5
    assert (module.dequantized() - table()).norm() < (0.12 if name.startswith("int4") else 0.01) * table().norm()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_exported_embedding_calls_the_kernel(name, scaled):
    module, ids = embedding(name, scaled=scaled), torch.tensor([[3, 49, 3]])
    program = torch.export.export(module, (ids,))
    calls = [str(node.target) for node in program.graph.nodes if "flashpte" in str(node.target)]
    assert calls == ["flashpte.quantized_embedding.default"]
    assert torch.equal(program.module()(ids), module(ids))
    assert module(ids).dtype == torch.bfloat16


def test_the_dtype_follows_the_module():
    module, ids = embedding("int8", torch.float16, scaled=True), torch.tensor([5])
    assert module(ids).dtype == torch.float16
    wide = copy.deepcopy(module).to(torch.float64)
    assert wide(ids).dtype == torch.float64
    assert torch.equal(wide(ids).float(), SCALE * module.dequantized()[ids])
    assert module(ids).dtype == torch.float16


@pytest.mark.parametrize("name", NAMES)
def test_a_projection_reads_the_same_codes_without_the_factor(name):
    class Project(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.table = module

        def forward(self, hidden):
            return self.table.project(hidden)

    module, hidden = Project(embedding(name, scaled=True)), torch.randn(2, K)
    expected = hidden @ module.table.dequantized().T
    torch.testing.assert_close(module(hidden), expected)
    program = torch.export.export(module.eval(), (hidden,))
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == [
        "flashpte.quantized_linear.default"
    ]
    torch.testing.assert_close(program.module()(hidden), expected)


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 1


@pytest.mark.parametrize("dense", [Shifted(N, K), nn.Embedding(N, K, max_norm=1.0)])
def test_an_embedding_that_computes_more_is_refused(dense):
    with pytest.raises(ExportError, match=r"0\.weight: an embedding of type \w+ cannot have 8 bits"):
        FORMATS["int8"].adapt(nn.Sequential(dense), "0.weight")
