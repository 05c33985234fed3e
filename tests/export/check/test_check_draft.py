"""The check of a program with a draft passes correct programs and finds errors in the draft and its inputs."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from drafts import ReferenceDraft, draft_tensors, flat_config, write_draft
from eager_program import EagerProgram, small_plan

from flashpte.export.check.check_draft import plan_draft_walk
from flashpte.export.check.check_program import _missing, check_program, named_weights
from flashpte.export.check.eager_draft import eager_draft, rebuild_draft
from flashpte.export.check.eager_model import EagerModel, Evaluation, eager_pair, rebuild
from flashpte.export.models.eagle3 import build_draft
from flashpte.export.runtime import ProgramError
from flashpte.export.weights.draft import DraftWeights, draft_recipe, open_draft
from flashpte.export.weights.recipe import fill_weights, plan_weights

pytestmark = pytest.mark.xdist_group("check draft")

LENGTH = 160  # the window is 64, a ring has 128 slots


@pytest.fixture(scope="module")
def plan():
    return small_plan(max_seq_len=LENGTH, layers=6, chain=4)


@pytest.fixture(scope="module")
def rebuilt(plan):
    """Rebuilds the models from the manifest, not from the plan's own modules; all tests share one evaluation."""
    model = rebuild(plan.manifest(), None)
    draft = rebuild_draft(plan.manifest(), model, None)
    pair = eager_pair(model, draft)
    for eager in pair:
        eager.evaluate = remember(eager.evaluate)
    return model, draft, *pair


def remember(function):
    known = {}

    def call(tokens, rows, *others):
        key = tuple(tokens), tuple(rows), *others
        if key not in known:
            known[key] = function(tokens, rows, *others)
        return known[key]

    return call


def check(program, plan, rebuilt, **options):
    _, _, own, reference = rebuilt
    return check_program(program, own, reference, **options)


def failed(report):
    return {comparison.what for comparison in report.comparisons if not comparison.passed}


def test_a_right_program_passes(plan, rebuilt):
    program = EagerProgram(plan)
    weights = named_weights(plan.model, plan.draft)
    report = check(program, plan, rebuilt, weights=weights, model_weights=named_weights(*rebuilt[:2]))
    assert report.passed, "\n".join(report.lines())
    assert report.weights_equal == len(weights)
    # random weights, including the draft's, must keep rounding errors small, or the bounds would hide real errors
    assert all(comparison.relative_allowed < 0.06 for comparison in report.comparisons), "\n".join(report.lines())
    assert {c.what for c in report.comparisons} == {
        *("prefill logits", "target_verify logits", "prefill features", "target_verify features"),
        *("sliding keys", "sliding values", "full keys", "full values"),
        *("draft_decode features", "draft keys", "draft values"),
    }
    assert report.proposals.tokens > 40
    assert report.proposals.distinct > 20
    assert report.proposals.above > 20
    assert not report.unchecked
    ends = {method: max(s + n for m, n, s in program.calls if m == method) for method in program.signatures}
    assert ends["draft_decode"] == ends["target_verify"] == LENGTH
    assert not any(tensor.any() for tensor in program.buffers.values())
    assert any(line.startswith("draft: ") and "proposals" in line for line in report.lines())
    assert report.to_dict()["proposals"]["passed"] is True


def test_a_draft_at_late_positions(plan, rebuilt):
    """All positions are late by one. Rotary embeddings are relative, so only the cache shows it clearly."""
    report = check(EagerProgram(plan, late="draft_decode"), plan, rebuilt)
    assert {"draft keys", "draft values"} <= failed(report) <= {"draft keys", "draft values", "draft_decode features"}
    # far more than rounding on any processor
    assert all(c.excess > 20 for c in report.comparisons if c.what in ("draft keys", "draft values"))
    assert not report.passed


def test_a_draft_that_restarts_its_positions(plan, rebuilt):
    report = check(EagerProgram(plan, restarted="draft_decode"), plan, rebuilt)
    assert failed(report) == {"draft_decode features", "draft keys", "draft values"}
    assert all(comparison.excess > 20 for comparison in report.comparisons if not comparison.passed)
    assert len(report.proposals.wrong) > 10


class Changed(EagerProgram):
    """Changes one result of one method."""

    def __init__(self, plan, method, change):
        super().__init__(plan)
        self.method, self.change = method, change

    def run(self, method, *inputs):
        results = super().run(method, *inputs)
        if method == self.method:
            self.change(results)
        return results


def poison(results):
    results[1][0, -1, 3] = math.nan


def shift(results):
    results[1].copy_(results[1].roll(1, 1))


def next_token(results):
    results[0].copy_((results[0] + 1) % 512)


@pytest.mark.parametrize(
    ("method", "change", "what"),
    [
        ("draft_decode", poison, {"draft_decode features"}),
        ("target_verify", shift, {"target_verify features"}),
        ("prefill", poison, {"prefill features"}),
    ],
)
def test_wrong_features(plan, rebuilt, method, change, what):
    assert failed(check(Changed(plan, method, change), plan, rebuilt)) == what


def test_a_draft_that_is_compared_with_nothing(plan, rebuilt):
    """The draft's cache has another name, there is no draft to compare with, or all proposals are near ties."""
    program = EagerProgram(plan)
    program.buffers["draft_cache.keys"] = program.buffers.pop("draft_cache.k_0")
    report = check(program, plan, rebuilt)
    assert not report.passed
    assert "draft_cache.k_0: the program has no buffer of this name" in report.not_compared
    undecided = dataclasses.replace(report.proposals, above=0)
    (said,) = _missing({}, Evaluation(torch.ones(1)), report.comparisons, undecided)
    assert said.startswith("draft proposals: none has a top-2 margin above")
    _, _, own, reference = rebuilt
    drafts = own.draft, reference.draft
    own.draft = reference.draft = None
    own_evaluate, reference_evaluate = own.evaluate, reference.evaluate
    try:
        for eager in (own, reference):
            eager.evaluate = functools.partial(EagerModel.evaluate, eager)
        report = check(EagerProgram(plan), plan, rebuilt)
    finally:
        own.draft, reference.draft = drafts
        own.evaluate, reference.evaluate = own_evaluate, reference_evaluate
    assert not report.passed
    assert report.not_compared == ("method draft_decode: no eager model to compare it with",)


def test_wrong_proposals(plan, rebuilt):
    report = check(Changed(plan, "draft_decode", next_token), plan, rebuilt)
    assert not failed(report)
    assert not report.passed
    assert len(report.proposals.wrong) == report.proposals.above
    assert any(line.startswith("draft: WRONG at") for line in report.lines())


def test_one_bit_of_the_draft(plan, rebuilt):
    weights = {name: tensor.clone() for name, tensor in named_weights(plan.model, plan.draft).items()}
    weights["draft.lm_head.weight"].view(torch.int16)[3, 7] ^= 1
    report = check(EagerProgram(plan), plan, rebuilt, weights=weights, model_weights=named_weights(*rebuilt[:2]))
    assert report.weights_different == ("draft.lm_head.weight",)


@pytest.mark.parametrize(("most", "length"), [(64, 160), (64, 4096), (1024, 2048), (5, 24), (2, 9)])
def test_walks_reach_every_position_and_skip_none(most, length):
    steps = plan_draft_walk(1, most, length)
    seen = 0
    for step in steps:
        assert 1 <= step.count <= most
        assert step.start <= seen
        assert seen - step.start <= 8
        seen = max(seen, step.end)
    assert seen == length
    assert sum(step.count == 1 for step in steps) >= min(16, length // 3)


def test_the_reference_is_eagle3_as_plain_maths(tmp_path):
    """The reference equals plain arithmetic that shares no code with the modules."""
    config = flat_config(norm_before_residual=True, fc_norm=True)
    tensors = draft_tensors(config, target_hidden=48)
    files = open_draft(write_draft(tmp_path, config, tensors))
    fusion, head = build_draft(files.config, 3, 48, own_embedding=False, own_head=True, own_map=True)
    for part in (fusion, head):
        fill_weights(part, plan_weights(part, draft_recipe("float32")), DraftWeights(files, 96))
    embedding = torch.randn(96, 48, generator=torch.Generator().manual_seed(0))

    plan = SimpleNamespace(taps=(0, 1, 2), fusion=fusion, head=head)
    draft, plain = eager_draft(plan, embedding), ReferenceDraft(config, tensors, embedding)
    taps = torch.randn(3, 12, 48, generator=torch.Generator().manual_seed(1))
    features = draft.fuse({i: tap[None] for i, tap in enumerate(taps)})[0]
    torch.testing.assert_close(features, plain.fuse(list(taps)))
    tokens = torch.arange(12) * 7 % 96
    found = draft.evaluate(tokens.tolist(), features, range(12))
    for row in range(12):
        logits, feature = plain.step(tokens[: row + 1], features[: row + 1])
        torch.testing.assert_close(found.logits[row], logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.features[row], feature, rtol=1e-4, atol=1e-4)
    targets = torch.arange(40) + tensors["d2t"]
    assert [draft.to_draft_id(int(target)) for target in targets] == list(range(40))
    assert draft.to_draft_id(next(t for t in range(96) if t not in targets)) == -1


def test_a_draft_that_is_missing_or_another(plan, rebuilt, tmp_path):
    manifest, model = plan.manifest(), rebuilt[0]
    with pytest.raises(ProgramError, match="random draft, not one of a folder"):
        rebuild_draft(manifest, model, tmp_path)
    other = {**manifest, "draft": {**manifest["draft"], "family": "flat"}}
    with pytest.raises(ProgramError, match="add draft, the draft exported"):
        rebuild_draft(other, model, None)
    other = {**manifest, "draft": {**manifest["draft"], "vocab_size": 9}}
    with pytest.raises(ProgramError, match="vocab_size differs"):
        rebuild_draft(other, model, None)
    without = {name: value for name, value in manifest.items() if name != "draft"}
    assert rebuild_draft(without, model, None) is None
    with pytest.raises(ProgramError, match="this program has none"):
        rebuild_draft(without, model, tmp_path)
