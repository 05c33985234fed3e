"""The line of a check that says what quantized weights cost; it never decides the check."""

from __future__ import annotations

import json
import math

import pytest
import torch
from eager_program import EagerProgram, small_plan

from flashpte.export.check.accuracy import Accuracy, compare_with_dense
from flashpte.export.check.check_program import check_program, named_weights
from flashpte.export.check.eager_model import dense_model, eager_pair, rebuild
from flashpte.export.weights.recipe import Recipe

LABEL = "accuracy against the unquantized model"


def test_equal_logits():
    logits = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    assert compare_with_dense(logits, logits) == Accuracy(0.0, 0.0, 1.0, 300)


def test_the_numbers():
    dense = torch.tensor([[0.0, math.log(3.0)], [0.0, 1.0]])
    quantized = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    found = compare_with_dense(quantized, dense)
    assert found.relative_error == pytest.approx(math.log(3) / math.sqrt(math.log(3) ** 2 + 1))
    # sum p log(p / q) with p = (1/4, 3/4) and q = (1/2, 1/2), over two positions
    assert found.divergence == pytest.approx((0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2)
    assert (found.agreement, found.positions) == (0.5, 2)


def checked(plan, dense=True):
    manifest = json.loads(json.dumps(plan.manifest()))
    model = rebuild(manifest, None)
    own, reference = eager_pair(model)
    weights = {name: tensor.clone() for name, tensor in named_weights(plan.model).items()}
    made = (lambda: dense_model(manifest, None, None, reference)) if dense is True else dense
    program = EagerProgram(plan)
    return check_program(program, own, reference, weights=weights, model_weights=named_weights(model), dense=made)


def quantized(**options):
    return small_plan(max_seq_len=40, layers=2, verify_window=3, **options)


def test_a_check_of_quantized_weights_says_what_they_cost():
    """More bits cost less, and a check passes whatever they cost: it compares the program with its own weights."""
    found = {}
    for bits in ("4w", "8w"):
        report = checked(quantized(qlinear=bits, qhead=bits, qembedding="8w"))
        assert report.passed, report.lines()
        found[bits] = report.accuracy
        (line,) = (line for line in report.lines() if line.startswith(LABEL))
        assert f"of {found[bits].positions} positions (not a condition)" in line
        assert report.to_dict()["accuracy"]["divergence"] == found[bits].divergence
    assert 0 < found["8w"].divergence < found["4w"].divergence
    assert found["8w"].relative_error < 0.03 < found["4w"].relative_error


def test_a_dense_model_has_no_such_line():
    report = checked(quantized(), dense=None)
    assert not any(LABEL in line for line in report.lines())
    assert report.to_dict()["accuracy"] is None


def test_weights_that_are_not_at_hand():
    report = checked(quantized(qlinear="4w"), dense="the checkpoint was already quantized")
    assert report.passed
    assert f"{LABEL}: not measured, the checkpoint was already quantized" in report.lines()


def test_the_dense_recipe():
    recipe = Recipe("bfloat16", (("a", "int8"), ("b", "float32"), ("c", "int4-g32-hqq")))
    assert recipe.quantizes
    assert recipe.dense().rules == (("a", "bfloat16"), ("b", "float32"), ("c", "bfloat16"))
    assert not recipe.dense().quantizes
