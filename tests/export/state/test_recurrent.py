"""A recurrent layer works in export, generation, rollback and check, although the runtime's loops do not know it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import toy_recurrent
from eager_program import signatures
from shared_programs import SharedPrograms

from flashpte.export.check.check_program import check_program, named_weights
from flashpte.export.check.eager_model import EagerModel, eager_pair
from flashpte.export.common.errors import ProgramError
from flashpte.export.common.options import ExportOptions
from flashpte.export.models import registry
from flashpte.export.pipeline import export_programs, plan_export
from flashpte.export.runtime.generate import generate
from flashpte.export.runtime.language_model import LanguageModel
from flashpte.export.runtime.speculate import speculate
from flashpte.export.speculative import Stop
from flashpte.export.speculative import generate as speculate_with
from flashpte.export.speculative.sizes import SpeculativeProgram
from flashpte.export.state.layer_state import DRAFT_PART, read_states
from flashpte.export.state.rollback import Rollback

PROMPT = [5, 9, 2, 33, 17, 60, 21]


class ExportedProgram:
    """The exported methods of a plan as a program that the runtime can run, with shared buffers."""

    def __init__(self, plan, programs, states=None):
        ranges = {spec.name: (spec.min_tokens, spec.max_tokens) for spec in plan.methods}
        size = plan.draft.head.hidden_size if plan.draft is not None else None
        self.signatures = signatures(ranges, plan.facts.vocab_size, plan.dtype, size)
        self.constants = plan.constant_methods
        # through the manifest's JSON, which is all that the runtime reads
        self.states = read_states(plan.manifest()) if states is None else states
        self._programs = SharedPrograms(programs)  # they start full of 3.0
        self.buffers = self._programs.caches
        self.weights = {name: value for program in programs.values() for name, value in program.state_dict.items()}

    def run(self, method, *inputs):
        self.signatures[method].check(inputs)
        found = self._programs.run(method, *inputs)
        return [found] if isinstance(found, torch.Tensor) else list(found)

    def reset(self):
        for buffer in self.buffers.values():
            buffer.fill_(3.0)  # a sequence from position 0 must not depend on it

    def synchronize(self):
        pass


@pytest.fixture(scope="module", autouse=True)
def _target():
    with pytest.MonkeyPatch.context() as patch:
        known = registry._builtin_targets()
        patch.setattr(registry, "_builtin_targets", lambda: {**known, "toy-recurrent": toy_recurrent.TARGET})
        yield


def planned(**options):
    return plan_export(ExportOptions("toy-recurrent", random_seed=3, dtype="float32", **options))


@pytest.fixture(scope="module")
def plain():
    plan = planned(verify_window=5)
    return plan, export_programs(plan)


@pytest.fixture(scope="module")
def drafted():
    plan = planned(chain=4, with_decode=True)
    return plan, export_programs(plan)


def eager(plan):
    """The plan's model with Hugging Face's own attention."""
    model = copy.deepcopy(plan.model)
    model.set_attn_implementation("sdpa")
    return model


@pytest.fixture(scope="module")
def greedy(plain):
    """The model's own greedy continuation, without a cache."""
    plan, _ = plain
    model = EagerModel(eager(plan), "cpu", None, toy_recurrent.layer_state)

    def follow(prompt, count):
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(model.evaluate(tokens, [len(tokens) - 1]).logits[0].argmax()))
        return tokens[len(prompt) :]

    return follow


def test_the_manifest_says_what_each_layer_remembers(plain):
    plan, programs = plain
    full, recurrent, last = plan.manifest()["states"]
    assert (full["kind"], full["goes_back"], full["compared"]) == ("full", "position", "positions")
    assert recurrent["buffers"] == {"convolution": "kv_cache.conv_1", "state": "kv_cache.delta_1"}
    assert (recurrent["goes_back"], recurrent["fed_twice"], recurrent["compared"]) == ("snapshot", False, "last")
    assert last["buffers"] == {"keys": "kv_cache.k_2", "values": "kv_cache.v_2"}
    for program in programs.values():
        assert {"kv_cache.conv_1", "kv_cache.delta_1"} <= set(program.graph_signature.inputs_to_buffers.values())


def test_generation(plain, greedy):
    plan, programs = plain
    expected = greedy(PROMPT, 20)
    assert len(set(expected)) > 4
    found = generate(LanguageModel(ExportedProgram(plan, programs)), PROMPT, max_new_tokens=20)
    assert list(found.tokens) == expected


@pytest.mark.parametrize("back", range(1, 9))
def test_rollback(plain, back):
    """After going back by any number of positions, other tokens give the logits of a sequence that never differed."""
    plan, programs = plain
    model, straight = (LanguageModel(ExportedProgram(plan, programs)) for _ in range(2))
    model.prefill(PROMPT)
    model.decode(4)
    model.call("target_verify", [8, 15, 16, 23, 42])
    model.move_back(model.position - back)
    kept = [*PROMPT, 4, 8, 15, 16, 23, 42][:-back]
    straight.prefill(kept[:2])
    for token in kept[2:]:
        straight.decode(token)
    assert model.position == straight.position == len(kept)
    torch.testing.assert_close(model.decode(50), straight.decode(50))


def test_without_snapshots_it_would_go_wrong(plain):
    plan, programs = plain
    wrong = tuple(dataclasses.replace(rules, goes_back="position") for rules in plan.states)
    found = []
    for states in (plan.states, wrong):
        model = LanguageModel(ExportedProgram(plan, programs, states))
        model.prefill(PROMPT)
        model.call("target_verify", [8, 15, 16, 23, 42])
        model.move_back(len(PROMPT) + 2)
        found.append(model.decode(50))
    assert not torch.allclose(*found, rtol=1e-3, atol=1e-3)


def test_speculation_is_lossless(drafted, greedy):
    plan, programs = drafted
    expected = greedy(PROMPT, 30)
    found = speculate(ExportedProgram(plan, programs), PROMPT, max_new_tokens=30)
    assert list(found.tokens) == expected
    assert sum(found.acceptance.accepted) < sum(found.acceptance.offered)


@pytest.mark.parametrize("pattern", [(0,), (1,), (2,), (3,), (4,), (0, 4, 1, 3, 2), (4, 4, 0)])
def test_speculation_is_lossless_whatever_is_accepted(drafted, greedy, pattern):
    plan, programs = drafted
    program = ExportedProgram(plan, programs)
    expected, rounds = greedy(PROMPT, 36), []

    def revise(tokens, proposals):
        known = expected[len(tokens) - len(PROMPT) :][: len(proposals)]
        count = min(pattern[len(rounds) % len(pattern)], len(known))
        rounds.append(count)
        return [*known[:count], *((token + 1) % 64 for token in known[count : count + 1])]

    found = speculate_with(
        program.run,
        SpeculativeProgram.from_constants(program.constants),
        PROMPT,
        36,
        revise=revise,
        rollback=Rollback((rules for rules in program.states if rules.part != DRAFT_PART), program.buffers),
    )
    assert list(found.tokens) == expected
    assert max(found.acceptance.accepted) >= min(1, max(pattern))


def test_the_text_ends_where_no_verify_fits(drafted, greedy):
    plan, programs = drafted
    found = speculate(ExportedProgram(plan, programs), PROMPT, max_new_tokens=100)
    assert found.stopped is Stop.CACHE_FULL
    assert plan.max_seq_len - 5 <= len(PROMPT) + len(found.tokens) <= plan.max_seq_len + 1
    assert list(found.tokens) == greedy(PROMPT, len(found.tokens))


def test_a_recurrent_draft_is_refused(drafted):
    plan, programs = drafted
    states = tuple(
        dataclasses.replace(rules, goes_back="snapshot") if rules.part == DRAFT_PART else rules for rules in plan.states
    )
    with pytest.raises(ProgramError, match="the draft's state goes back by snapshots"):
        speculate(ExportedProgram(plan, programs, states), PROMPT, max_new_tokens=4)


def checked(plan, program):
    own, reference = eager_pair(eager(plan), None, toy_recurrent.layer_state)
    return check_program(
        program,
        own,
        reference,
        weights=program.weights,
        model_weights=named_weights(plan.model),
    )


def test_check(plain):
    plan, programs = plain
    report = checked(plan, ExportedProgram(plan, programs))
    assert report.passed, report.lines()
    compared = {comparison.what for comparison in report.comparisons}
    assert {"full keys", "full values", "recurrent convolution", "recurrent state"} <= compared


def test_check_is_red_when_the_state_goes_back_wrongly(plain):
    plan, programs = plain
    wrong = tuple(dataclasses.replace(rules, goes_back="position") for rules in plan.states)
    report = checked(plan, ExportedProgram(plan, programs, wrong))
    assert not report.passed
    assert "recurrent state" in {comparison.what for comparison in report.comparisons if not comparison.passed}


def test_check_is_red_when_a_state_is_not_described(plain):
    plan, programs = plain
    report = checked(plan, ExportedProgram(plan, programs, plan.states[:1]))
    assert not report.passed
    assert "kv_cache.delta_1: the manifest describes no state that holds it" in report.not_compared
