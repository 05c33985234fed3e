"""The pass alone, on hand-written graphs."""

import operator

import torch
from torch.fx import Graph, GraphModule

from flashpte.export.lowering.cross_compile.restore_views import RestoreViews

aten = torch.ops.aten


def run(build):
    graph = Graph()
    graph.output(build(graph))
    module = GraphModule({}, graph)
    changed = RestoreViews()(module).modified
    return [node.target for node in module.graph.nodes if node.op == "call_function"], changed


def test_a_chain_of_copies_becomes_views():
    def build(graph):
        x = graph.placeholder("x")
        x = graph.call_function(aten.transpose_copy.int, (x, 1, 2))
        x = graph.call_function(aten.unsqueeze_copy.default, (x, 0))
        x = graph.call_function(aten.expand_copy.default, (x, [4, -1, -1, -1]))
        x = graph.call_function(aten.view_copy.default, (x, [4, -1]))
        return graph.call_function(aten.sin.default, (x,))

    targets, changed = run(build)
    assert changed
    assert targets == [
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.reshape.default,
        aten.sin.default,
    ]


def test_a_view_that_leaves_the_program_stays_a_copy():
    def build(graph):
        x = graph.placeholder("x")
        x = graph.call_function(aten.transpose_copy.int, (x, 1, 2))
        return graph.call_function(aten.unsqueeze_copy.default, (x, 0))

    targets, changed = run(build)
    assert not changed
    assert targets == [aten.transpose_copy.int, aten.unsqueeze_copy.default]


def test_only_the_branch_that_leaves_keeps_its_copies():
    def build(graph):
        x = graph.placeholder("x")
        left = graph.call_function(aten.transpose_copy.int, (x, 1, 2))
        inner = graph.call_function(aten.transpose_copy.int, (x, 0, 1))
        return left, graph.call_function(aten.sin.default, (inner,))

    assert run(build)[0] == [aten.transpose_copy.int, aten.transpose.int, aten.sin.default]


def test_a_tensor_that_is_written_to_stays_a_copy():
    def build(graph):
        x = graph.placeholder("x")
        copy = graph.call_function(aten.transpose_copy.int, (x, 1, 2))
        graph.call_function(aten.add_.Tensor, (copy, 1))
        return graph.call_function(aten.sin.default, (copy,))

    assert aten.transpose_copy.int in run(build)[0]


def test_nothing_to_do():
    targets, changed = run(lambda graph: graph.call_function(aten.sin.default, (graph.placeholder("x"),)))
    assert (targets, changed) == ([aten.sin.default], False)


def test_several_views_at_once():
    def build(graph, leave):
        x = graph.placeholder("x")
        parts = graph.call_function(aten.unbind_copy.int, (x, 1))
        first, second = (graph.call_function(operator.getitem, (parts, i)) for i in range(2))
        return graph.call_function(aten.add.Tensor, (first, second)) if not leave else (first, second)

    assert run(lambda graph: build(graph, leave=False))[0][0] == aten.unbind.int
    assert run(lambda graph: build(graph, leave=True))[0][0] == aten.unbind_copy.int
