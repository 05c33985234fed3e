"""Measuring with made-up times on a CPU: everything except the GPU part."""

import pytest
import torch
from harness import inputs, measure, ours, peers, prepare
from harness.cases import Case
from harness.runner import Runner, Variant

CASES = [
    Case("decode", "llama-8b", 96, 1),
    Case("decode", "llama-8b", 96, 1, context=40),
    Case("verify", "qwen3.5", 64, 4),
    Case("prefill", "group-3", 80, 80),
    Case("prefill", "gemma-sliding", 96, 96, window=32),
    Case("chunk", "llama-8b", 128, 32),
]


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(inputs, "DEVICE", "cpu")
    monkeypatch.setattr(inputs, "ROTATED_BYTES", 1e6)
    monkeypatch.setattr(measure, "graph_times", lambda candidates: dict.fromkeys(candidates, 2.0))
    monkeypatch.setattr(measure, "plain_time", lambda calls: 3.0)
    monkeypatch.setattr(measure, "time_us", lambda calls: calls[0]() and 1.0)
    monkeypatch.setattr(measure, "device_is_alive", lambda: True)


CEILINGS = {"read_bytes_per_us": 1e6, "bf16_flop_per_us": 1e6}


def run(case, *runners, failed=None):
    return measure.measure(case, runners, failed or {}, CEILINGS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours_and_pytorchs_agree(on_cpu, case):
    default = next(runner for runner in peers.RUNNERS if runner.label == "torch default")
    mine = [runner for runner in ours.RUNNERS if not runner.plain_only]
    row = run(case, *mine, default)
    for label in ("flashpte", "torch default"):
        assert row["times"][label] == {"error": pytest.approx(0, abs=1e-2), "graph": 2.0, "plain": 3.0, "variant": ""}
    assert row["map"]["flashpte"] == 1.0
    square = case.rows == case.length and case.window is None
    assert ("graph" in row["times"]["flashpte is_causal"]) == square


@pytest.mark.parametrize("case", [CASES[0], CASES[2], *CASES[4:]], ids=lambda case: case.name)
def test_flex_has_the_same_mask(on_cpu, monkeypatch, case):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    given = inputs.Inputs.make(case, 1)
    assert given.error(peers.flex(given)[""].result) < inputs.LARGEST_ERROR


def test_a_peer_that_fails_or_is_wrong_ends_nothing(on_cpu):
    def breaks(given):
        raise RuntimeError("no kernel\nimage")

    def wrong(given):
        return {"": Variant([lambda: torch.zeros(1, 32, 1, 128)])}

    def half(given):
        right = ours.by_positions(given)[""]
        return {"bad": Variant([lambda: breaks(given)]), "good": right}

    def not_asked(case):
        return "no reason"

    runners = [Runner("breaks", lambda c: None, breaks), Runner("wrong", lambda c: None, wrong)]
    runners += [Runner("half", lambda c: None, half), Runner("refuses", not_asked, breaks)]
    runners += [Runner("late", lambda c: None, wrong), ours.RUNNERS[0]]
    case = CASES[0]
    times = run(case, *runners, failed={("late", case.key): "not prepared in time"})["times"]
    assert times["breaks"] == {"failed": "RuntimeError: no kernel"}
    assert times["wrong"]["failed"].startswith("wrong: relative error 1")
    assert times["half"]["variant"] == "good"
    assert times["half"]["graph"] == 2.0
    assert "failed" not in times["half"]
    assert times["refuses"] == {"failed": "no reason"}
    assert times["late"] == {"failed": "not prepared in time"}
    assert times["flashpte"]["graph"] == 2.0


def test_a_lost_gpu_is_told_apart(on_cpu, monkeypatch):
    def breaks(given):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(measure, "device_is_alive", lambda: False)
    with pytest.raises(measure.DeviceLost) as lost:
        run(CASES[0], Runner("breaks", lambda c: None, breaks))
    assert lost.value.row["times"]["breaks"] == {"failed": "RuntimeError: illegal memory access"}


def test_sampled_rows_find_a_wrong_result(on_cpu):
    case = Case("prefill", "group-3", 200, 200)
    given = inputs.Inputs.make(case, 1)
    call = ours.by_positions(given)[""].calls[0]
    assert len(given.expected[0]) == inputs.SAMPLED_ROWS
    assert given.error(call) < inputs.LARGEST_ERROR
    assert given.error(lambda: call().roll(1, dims=2)) > inputs.LARGEST_ERROR


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_jobs_say_why_they_failed():
    job = prepare.Job("flashpte", (CASES[0],))
    outcome = prepare.run_jobs([job], limit=60, workers=1)
    (reason,) = outcome.failed.values()
    assert list(outcome.failed) == [("flashpte", CASES[0].key)]
    assert "Error" in reason
    assert "preparing ended" not in reason
    late = prepare.run_jobs([job], limit=-1, workers=1)
    assert late.failed == {("flashpte", CASES[0].key): "not prepared in time"}


@pytest.fixture
def command(on_cpu, monkeypatch, tmp_path):
    """Runs the command with two cases and only our own operator; ``command(...)`` returns the document."""
    import attention
    from harness import results, runners

    monkeypatch.setattr(attention, "choose", lambda suites, substring: CASES[:2])
    monkeypatch.setattr(runners, "chosen", lambda wanted: [ours.RUNNERS[0]])
    monkeypatch.setattr(attention, "ceilings", lambda: CEILINGS)
    monkeypatch.setattr(results, "here", lambda: {"gpu": "a GPU", "date": "2026-01-01"})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def run(*arguments):
        return attention.run(attention.parse(["--results", str(tmp_path), "--no-prepare", *arguments]))

    return run


def test_the_command_stops_in_time_and_goes_on(command):
    first = command("--time-limit", "0")
    assert first["rows"] == []
    assert first["left_out"] == [case.key for case in CASES[:2]]
    second = command("--resume")
    assert [row["case"] for row in second["rows"]] == [case.name for case in CASES[:2]]
    assert second["left_out"] == []


def test_a_case_that_loses_the_gpu_is_tried_twice(command, monkeypatch):
    import attention

    alive = measure.device_is_alive
    restarted = []
    monkeypatch.setattr(measure, "device_is_alive", lambda: False)
    monkeypatch.setattr(attention, "start_again", lambda args, spent: restarted.append(1))
    assert [row["lost"] for row in command()["rows"]] == [1]
    assert [row["lost"] for row in command("--resume")["rows"]] == [2]
    monkeypatch.setattr(measure, "device_is_alive", alive)
    rows = command("--resume")["rows"]
    assert [(row["case"], "lost" in row) for row in rows] == [(CASES[0].name, True), (CASES[1].name, False)]
    assert len(restarted) == 2


def test_an_error_while_timing_that_leaves_no_gpu_is_told_apart(on_cpu, monkeypatch):
    def dies(candidates):
        monkeypatch.setattr(measure, "device_is_alive", lambda: False)
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(measure, "graph_times", dies)
    with pytest.raises(measure.DeviceLost):
        run(CASES[0], ours.RUNNERS[0])


def test_an_error_of_a_case_is_not_the_end(command, monkeypatch):
    def fails(case, *rest):
        raise MemoryError("too large")

    monkeypatch.setattr(measure, "measure", fails)
    assert command()["left_out"] == [f"{case.key} (MemoryError: too large)" for case in CASES[:2]]
