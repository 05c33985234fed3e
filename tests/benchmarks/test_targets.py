"""Every target, on a document that meets them all and on documents that just miss one."""

import pytest
from harness import targets
from harness.results import best_peer, differences, ours, ours_plain, put


def verdicts(document, key, wanted=""):
    return [j.met for j in targets.judge(document) if f"{j.suite} {j.case}" == key and j.wanted.startswith(wanted)]


def test_everything_is_met(document):
    found = targets.judge(document)
    assert [j.line() for j in found if not j.met] == []
    assert {j.suite for j in found} == {"decode", "verify", "prefill", "chunk", "other"}
    assert "MISSED" not in "\n".join(targets.lines(document))


def scale(row, label, factor, mode="graph"):
    row["times"][label][mode] *= factor


# case, whose time changes, a factor that misses the target, a factor that just meets it, the target
MISSES = [
    ("decode gemma-full L=131072 M=1", "flashpte", 1.05, 1.03, "of the floor"),
    ("decode gemma-full L=32768 M=1", "flashpte", 1.16, 1.14, "of the floor"),
    ("decode llama-8b L=32768 M=1", "flashpte", 1.16, 1.14, "of the floor"),
    ("decode qwen3.5 L=32768 M=1", "flashpte", 1.36, 1.34, "of the floor"),
    ("decode qwen3.5 L=32768 M=1", "fa3", 0.66, 0.67, "of the best peer"),
    ("decode gemma-full L=2048 M=1", "executorch", 0.66, 0.67, "of the best peer"),
    ("decode gemma-sliding L=4096 M=1", "flashinfer", 0.88, 0.89, "of the best peer"),
    ("verify qwen3.5 L=4096 M=8", "flashpte", 1.13, 1.11, "of our decode"),
    ("verify llama-8b L=32768 M=16", "flashpte", 1.36, 1.34, "of our decode"),
    ("verify llama-8b L=4096 M=2", "fa3", 0.73, 0.75, "of the better"),
    ("prefill llama-8b L=2048 causal", "torch cudnn", 0.52, 0.54, "speed over"),
    ("prefill gemma-sliding L=8192 window=1024", "flashinfer", 0.56, 0.57, "speed over flashinfer"),
    ("prefill gemma-sliding L=8192 window=1024", "flex", 0.89, 0.91, "speed over flex"),
    ("prefill gemma-full L=8192 causal", "executorch causal", 0.66, 0.67, "speed over"),
    ("chunk qwen3.5 L=16384 M=512 causal", "flashpte", 1.18, 1.17, "TFLOP/s"),
]


@pytest.mark.parametrize(("key", "label", "missed", "met", "wanted"), MISSES)
def test_a_miss_is_seen(document, row_of, key, label, missed, met, wanted):
    before = row_of(key)["times"][label]["graph"]
    scale(row_of(key), label, met)
    assert verdicts(document, key, wanted) == [True]
    row_of(key)["times"][label]["graph"] = before * missed
    assert verdicts(document, key, wanted) == [False]


def test_many_rows_of_wide_heads_may_take_their_arithmetic(document, row_of):
    key = "verify gemma-full L=131072 M=16"
    row = row_of(key)
    row_of("prefill gemma-full L=8192 causal")["times"]["flashpte"]["graph"] *= 2
    limit = row["flop"] / (0.85 * 0.4 * 790e6)
    assert limit > 1.35 * ours(row_of("decode gemma-full L=131072 M=1"))
    row["times"]["flashpte"]["graph"] = 0.99 * limit
    assert verdicts(document, key, "of our decode") == [True]
    row["times"]["flashpte"]["graph"] = 1.01 * limit
    assert verdicts(document, key, "of our decode") == [False]


def test_a_map_is_shared_by_the_layers(row_of):
    row = row_of("decode gemma-sliding L=4096 M=1")
    time = ours(row)
    row["map"]["flashpte"] = 50.0
    assert ours(row) == pytest.approx(time + 1.0)


def test_plain_mode_counts_the_compiled_program(document, row_of):
    key = "decode llama-8b L=4096 M=1"
    row = row_of(key)
    row["times"]["flashpte"]["plain"] *= 10
    assert verdicts(document, key, "plain mode") == [False]
    row["times"]["flashpte aoti"] = {"plain": row["times"]["fa3"]["plain"]}
    assert ours_plain(row)[1] == "flashpte aoti"
    assert verdicts(document, key, "plain mode (flashpte aoti)") == [True]


def test_the_tables_tile(document, row_of):
    key = "other group-3 L=4096 M=6"
    row_of(key)["sweep"]["ratio"] = 1.16
    assert verdicts(document, key) == [False]


def test_what_is_missing_is_not_judged(document, row_of):
    for row in document["rows"]:
        row["times"] = {label: {"failed": "no"} for label in row["times"]}
        row.pop("sweep", None)
    assert targets.judge(document) == []
    assert "not measured: gemma-full L=2048 M=1" in targets.lines(document)
    assert best_peer(row_of("decode llama-8b L=2048 M=1")) is None


def test_a_later_row_replaces_an_earlier_one(document, row_of):
    new = {**row_of("decode llama-8b L=2048 M=1"), "map": {}}
    count = len(document["rows"])
    put(document, new)
    assert len(document["rows"]) == count
    assert document["rows"][-1] is new


def test_differences_of_two_runs(document, row_of):
    import copy

    again = copy.deepcopy(document)
    assert max(differences(document, again))[0] == 0
    scale(row_of("prefill qwen3.5 L=2048 causal"), "flashpte", 0.9)
    largest, case, label = differences(document, again)[0]
    assert (case, label) == ("prefill qwen3.5 L=2048 causal", "flashpte")
    assert largest == pytest.approx(1 / 0.9 - 1)
