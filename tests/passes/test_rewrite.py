"""A rewrite from outside the project: the code of docs/adding-a-rewrite.md, run as its reader would run it."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from programs import qkv

from flashpte.passes import Decision, Refusal, Rewrite, default_rewrites, pipeline, rewrite_program

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-rewrite.md"


@pytest.fixture(scope="module")
def fold_one():
    """The class on that page."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names = {}
    exec(code, names)
    return names["FoldOne"]


class Scaled(torch.nn.Module):
    def forward(self, q, k, v, number):
        out = torch.nn.functional.scaled_dot_product_attention(q * 1, k * 2, v)
        return out * 1.0, (number * 1.0), (number + 1) * 1


@pytest.fixture(scope="module")
def program():
    return torch.export.export(Scaled(), (*qkv(20), torch.arange(3)))


ARGS = (*qkv(20, seed=1), torch.arange(5, 8))


def targets(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_it_runs_beside_the_projects_own(program, fold_one):
    before = targets(program)
    new, reports = rewrite_program(program, (fold_one(), *default_rewrites()))
    assert targets(program) == before
    assert list(reports) == ["fold_one", "attention"]
    outcomes = reports["fold_one"].outcomes
    assert [outcome.applied for outcome in outcomes] == [True, False, True, False, True]
    reasons = [outcome.decision.reason for outcome in outcomes]
    assert reasons[1] == "the factor is 2"
    assert reasons[3] == "the product is torch.float32, its factor torch.int64"
    assert [entry.op for entry in reports["attention"].nodes] == ["flashpte::sdpa_prefill"]
    assert targets(new).count("aten.mul.Tensor") == 2
    for expected, out in zip(program.module()(*ARGS), new.module()(*ARGS), strict=True):
        assert out.dtype == expected.dtype
        torch.testing.assert_close(out, expected)
    assert [entry["applied"] for entry in reports["fold_one"].to_dict()["nodes"]] == [o.applied for o in outcomes]


class Point:
    def __init__(self, name, made):
        self.name, self.value, self._made = name, f"package:{name}", made

    def load(self):
        return self._made


def installed(monkeypatch, *points):
    def entry_points(group):
        assert group == "flashpte.rewrites"
        return points

    monkeypatch.setattr(pipeline, "entry_points", entry_points)


def test_an_entry_point_makes_it_a_default(program, fold_one, monkeypatch):
    installed(monkeypatch, Point("fold", fold_one))
    assert [rewrite.name for rewrite in default_rewrites()] == ["attention", "fold_one"]
    _, reports = rewrite_program(program)
    assert list(reports) == ["attention", "fold_one"]


def test_wrong_entry_points(fold_one, monkeypatch):
    installed(monkeypatch, Point("dict", dict))
    with pytest.raises(TypeError, match=r"entry point dict = package:dict of flashpte.rewrites is no"):
        default_rewrites()
    installed(monkeypatch, Point("a", fold_one), Point("b", fold_one))
    with pytest.raises(ValueError, match="2 rewrites are named 'fold_one'"):
        default_rewrites()


def test_its_logger_has_times_and_graphs(program, fold_one, caplog):
    with caplog.at_level(logging.DEBUG, logger="flashpte.rewrite.fold_one"):
        rewrite_program(program, (fold_one(),))
    before, after, line = [record.getMessage() for record in caplog.records if record.name.startswith("flashpte")]
    assert before.startswith("before fold_one:")
    assert before.count("aten.mul") == 5
    assert after.startswith("after fold_one:")
    assert after.count("aten.mul") == 2
    assert re.fullmatch(r"fold_one: 3 of 5 matches rewritten in \d+\.\d{3} s", line)


def test_deciding_changes_nothing(program):
    class OnlyDecides(Rewrite):
        name = "only_decides"

        def match(self, node, scope):
            return node if "mul" in str(node.target) else None

        def decide(self, match, scope):
            return Refusal("it only looks")

        def apply(self, match, decision: Decision, scope):
            raise AssertionError("a refusal is not applied")

    new, reports = rewrite_program(program, (OnlyDecides(),))
    assert targets(new) == targets(program)
    assert [outcome.result for outcome in reports["only_decides"].outcomes] == [None] * 5


def test_a_declined_attention_leaves_the_graph_as_it_was():
    """Views and masks planned for it are not in the program."""
    q, k, v = (tensor.double() for tensor in qkv(20))

    class Masked(torch.nn.Module):
        def forward(self, q, k, v, mask):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    program = torch.export.export(Masked(), (q[0], k[0], v[0], torch.ones(20, 64, dtype=torch.bool).tril()))
    new, reports = rewrite_program(program)
    (entry,) = reports["attention"].nodes
    assert entry.op is None
    assert targets(new) == targets(program)
