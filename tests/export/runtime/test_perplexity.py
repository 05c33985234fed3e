"""Perplexity: windows, losses, and the methods of a program that give all logits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from eager_program import EagerProgram, small_plan

from flashpte.export.common.errors import ProgramError, UsageError
from flashpte.export.models.attention_interface import ATTENTION_NAME
from flashpte.export.runtime.language_model import LanguageModel
from flashpte.export.runtime.perplexity import measure, program_logits, program_window

VOCABULARY = 16


def test_a_model_that_knows_nothing_is_as_perplexed_as_it_has_tokens():
    found = measure([3] * 25, 10, lambda part: torch.zeros(len(part), VOCABULARY))
    assert found.value == pytest.approx(VOCABULARY)
    assert (found.predicted, found.tokens) == (9 + 9 + 4, 25)


def test_losses_are_those_of_the_next_token():
    tokens = [1, 5, 2, 9, 4, 4, 7]
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    windows = [tokens[:3], tokens[3:6]]  # the last token has none before it
    pairs = [(a, b) for part in windows for a, b in itertools.pairwise(part)]
    expected = -sum(float(table[a].double().log_softmax(0)[b]) for a, b in pairs) / len(pairs)
    found = measure(tokens, 3, lambda part: table[part])
    assert math.log(found.value) == pytest.approx(expected)
    assert found.predicted == 4


def test_long_windows_are_summed_in_pieces():
    tokens = torch.randint(0, VOCABULARY, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))
    losses = torch.nn.functional.cross_entropy(table[tokens[:-1]].double(), torch.tensor(tokens[1:]))
    assert math.log(measure(tokens, 1000, lambda part: table[part]).value) == pytest.approx(float(losses))


def test_texts_that_cannot_be_measured():
    for tokens, window in (([1], 4), ([1, 2, 3], 1)):
        with pytest.raises(UsageError, match="perplexity needs 2 tokens"):
            measure(tokens, window, lambda part: torch.zeros(len(part), VOCABULARY))
    with pytest.raises(ProgramError, match=r"tokens 0\.\.2 hold a NaN"):
        measure([1, 2, 3], 4, lambda part: torch.full((len(part), VOCABULARY), torch.nan))


@pytest.fixture(scope="module")
def plan():
    return small_plan(max_seq_len=24, layers=2)


TOKENS = torch.randint(0, 512, (50,), generator=torch.Generator().manual_seed(2)).tolist()


def of_model(plan, window):
    plan.model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            return measure(TOKENS, window, lambda part: plan.model(torch.tensor([part]), use_cache=False).logits[0])
    finally:
        plan.model.set_attn_implementation(ATTENTION_NAME)


@pytest.mark.parametrize("without", ["", "target_verify"])
def test_a_program_measures_what_its_model_does(plan, without, monkeypatch):
    """By target_verify, whose last call in a window is filled up, or by decode."""
    program = EagerProgram(plan)
    program.signatures.pop(without, None)
    model = LanguageModel(program)
    window = program_window(model, None)
    assert window == (20 if not without else 24)
    found = measure(TOKENS, 18, program_logits(model))
    assert {method for method, _, _ in program.calls} == {"decode" if without else "target_verify"}
    assert math.log(found.value) == pytest.approx(math.log(of_model(plan, 18).value), rel=0.01)


def test_programs_that_cannot_be_measured(plan):
    program = EagerProgram(plan)
    with pytest.raises(UsageError, match="a window of 21 tokens does not fit: the caches hold 20"):
        program_window(LanguageModel(program), 21)
    for name in ("target_verify", "decode"):
        program.signatures.pop(name)
    with pytest.raises(ProgramError, match="perplexity needs the method target_verify or decode"):
        program_logits(LanguageModel(program))
