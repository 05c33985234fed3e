"""The check passes correct programs and finds errors in wrong ones; all run eagerly."""

import itertools
import math

import pytest
import torch
from eager_program import EagerProgram, small_plan

from flashpte.export.check.check_program import check_program, judge_choices, named_weights
from flashpte.export.check.check_weights import WeightsReport, compare_weights
from flashpte.export.check.compare import Comparison, compare, ulp
from flashpte.export.check.eager_model import eager_pair, rebuild, reference_dtype
from flashpte.export.check.runs import RUNS, compare_with_runs
from flashpte.export.check.walk import Step, plan_walk
from flashpte.export.runtime import ProgramError
from flashpte.export.runtime.language_model import Limits, read_limits

LENGTH = 160  # the window is 64, a ring has 128 slots


@pytest.fixture(scope="module")
def plan():
    return small_plan(max_seq_len=LENGTH)


@pytest.fixture(scope="module")
def eager(plan):
    """Rebuilds the model from the manifest, not from the plan's own model; all tests share one evaluation."""
    model = rebuild(plan.manifest(), None)
    pair = eager_pair(model)
    for one in pair:
        one.evaluate, one.greedy = _remember(one.evaluate), _remember(one.greedy)
    return model, *pair


def _remember(function):
    known = {}

    def call(*arguments):
        key = tuple(tuple(a) if isinstance(a, list) else a for a in arguments)
        if key not in known:
            known[key] = function(*arguments)
        return known[key]

    return call


def check(program, plan, eager, **options):
    _, own, reference = eager
    return check_program(program, own, reference, **options)


def failed(report):
    return {comparison.what for comparison in report.comparisons if not comparison.passed}


def test_a_right_program_passes(plan, eager):
    program = EagerProgram(plan)
    weights = {f"model.{name}": tensor for name, tensor in plan.model.state_dict().items()}
    report = check(program, plan, eager, weights=weights, model_weights=named_weights(eager[0]))
    assert report.passed, "\n".join(report.lines())
    assert report.weights_equal == len(weights)
    assert {c.what for c in report.comparisons} == {
        *("prefill logits", "decode logits", "target_verify logits", "teacher-forced logits"),
        *("sliding keys", "sliding values", "full keys", "full values"),
    }
    assert max(start + count for _, count, start in program.calls) == LENGTH
    assert not any(tensor.any() for tensor in program.buffers.values())  # the check resets the buffers
    assert "check passed" in report.lines()
    assert report.to_dict()["passed"] is True


@pytest.mark.parametrize("wrong", [{"unshared": "decode"}, {"unshared": "prefill"}, {"swapped": "target_verify"}])
def test_methods_that_are_wired_wrongly(plan, eager, wrong):
    report = check(EagerProgram(plan, **wrong), plan, eager)
    assert {f"{next(iter(wrong.values()))} logits", "sliding keys"} & failed(report)
    lines = report.lines()
    assert lines[-1] == "check FAILED"
    assert any("WRONG, worst in layer" in line for line in lines)


def test_a_perturbed_weight(plan, eager):
    weight = plan.model.get_parameter("model.layers.5.mlp.down_proj.weight")
    rows = weight.data[:32].clone()
    weight.data[:32] *= -1
    try:
        weights = {f"model.{name}": tensor for name, tensor in plan.model.state_dict().items()}
        program = EagerProgram(plan)
        report = check(program, plan, eager, weights=weights, model_weights=named_weights(eager[0]))
    finally:
        weight.data[:32] = rows
    # The weight is in the last layer, after every cache, so only the logits show the error.
    assert failed(report) == {c.what for c in report.comparisons if c.what.endswith("logits")}
    assert report.weights_different == ("model.model.layers.5.mlp.down_proj.weight",)


def test_one_bit_of_one_weight_is_found_by_comparing_bytes(plan, eager):
    weights = {f"model.{name}": tensor.clone() for name, tensor in plan.model.state_dict().items()}
    weights["model.model.norm.weight"].view(torch.int16)[7] ^= 1
    report = check(EagerProgram(plan), plan, eager, weights=weights, model_weights=named_weights(eager[0]))
    assert not failed(report)
    assert not report.passed
    assert "weights: WRONG, 1 differ: model.model.norm.weight" in report.lines()


def renamed(weights):
    weights["model.model.other.weight"] = weights.pop("model.model.norm.weight")


def widened(weights):
    weights["model.model.norm.weight"] = weights["model.model.norm.weight"].float()


def cut(weights):
    weights["model.model.norm.weight"] = weights["model.model.norm.weight"][:-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed, "model.model.norm.weight: the program has no tensor of this name"),
        (widened, "model.model.norm.weight: the program has float32 [256], the model bfloat16 [256]"),
        (cut, "model.model.norm.weight: the program has bfloat16 [255], the model bfloat16 [256]"),
        (dict.clear, "model.model.embed_tokens.weight: the program has no tensor of this name"),
    ],
)
def test_a_weight_that_is_compared_with_nothing(plan, eager, change, said):
    weights = named_weights(plan.model)
    change(weights)
    report = check(EagerProgram(plan), plan, eager, weights=weights, model_weights=named_weights(eager[0]))
    assert not failed(report)
    assert not report.passed
    assert said in report.not_compared
    assert report.lines()[-1] == "check FAILED"
    assert any(line.startswith("NOT COMPARED: model.model.") for line in report.lines())
    assert report.to_dict()["not_compared"] == list(report.not_compared)


def test_tied_weights_need_one_name():
    shared, other = torch.ones(3, 2), torch.ones(3, 2)
    assert compare_weights({"a": other}, {"a": shared, "b": shared}) == WeightsReport(1)
    assert compare_weights({"a": other}, {"a": shared, "b": other}).missing[0].startswith("b: ")
    assert compare_weights({"a": other}, {}).missing == ("weights: the model has none",)


def test_weights_that_cannot_be_read_are_said_to_be(plan, eager):
    report = check(EagerProgram(plan), plan, eager)
    assert report.passed
    assert "weights: not compared byte for byte, they are inside of the compiled code" in report.lines()
    assert report.to_dict()["weights"]["read"] is False


def rename_cache(program):
    program.buffers["kv_cache.key_3"] = program.buffers.pop("kv_cache.k_3")


def drop_caches(program):
    program.buffers.clear()


def add_method(program):
    program.signatures["embed"] = program.signatures["decode"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename_cache, ["kv_cache.k_3: the program has no", "kv_cache.key_3: the manifest describes no state"]),
        (drop_caches, ["kv_cache.v_5: the program has no", "target: no state was compared"]),
        (add_method, ["method embed: no eager model to compare it with"]),
    ],
)
def test_what_is_compared_with_nothing_has_not_passed(plan, eager, change, said):
    program = EagerProgram(plan)
    buffers = dict(program.buffers)
    change(program)
    report = check(program, plan, eager)
    for tensor in buffers.values():
        tensor.zero_()
    assert not failed(report)
    assert not report.passed
    for start in said:
        assert any(what.startswith(start) for what in report.not_compared), report.not_compared


def test_a_method_that_no_call_was_made_of(plan, eager, monkeypatch):
    steps = plan_walk(read_limits(EagerProgram(plan).signatures, plan.constant_methods))
    others = tuple(step for step in steps if step.method != "target_verify")
    monkeypatch.setattr("flashpte.export.check.check_program.plan_walk", lambda *_: filled(others))
    report = check(EagerProgram(plan), plan, eager)
    assert report.not_compared == ("target_verify logits: no call returned any",)
    assert not report.passed


def filled(steps):
    """Fills gaps in steps with decodes."""
    position, found = 0, []
    for step in steps:
        found += [Step("decode", at, 1) for at in range(position, step.start)]
        found.append(step)
        position = step.end
    return tuple(found)


def test_verify_must_return_every_row(plan, eager):
    class Last(EagerProgram):
        def run(self, method, *inputs):
            results = super().run(method, *inputs)
            return [results[0][:, -1:]] if method == "target_verify" else results

    assert failed(check(Last(plan), plan, eager)) == {"target_verify logits"}


def test_nan_never_passes(plan, eager):
    class Poisoned(EagerProgram):
        def run(self, method, *inputs):
            (logits,) = super().run(method, *inputs)
            if method == "target_verify":
                logits[0, 2, 9] = math.nan
            return [logits]

    report = check(Poisoned(plan), plan, eager)
    assert failed(report) == {"target_verify logits"}


def test_a_program_that_fails_names_itself(plan, eager):
    class Broken(EagerProgram):
        def run(self, method, *inputs):
            raise ProgramError("decode failed: CUDA error: an illegal memory access was encountered")

    with pytest.raises(ProgramError, match="illegal memory access"):
        check(Broken(plan), plan, eager)


def test_runs_of_the_eager_model_differ_by_rounding(plan, eager):
    _, own, reference = eager
    tokens, rows = torch.randint(0, 500, (130,), generator=torch.Generator().manual_seed(1)).tolist(), [0, 60, 129]
    truth, plain, one, again, other = (
        model.evaluate(tokens, rows, *noise)
        for model, noise in ((reference, ()), (own, ()), (own, (1,)), (own, (1,)), (own, (2,)))
    )
    assert torch.equal(one.logits, again.logits)
    assert not torch.equal(one.logits, other.logits)
    errors = [float((run.logits.double() - truth.logits).square().mean().sqrt()) for run in (plain, one, other)]
    assert max(errors) < 2 * min(errors)
    assert torch.equal(own.evaluate(tokens, list(rows)).logits, plain.logits)  # no hook is left


def _counted(comparisons):
    """A comparison for ``compare_with_runs`` and the numbers of runs that it saw; each run gives the next verdict."""
    seen = []

    def compare_runs(runs):
        seen.append(len(runs))
        return [comparisons[min(len(runs), len(comparisons)) - 1]]

    return compare_runs, seen


def test_more_runs_follow_while_a_comparison_fails(eager):
    _, own, _ = eager
    passed, failed = (Comparison("x", "", error, 1.0, 0.0, 1.0, 1) for error in (0.5, 1.5))
    hopeless = Comparison("x", "", math.inf, 1.0, math.inf, 1.0, 1)
    for verdicts, expected in (
        ([passed], [1]),
        ([failed, failed, passed], [1, 2, 3]),
        ([failed], list(range(1, RUNS + 1))),
        ([hopeless], [1]),
    ):
        compare_runs, seen = _counted(verdicts)
        lines = []
        (last,), first = compare_with_runs(own, [1, 2, 3], [2], compare_runs, lines.append)
        assert seen == expected
        assert last is verdicts[-1]
        assert len(lines) == len(expected) - 1
        assert torch.equal(first.logits, own.evaluate([1, 2, 3], [2]).logits)


def test_the_bound_is_twice_the_eager_error_or_two_ulp():
    reference = torch.tensor([4.0, -1.0, 2.0, 0.5])
    own = reference + torch.tensor([0.1, 0.0, -0.05, 0.0])
    exactly = reference + torch.tensor([0.0, -0.2, 0.0, 0.0])
    assert compare("x", "", exactly, reference, own, torch.bfloat16).max_allowed == pytest.approx(0.2, rel=1e-5)
    assert not compare("x", "", exactly * 1.01, reference, own, torch.bfloat16).passed
    # an eager model without any error
    floor = compare("x", "", reference, reference, reference, torch.bfloat16)
    assert floor.max_allowed == 2 * ulp(torch.bfloat16, 4.0) == 2 * 4 * 2.0**-7
    assert floor.passed
    shifted = compare("x", "", reference + torch.tensor([0.0, 0.07, 0.0, 0.0]), reference, reference, torch.bfloat16)
    assert not shifted.passed
    # of several runs of the eager model, the worst counts
    better = reference + torch.tensor([0.01, 0.0, 0.0, 0.0])
    for runs in ([better, own], [own, better]):
        assert compare("x", "", exactly, reference, runs, torch.bfloat16).max_allowed == pytest.approx(0.2, rel=1e-5)
    assert compare("x", "", exactly, reference, [better], torch.bfloat16).max_allowed < 0.1
    # a small error everywhere: only the rms bound catches it
    everywhere = compare("x", "", own + 0.09, reference, own, torch.bfloat16)
    assert everywhere.max_error <= everywhere.max_allowed
    assert not everywhere.passed
    assert not compare("x", "", reference * math.nan, reference, own, torch.bfloat16).passed
    # empty tensors, and shapes that broadcast
    assert not compare("x", "", reference[:0], reference[:0], own[:0], torch.bfloat16).passed
    assert not compare("x", "", torch.ones(1), torch.ones(4), torch.ones(4), torch.bfloat16).passed


def test_clear_choices_must_agree_and_close_ones_may_turn():
    truth = torch.zeros(3, 8)
    truth[:, 0] = torch.tensor([1.0, 5.0, 5.0])
    truth[:, 1] = torch.tensor([0.99, 0.0, 0.0])
    own = truth + 0.02
    near = truth.clone()
    near[0, 1] += 0.03  # changes the first choice
    comparison = compare("x", "", near, truth, own, torch.bfloat16)
    agreement = judge_choices(comparison, near, truth)
    assert comparison.passed
    assert (agreement.tokens, agreement.agreeing, agreement.above, agreement.wrong) == (3, 2, 2, ())
    assert agreement.passed
    far = truth.clone()
    far[2, 3] = 9.0
    agreement = judge_choices(compare("x", "", far, truth, own, torch.bfloat16), far, truth)
    assert agreement.wrong == (2,)
    assert not agreement.passed
    assert agreement.margins == pytest.approx((0.01, 5.0, 5.0), abs=1e-4)


LIMITS = [
    Limits(256, (2, 64), True, 5),
    Limits(4096, (2, 64), True, 5),
    Limits(4096, (2, 2048), True, None),
    Limits(128, (2, 64), False, None),
    Limits(100, None, True, None),
    Limits(100, None, False, 7),
    Limits(8, (2, 8), True, 3),
    Limits(4, (2, 4), True, None),
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_a_walk_reaches_the_last_slot_without_gaps(limits):
    steps = plan_walk(limits)
    written = 0
    for step in steps:
        assert step.start <= written  # never skips positions
        assert written - step.start <= 64
        assert step.end <= limits.max_seq_len
        if step.method == "prefill":
            assert limits.prefill[0] <= step.count <= limits.prefill[1]
        else:
            assert step.count == (limits.verify if step.method == "target_verify" else 1)
        written = max(written, step.end)
    assert written == limits.max_seq_len
    methods = {step.method for step in steps}
    assert methods == {
        *(["prefill"] if limits.prefill else []),
        *(["decode"] if limits.decode else []),
        *(["target_verify"] if limits.verify else []),
    }
    assert steps[-1].compared


def test_a_walk_has_variety_and_bounds():
    steps = plan_walk(Limits(4096, (2, 64), True, 5))
    sizes = {step.count for step in steps if step.method == "prefill"}
    assert {2, 5, 17, 33, 63, 64} <= sizes
    assert any(step.start < before.end for before, step in itertools.pairwise(steps))  # steps back
    only_decode = plan_walk(Limits(4096, None, True, None))
    assert len(only_decode) == 4096
    assert 64 < sum(step.compared for step in only_decode) <= 130


def test_what_cannot_be_rebuilt(plan, tmp_path):
    manifest = plan.manifest()
    for changes, said in (
        ({"model": {}}, "does not describe a model"),
        ({"weights": None}, "does not say where its weights came from"),
        ({"weights": "checkpoint"}, "add checkpoint"),
    ):
        with pytest.raises(ProgramError, match=said):
            rebuild({**manifest, **changes}, None)
    with pytest.raises(ProgramError, match="random weights, not those of a checkpoint"):
        rebuild(manifest, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gemma4_text", "hidden_size": 8}')
    with pytest.raises(ProgramError, match=r"is not what was exported: .* of its config differs"):
        rebuild({**manifest, "weights": "checkpoint"}, tmp_path)


def test_the_reference_is_wider_than_the_program(plan, eager):
    model, own, reference = eager
    assert {p.dtype for p in own._model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in reference._model.parameters()} == {torch.float32}
    assert reference_dtype(torch.float32) == torch.float64
    assert model is not plan.model
    assert model.config._attn_implementation == "sdpa"
