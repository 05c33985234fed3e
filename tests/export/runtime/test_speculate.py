"""``run-model`` with a draft: text, comparisons, statistics and errors, with a program that runs eagerly."""

import dataclasses
import json

import pytest
from eager_program import EagerProgram, small_plan
from model_folder import write_model_folder

import flashpte.export.cli.run_model as command
from flashpte.export.common.errors import UsageError
from flashpte.export.files.signature import read_signature
from flashpte.export.lowering.describe_methods import describe_method
from flashpte.export.pipeline import export_programs
from flashpte.export.runtime import ProgramError
from flashpte.export.runtime.language_model import CacheFullError, LanguageModel
from flashpte.export.runtime.speculate import (
    SpeculativeStatistics,
    check_speculation,
    decode_plainly,
    has_draft,
    speculate,
)

pytestmark = pytest.mark.xdist_group("speculate")

LENGTH, CHAIN = 48, 4
PROMPT = [5, 6, 7, 300, 41]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """An untied head: with random weights, a head tied to the embedding repeats the last token forever."""
    from flashpte.export.models.gemma4 import GEMMA4_SMALL

    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps({**GEMMA4_SMALL, "tie_word_embeddings": False}))
    return path


@pytest.fixture(scope="module")
def plan(config):
    return small_plan(small=False, config=config, max_seq_len=LENGTH, layers=3, chain=CHAIN, with_decode=True)


@pytest.fixture(scope="module")
def without_decode(config):
    return small_plan(small=False, config=config, max_seq_len=LENGTH, layers=3, chain=CHAIN)


@pytest.fixture(scope="module")
def described(plan):
    """The manifest's description of each exported method."""
    return {name: describe_method(program) for name, program in export_programs(plan).items()}


def write_folder(plan, methods, folder):
    """A folder as export-model writes it, but without the compiled code."""
    own = {spec.name: methods[spec.name] for spec in plan.methods}
    return write_model_folder(folder, own, plan.constant_methods, plan.manifest())


@pytest.fixture(scope="module")
def folder(plan, described, tmp_path_factory):
    return write_folder(plan, described, tmp_path_factory.mktemp("drafted"))


@pytest.fixture
def program(plan):
    return EagerProgram(plan)


@pytest.fixture
def use(monkeypatch):
    def install(program):
        monkeypatch.setattr(command, "open_program", lambda options, progress: program)
        return program

    return install


def greedily(plan, prompt, count):
    """Plain decoding with a separate program."""
    model = LanguageModel(EagerProgram(plan))
    logits, tokens = model.prefill(prompt), []
    for _ in range(count):
        tokens.append(int(logits[0, -1].argmax()))
        logits = model.decode(tokens[-1]) if len(tokens) < count else logits
    return tokens


def test_greedy_text_is_that_of_plain_decoding(plan, program):
    expected = greedily(plan, PROMPT, 20)
    assert len(set(expected)) > 6
    shown = []
    found = speculate(program, PROMPT, max_new_tokens=20, on_token=shown.append)
    assert list(found.tokens) == shown == expected
    assert (found.stopped, found.name, found.forced) == ("length", "speculative", None)
    assert found.later == 19
    assert {method for method, _, _ in program.calls} == {"prefill", "target_verify", "draft_decode"}
    assert decode_plainly(program, PROMPT, max_new_tokens=20).tokens == found.tokens
    assert speculate(program, PROMPT, max_new_tokens=20, chain=0).tokens == found.tokens


def test_a_prompt_of_one_token(program):
    """The prompt is too short for prefill, so target_verify takes it."""
    found = speculate(program, [7], max_new_tokens=9)
    assert not any(method == "prefill" for method, _, _ in program.calls)
    assert found.tokens == decode_plainly(program, [7], max_new_tokens=9).tokens


@pytest.mark.parametrize("forced", [0, 2, 4])
def test_forced_acceptance(program, forced):
    found = speculate(program, PROMPT, max_new_tokens=1 + 3 * (forced + 1), forced=forced)
    assert found.acceptance.mean_accepted_length == forced + 1
    assert found.acceptance.rounds == 3
    assert found.name == f"forced acceptance {forced}"
    assert found.later == 3 * (forced + 1)


def test_times(program):
    ticks = iter(range(100))
    found = speculate(program, PROMPT, max_new_tokens=9, forced=3, clock=lambda: float(next(ticks)))
    assert (found.first_token_s, found.later, found.later_s, found.tokens_per_s) == (1.0, 8, 2.0, 4.0)
    one = speculate(program, PROMPT, max_new_tokens=1)
    assert (one.later, one.tokens_per_s, one.acceptance.rounds) == (0, None, 0)


def test_a_stop_token_ends_it_and_is_not_shown(plan, program):
    expected = greedily(plan, PROMPT, 6)
    shown = []
    found = speculate(program, PROMPT, max_new_tokens=20, stop={expected[3]}, on_token=shown.append)
    assert (list(found.tokens), found.stopped) == (expected[:4], "stop token")
    assert shown == expected[:3]


def test_the_same_seed_gives_the_same_text(program):
    runs = [speculate(program, PROMPT, max_new_tokens=20, temperature=2.0, seed=seed).tokens for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_logits_that_are_no_numbers_are_an_error(plan):
    class Poisoned(EagerProgram):
        def run(self, method, *inputs):
            results = super().run(method, *inputs)
            if method == "target_verify":
                results[0][0, 2, 9] = float("nan")
            return results

    for temperature in (0.0, 1.0):
        with pytest.raises(ProgramError, match="the logits hold nan"):
            speculate(Poisoned(plan), PROMPT, max_new_tokens=9, forced=4, temperature=temperature)


def test_wrong_requests(plan, program):
    with pytest.raises(CacheFullError, match="has 49 tokens, the cache holds 48"):
        check_speculation(plan.constant_methods, [1] * 49)
    with pytest.raises(UsageError, match="force_accept=5: the draft proposes 4"):
        check_speculation(plan.constant_methods, PROMPT, (0, 5))
    check_speculation(plan.constant_methods, [1], (0, 4))
    with pytest.raises(UsageError, match="token 512"):
        speculate(program, [512], max_new_tokens=1)


def test_signatures_of_the_tests_are_those_of_the_export(described, program):
    for name, method in described.items():
        made, true = program.signatures[name], read_signature(name, method)
        for mine, theirs in zip(made.inputs + made.outputs, true.inputs + true.outputs, strict=True):
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
    assert has_draft(program.signatures)
    assert not has_draft({"prefill": None, "target_verify": None, "decode": None})


ARGUMENTS = ("--prompt-ids", ",".join(map(str, PROMPT)), "--ignore-eos", "-q")


def test_a_run_beside_plain_decode_and_forced_acceptance(run_model, folder, use, program, plan):
    use(program)
    ended = run_model(folder, *ARGUMENTS, "--max-new-tokens", "12", "--force-accept", "0,2,4", "--json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert document["tokens"] == greedily(plan, PROMPT, 12)
    found = document["statistics"]
    assert (found["tokens"], found["forced_acceptance"], found["first_difference_from_plain_decode"]) == (12, None, -1)
    assert len(found["acceptance_per_position"]) == CHAIN
    assert found["mean_accepted_length"] >= 1
    forced = [f"forced acceptance {n}" for n in (0, 2, 4)]
    assert list(found["compared"]) == ["plain decode", *forced]
    for name in forced:
        run = found["compared"][name]
        assert run["tokens"] == 12
        assert run["tokens_per_s"] > 0
    assert [found["compared"][name]["rounds"] for name in forced] == [11, 4, 3]


def test_a_table_for_people(run_model, folder, use, program):
    use(program)
    ended = run_model(folder, *ARGUMENTS, "--max-new-tokens", "12", "--force-accept", "4")
    assert ended.code == 0, ended.err
    tokens, _, *table = ended.out.splitlines()
    assert len(tokens.split()) == 12
    assert table[0].split() == ["tokens", "tokens/s", "tokens/round", "accepted", "at", "position", "1,", "2,", "..."]
    assert [row.split()[0] for row in table[1:4]] == ["speculative", "plain", "forced"]
    assert table[3].split()[-4:] == ["1.00"] * 4
    assert table[4] == "plain decode chose another token: nowhere"
    assert table[-1] == "CUDA graphs: none"


def test_without_decode_nothing_is_compared(run_model, without_decode, described, use, tmp_path):
    program = use(EagerProgram(without_decode))
    ended = run_model(write_folder(without_decode, described, tmp_path), *ARGUMENTS, "--max-new-tokens", "6", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)["statistics"]
    assert (found["compared"], found["first_difference_from_plain_decode"]) == ({}, None)
    assert sum(method == "prefill" for method, _, _ in program.calls) == 1  # no warm-up either


def test_a_full_cache(run_model, folder, use, program):
    use(program)
    ids = ",".join(["3", "9"] * 23)
    ended = run_model(folder, "--prompt-ids", ids, "--ignore-eos", "-q", "--json", "--max-new-tokens", "9")
    assert ended.code == 1
    assert len(json.loads(ended.out)["tokens"]) == 3
    assert "the cache is full: 48 positions hold the prompt and 2 new tokens, 9 were asked for" in ended.error
    assert max(start + count for _, count, start in program.calls) == LENGTH


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--prompt-ids", "1,2", "--force-accept", "5"), 2, "--force-accept 5: the draft proposes 4 tokens a round"),
        (("--prompt-ids", ",".join(["1"] * 49)), 1, "the prompt has 49 tokens, the cache holds 48"),
        (("--check", "--force-accept", "1"), 2, "--force-accept belongs to generating text"),
        (("--prompt-ids", "1", "--draft", "."), 2, "--draft belongs to --check"),
        (("--prompt-ids", "1", "--force-accept", "a"), 2, "'a' is not a list"),
        (("--check", "--draft", "nowhere"), 1, "--draft nowhere does not exist"),
    ],
)
def test_wrong_options(run_model, folder, monkeypatch, arguments, code, said):
    monkeypatch.setattr(command, "open_program", lambda options, progress: pytest.fail("was loaded"))
    ended = run_model(folder, *arguments, "-q")
    assert (ended.code, ended.out) == (code, "")
    assert said in ended.error


def test_check_ends_with_its_verdict(run_model, folder, use, plan):
    use(EagerProgram(plan))
    good = run_model(folder, "--check", "-q")
    assert good.code == 0, good.out + good.err
    assert any(line.startswith("draft: ") for line in good.out.splitlines())
    use(EagerProgram(plan, late="draft_decode"))
    bad = run_model(folder, "--check", "--json", "-q")
    assert (bad.code, json.loads(bad.out)["passed"]) == (1, False)
    ended = run_model(folder, "--check", "--draft", folder, "-q")
    assert (ended.code, "random draft, not one of a folder" in ended.error) == (1, True)


def test_where_plain_decode_differs(program):
    found = speculate(program, PROMPT, max_new_tokens=6)
    plain = decode_plainly(program, PROMPT, max_new_tokens=6)
    other = dataclasses.replace(plain, tokens=(*plain.tokens[:4], 9, 9))
    assert SpeculativeStatistics(0.0, 5, (found, plain)).first_difference == -1
    statistics = SpeculativeStatistics(0.0, 5, (found, other), peak_bytes=1 << 20, captured=("target_verify",))
    assert statistics.first_difference == 4
    text = "\n".join(statistics.lines())
    assert "another token: first at new token 5" in text
    assert "peak GPU memory 1.0 MiB" in text
    assert "CUDA graphs: target_verify" in text
    assert SpeculativeStatistics(0.0, 5, (found, other), sampled=True).first_difference is None
