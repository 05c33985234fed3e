"""``topk`` before lowering: the same values and indices, whatever the values are."""

import pytest
import torch

from flashpte.export.lowering.prepare import prepare_pte
from flashpte.export.lowering.top_k import MOST_ELEMENTS

topk = torch.ops.aten.topk.default


class TopK(torch.nn.Module):
    def __init__(self, k, dim=-1, largest=True, only=None):
        super().__init__()
        self.k, self.dim, self.largest, self.only = k, dim, largest, only

    def forward(self, x):
        found = torch.topk(x * 1, self.k, dim=self.dim, largest=self.largest, sorted=False)
        return found if self.only is None else found[self.only] + 1


def prepared(module, *given, **options):
    program = torch.export.export(module, given, **options)
    return prepare_pte(program), program


def has_top_k(program):
    return any(node.target is topk for node in program.graph.nodes)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(5, 8, generator=torch.Generator().manual_seed(0)),
        torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)).bfloat16(),
        torch.arange(40).view(5, 8) % 7 * 31 % 11 + torch.arange(8) * 100,
        torch.randn(8, generator=torch.Generator().manual_seed(2)),
    ],
    ids=["float32", "bfloat16", "int64", "one dimension"],
)
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_the_first_elements_in_order(x, k, largest):
    found, _ = prepared(TopK(k, largest=largest), x)
    assert not has_top_k(found)
    values, indices = found.module()(x)
    expected = torch.sort(x, dim=-1, descending=largest, stable=True)
    assert torch.equal(values, expected.values[..., :k])
    assert torch.equal(indices, expected.indices[..., :k])


def test_another_dimension():
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    found, program = prepared(TopK(2, dim=1), x)
    for mine, theirs in zip(found.module()(x), program.module()(x), strict=True):
        assert torch.equal(mine, theirs)


def test_equal_and_infinite_elements_have_different_indices():
    x = torch.tensor([[0.0, float("-inf"), 0.0, float("-inf")], [float("inf")] * 4])
    values, indices = prepared(TopK(3), x)[0].module()(x)
    assert indices.tolist() == [[0, 2, 1], [0, 1, 2]]
    assert torch.equal(values, x.gather(-1, indices))


@pytest.mark.parametrize("only", [0, 1])
def test_one_of_the_results(only):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    found, program = prepared(TopK(2, only=only), x)
    assert torch.equal(found.module()(x), program.module()(x))


def test_dynamic_rows():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    found, _ = prepared(TopK(2), x, dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2, max=64)}})
    assert not has_top_k(found)
    x = torch.randn(33, 8)
    assert torch.equal(found.module()(x)[1], x.topk(2).indices)


def test_a_vocabulary_stays():
    found, _ = prepared(TopK(2), torch.randn(1, MOST_ELEMENTS + 1))
    assert has_top_k(found)
