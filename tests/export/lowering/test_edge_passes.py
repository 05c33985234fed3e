"""A pass that would change nothing is skipped; one that finds something runs, and in branches too."""

import pytest
import torch
from executorch.exir.passes.normalize_transpose_pass import NormalizeTransposePass
from executorch.exir.passes.replace_broken_ops_with_function_ops_pass import ReplaceBrokenOpsWithFunctionalOpsPass

from flashpte.export.lowering.cross_compile import edge_passes

aten = torch.ops.aten
PASSES = {NormalizeTransposePass: edge_passes.is_transpose, ReplaceBrokenOpsWithFunctionalOpsPass: edge_passes.is_view}


def traced(function):
    class Net(torch.nn.Module):
        def forward(self, x):
            return function(x)

    return torch.export.export(Net(), (torch.randn(3, 4),)).graph_module


def targets(graph_module):
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("kind", PASSES)
def test_a_program_without_the_operators_stays(kind):
    calls = []
    call = edge_passes.only_with(PASSES[kind], lambda self, graph_module: calls.append(graph_module))
    graph_module = traced(lambda x: torch.relu(x) @ x.new_ones(4, 3) + 1)
    result = call(kind(), graph_module)
    assert (result.graph_module, result.modified, calls) == (graph_module, False, [])


@pytest.mark.parametrize(
    ("kind", "function", "before", "after"),
    [
        (NormalizeTransposePass, lambda x: aten.t(x) + 1, aten.t.default, aten.t_copy.default),
        (ReplaceBrokenOpsWithFunctionalOpsPass, lambda x: x.unsqueeze(0) + 1, aten.unsqueeze.default, None),
    ],
)
def test_a_program_with_one_is_rewritten_as_ever(kind, function, before, after):
    graph_module = traced(function)
    assert before in targets(graph_module)
    changed = edge_passes.only_with(PASSES[kind], kind.call)(kind(), graph_module).graph_module
    assert targets(changed) == targets(kind()(traced(function)).graph_module)
    assert before not in targets(changed)
    assert after is None or after in targets(changed)


def test_an_operator_in_a_branch_counts():
    graph_module = traced(lambda x: torch.cond(x.sum() > 0, lambda x: x.unsqueeze(0) + 1, lambda x: x[None] * 2, (x,)))
    calls = []
    edge_passes.only_with(edge_passes.is_view, lambda self, given: calls.append(given))(None, graph_module)
    assert calls == [graph_module]
