"""Conditions that PyTorch cannot prove are evaluated for every length: they hold, or the module is refused."""

import pytest
import torch
from torch._dynamo.exc import UserError

from flashpte.export.models.tracing import export_for_lengths

DIMS = {"x": {0: None}, "y": {0: None}}


class Asks(torch.nn.Module):
    """Asks something about the length; a branch on the answer would make a guard."""

    def __init__(self, question):
        super().__init__()
        self.question = question

    def forward(self, x, y):
        return x + y if self.question(x.shape[0]) else x - y


def traced(question, lengths=range(2, 17)):
    args = (torch.randn(5, 4), torch.randn(5, 4))
    return export_for_lengths(Asks(question), args, "rows", lengths, DIMS)


def test_a_condition_that_always_holds_leaves_nothing_behind():
    program = traced(lambda rows: rows * torch.sym_min(48, 48 * rows) == 48 * rows)
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default)
    assert not [node for node in program.graph.nodes if node.op == "call_function" and "sym" in str(node.target)]
    for rows in (2, 16):
        x, y = torch.randn(2, rows, 4)
        assert torch.equal(program.module()(x, y), x + y)


@pytest.mark.parametrize("question", [lambda rows: rows < 9, lambda rows: rows * torch.sym_min(9, rows) == rows * rows])
def test_a_condition_that_fails_for_one_length_is_refused(question):
    with pytest.raises(UserError, match="rows"):
        traced(question, range(2, 11))
    assert traced(question, range(2, 9)).range_constraints


def test_a_condition_on_data_is_not_about_the_length():
    class Reads(torch.nn.Module):
        def forward(self, x, y):
            count = y[0, 0].to(torch.int64).item()
            torch._check(count <= 8)
            return Asks(lambda rows: rows * torch.sym_min(48, 48 * rows) == 48 * rows)(x, y) * count

    with pytest.raises(UserError, match="rows"):
        export_for_lengths(Reads(), (torch.randn(5, 4), torch.ones(5, 4)), "rows", range(2, 9), DIMS)
