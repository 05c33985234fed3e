"""Compilers' errors become one line that says what to write instead."""

import re

import pytest
import torch

from flashpte.export.common.errors import ExportError
from flashpte.export.lowering import lower
from flashpte.export.lowering.explain import explain, origin


@pytest.mark.parametrize(
    ("error", "package", "said"),
    [
        (
            RuntimeError("Attempting to use FunctionalTensor on its own. Instead, ..."),
            "pte",
            "a branch or a loop body .* as a tensor, or lower to .pt2$",
        ),
        (
            RuntimeError("Constant cache.k is mutated in the forward method. Pls register it as buffer"),
            "pte",
            "writes to cache.k, a tensor that is not a buffer: .* strict=True$",
        ),
        (
            RuntimeError("Method f missing fallback kernels (2 total):\n  - aten::a\n  - aten::b.out\nPlease add them"),
            "pte",
            r"no kernel for aten::a, aten::b.out: write it with other operators, or lower to \.pt2$",
        ),
        (AssertionError("expected compiled_fn to be GraphModule, got X"), "pt2", "strict=True$"),
        (ValueError("something else"), "pte", None),
    ],
)
def test_known_errors(error, package, said):
    meaning = explain([ValueError("outer"), error], package)
    if said is None:
        assert meaning is None
    else:
        assert meaning is not None
        assert re.search(said, meaning)


def test_an_error_without_a_text_says_where_it_came_from(tmp_path, monkeypatch):
    from flashpte.export.lowering import api

    def fail(*args):
        raise AssertionError

    monkeypatch.setattr(api, "write_pte", fail)
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(2),))
    said = r"^compiling failed: AssertionError: no message, raised in fail \(.*test_explain"
    with pytest.raises(ExportError, match=said):
        lower({"forward": program}, output_dir=tmp_path / "out", arch="sm_90")
    assert origin(AssertionError()) == "no message"


class Branches(torch.nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x + 1.5, lambda x: x * 2, (x,))


@pytest.mark.lowering
def test_a_number_in_a_branch(tmp_path):
    program = torch.export.export(Branches(), (torch.ones(4),))
    with pytest.raises(ExportError, match="a branch or a loop body") as caught:
        lower({"forward": program}, output_dir=tmp_path / "out", arch="sm_90")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
