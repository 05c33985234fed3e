"""examples/cpp_runner: it reads what an export has, and its loops make the calls that the Python runtime makes.

The C++ file is compiled against tests/support/executorch_standin, which has ExecuTorch's names and a toy model.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from eager_program import signatures

from flashpte.export.common.options import METHOD_NAMES
from flashpte.export.models.methods import MethodSpec, constant_methods
from flashpte.export.runtime.generate import generate as decode
from flashpte.export.runtime.language_model import LanguageModel
from flashpte.export.speculative import SpeculativeProgram, generate
from flashpte.export.state.layer_state import StateRules

EXAMPLE = Path(__file__).parents[3] / "examples" / "cpp_runner"
STANDIN = Path(__file__).parents[2] / "support" / "executorch_standin"
SOURCE = (EXAMPLE / "main.cpp").read_text()
VOCAB = 50


class ToyProgram:
    """The toy model of the stand-in's module.h, called like a ``Program``; ``calls`` is what calls.txt should hold."""

    def __init__(self, constants):
        self.constants = constants
        window = constants.get("get_verify_window", 2)
        prefill = constants["get_min_prefill_chunk"], constants["get_max_prefill_chunk"]
        ranges = {"prefill": prefill, "decode": (1, 1), "target_verify": (window, window)}
        self.signatures = signatures(ranges, VOCAB)
        self.buffers, self.states, self.calls = {}, (), []
        self.target, self.draft = {-1: 1}, {-1: 1}

    def scores(self, state):
        return torch.tensor([float((state % 250 + 1) * v * 37 % 251) for v in range(1, VOCAB + 1)])

    def run(self, method, tokens, *others):
        ids, positions = tokens[0].tolist(), others[-1].tolist()
        self.calls.append(" ".join(map(str, [method, positions[0], *ids])))
        if method == "draft_decode":
            for token, (at, held) in zip(ids, others[0][0].long().tolist(), strict=True):
                self.draft[at] = (self.draft[at - 1] * 17 + token + held * 3) % 499
                state = (held * 31 + token + 7) % 997
            best = int(self.scores(state).argmax())
            proposal = best if self.draft[at] % 3 else (best + 1) % VOCAB
            return [torch.tensor([[proposal]]), torch.tensor([[[at + 1.0, state]]])]
        for at, token in zip(positions, ids, strict=True):
            self.target[at] = (self.target[at - 1] * 31 + token + 7) % 997
        rows = positions if method == "target_verify" else positions[-1:]
        logits = torch.stack([self.scores(self.target[at]) for at in rows])[None]
        return [logits, torch.tensor([[[float(at), self.target[at]] for at in positions]])]

    def synchronize(self):
        pass


def toy_constants(context=64, least=2, most=6, chain=None, **others):
    values = {
        "get_max_seq_len": context,
        "get_max_context_len": context,
        "get_vocab_size": VOCAB,
        "get_min_prefill_chunk": least,
        "get_max_prefill_chunk": most,
        **others,
    }
    if chain is not None:
        window = chain + 1
        values |= {"get_chain_len": chain, "get_verify_window": window, "get_max_draft_tokens": max(most, window)}
    return values


def write_toy(folder, constants, methods=None, inputs=2, manifest="{}"):
    draft = {"target_verify": inputs, "draft_decode": 3} if "get_chain_len" in constants else {}
    methods = methods or {"prefill": inputs, "decode": inputs, **draft}
    lines = [f"constant {name} {' '.join(map(str, [value] if isinstance(value, int) else value))}"
             for name, value in constants.items()]  # fmt: skip
    lines += [f"method {name} {count}" for name, count in methods.items()]
    (folder / "model.pte").write_text("\n".join(lines))
    (folder / "aoti_cuda_blob.ptd").touch()
    (folder / "manifest.json").write_text(manifest)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    binary = tmp_path_factory.mktemp("cpp_runner") / "cpp_runner"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-DCPP_RUNNER_TOKENIZER", "-I", STANDIN]
    done = subprocess.run([compiler, *flags, EXAMPLE / "main.cpp", "-o", binary], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def run(folder, *args):
        return subprocess.run([binary, folder, *map(str, args)], capture_output=True, text=True, timeout=60)

    return run


def prompt_of(length):
    return [(7 * i + 3) % VOCAB for i in range(length)]


def ids(done):
    return [int(word) for word in done.stdout.split()]


def prompt_ids(prompt):
    return "--prompt-ids", ",".join(map(str, prompt))


def calls_of(folder):
    return [line for line in (folder / "calls.txt").read_text().splitlines() if not line.startswith("load")]


# ---- the file names what an export has


def exported_constants():
    """Names of the constants that export-model writes, from the functions that write them."""
    specs = [MethodSpec(name, 1, 2, True) for name in METHOD_NAMES]
    names = set(constant_methods(specs, max_seq_len=8, vocab_size=8, bos_id=1, eos_ids=[2]))
    draft = (Path(__file__).parents[3] / "export" / "models" / "eagle3_methods.py").read_text()
    return names | set(re.findall(r'"(get_\w+)"', draft))


def test_every_constant_that_it_reads_is_exported():
    read = set(re.findall(r'"((?:get|use)_\w+)"', SOURCE))
    assert len(read) >= 8
    assert read <= exported_constants()


def test_every_method_that_it_runs_is_exported():
    called = set(re.findall(r'program\.run\("(\w+)"', SOURCE))
    assert called == set(METHOD_NAMES)


def test_it_knows_the_rules_of_states_as_the_manifest_writes_them():
    rules = StateRules("recurrent", {}, goes_back="snapshot", fed_twice=False)
    written = json.dumps({"states": [rules.to_dict()]}, indent=2)
    phrases = [phrase.replace('\\"', '"') for phrase in re.findall(r'says\("(.*?)"\)', SOURCE)]
    assert len(phrases) == 2
    assert all(phrase in written for phrase in phrases)


# ---- the loops


@pytest.mark.parametrize("least", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 8, 13, 40])
def test_plain_decoding_makes_the_calls_of_the_python_runtime(runner, tmp_path, length, least):
    constants = toy_constants(least=least)
    write_toy(tmp_path, constants)
    program = ToyProgram(constants)
    expected = decode(LanguageModel(program), prompt_of(length), max_new_tokens=9)
    done = runner(tmp_path, *prompt_ids(prompt_of(length)), "--max-new-tokens", 9)
    assert (done.returncode, ids(done)) == (0, list(expected.tokens)), done.stderr
    assert calls_of(tmp_path) == program.calls
    assert len(set(expected.tokens)) > 3


@pytest.mark.parametrize(("least", "most"), [(1, 6), (2, 6), (2, 3), (5, 6)])
@pytest.mark.parametrize("chain", [1, 4])
@pytest.mark.parametrize("length", [1, 2, 5, 7, 8, 13, 19, 40])
def test_speculation_makes_the_calls_of_the_python_loop(runner, tmp_path, length, chain, least, most):
    constants = toy_constants(least=least, most=most, chain=chain)
    write_toy(tmp_path, constants)
    if chain + 1 < length < least:
        done = runner(tmp_path, *prompt_ids(prompt_of(length)), "--max-new-tokens", 20)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: the prompt is too short for prefill, too long for target_verify\n"
        return
    program = ToyProgram(constants)
    sizes = SpeculativeProgram.from_constants(constants)
    expected = generate(program.run, sizes, prompt_of(length), 20)
    done = runner(tmp_path, *prompt_ids(prompt_of(length)), "--max-new-tokens", 20)
    assert (done.returncode, ids(done)) == (0, list(expected.tokens)), done.stderr
    assert calls_of(tmp_path) == program.calls
    accepted = expected.acceptance
    assert 0 < sum(accepted.accepted) < sum(accepted.offered)
    shares = " ".join(f"{100 * share:.1f}%" for share in accepted.per_position if share is not None)
    assert f" {accepted.mean_accepted_length:.1f} in {accepted.rounds} rounds, proposals kept {shares}" in done.stderr


@pytest.mark.parametrize("length", [3, 13, 15, 16])
@pytest.mark.parametrize("chain", [None, 3])
def test_a_full_cache_ends_the_text_after_its_last_slot(runner, tmp_path, length, chain):
    constants = toy_constants(context=16, chain=chain)
    write_toy(tmp_path, constants)
    program = ToyProgram(constants)
    if chain is None:
        expected = decode(LanguageModel(program), prompt_of(length), max_new_tokens=99)
    else:
        expected = generate(program.run, SpeculativeProgram.from_constants(constants), prompt_of(length), 99)
    done = runner(tmp_path, *prompt_ids(prompt_of(length)))
    assert (done.returncode, ids(done)) == (1, list(expected.tokens))
    assert "the cache is full" in done.stderr
    assert calls_of(tmp_path) == program.calls


@pytest.mark.parametrize("chain", [None, 3])
def test_an_end_of_text_token_ends_it_and_is_not_shown(runner, tmp_path, chain):
    write_toy(tmp_path, toy_constants(chain=chain))
    everything = ids(runner(tmp_path, *prompt_ids([1, 2, 3]), "--max-new-tokens", 20))
    assert len(everything) == 20
    end = everything[6]
    write_toy(tmp_path, toy_constants(chain=chain, get_eos_ids=[end, VOCAB + 1]))
    done = runner(tmp_path, *prompt_ids([1, 2, 3]), "--max-new-tokens", 20)
    assert (done.returncode, ids(done)) == (0, everything[: everything.index(end)])
    done = runner(tmp_path, *prompt_ids([1, 2, 3]), "--max-new-tokens", 20, "--ignore-eos")
    assert ids(done) == everything


@pytest.mark.parametrize("bits", [16, 17], ids=["float16", "bfloat16"])
def test_logits_of_16_bits(runner, tmp_path, bits):
    constants = toy_constants(chain=2)
    write_toy(tmp_path, constants)
    expected = ids(runner(tmp_path, *prompt_ids([1, 2, 3])))
    write_toy(tmp_path, {**constants, "toy_bits": bits})
    assert ids(runner(tmp_path, *prompt_ids([1, 2, 3]))) == expected


@pytest.mark.parametrize("chain", [None, 3])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_sampled_tokens_have_the_targets_distribution(runner, tmp_path, chain, temperature):
    count = 6000
    write_toy(tmp_path, toy_constants(context=2 * count, chain=chain, toy_constant=1))
    done = runner(tmp_path, *prompt_ids([1, 2]), "--max-new-tokens", count, "--temperature", temperature, "--seed", 5)
    drawn = ids(done)
    p = (ToyProgram(toy_constants()).scores(5).double() / 128 / temperature).softmax(0)
    wanted = count * p
    found = torch.bincount(torch.tensor(drawn), minlength=VOCAB)
    statistic, freedom = float(((found - wanted) ** 2 / wanted).sum()), VOCAB - 1
    assert wanted.min() > 5
    tail = torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2))
    assert float(tail) > 1e-4
    # independent draws: as many equal neighbors as chance gives
    equal = sum(a == b for a, b in itertools.pairwise(drawn))
    chance = float((p**2).sum())
    assert abs(equal - count * chance) < 5 * math.sqrt(count * chance)
    again = runner(tmp_path, *prompt_ids([1, 2]), "--max-new-tokens", 50, "--temperature", temperature, "--seed", 5)
    other = runner(tmp_path, *prompt_ids([1, 2]), "--max-new-tokens", 50, "--temperature", temperature, "--seed", 6)
    assert ids(again) == drawn[:50] != ids(other)


# ---- options


def test_cuda_graphs_are_asked_for_before_methods_load(runner, tmp_path):
    write_toy(tmp_path, toy_constants(chain=3))
    runner(tmp_path, *prompt_ids([1, 2, 3]))
    option = "CudaBackend enable_cuda_graph_for_method=decode,target_verify"
    loads = [line for line in (tmp_path / "calls.txt").read_text().splitlines() if line.startswith("load")]
    assert loads == [f"load {name} [{option}]" for name in ("prefill", "target_verify", "draft_decode")]
    runner(tmp_path, *prompt_ids([1, 2, 3]), "--no-cuda-graph", "--no-draft")
    loads = [line for line in (tmp_path / "calls.txt").read_text().splitlines() if line.startswith("load")]
    assert loads == [f"load {name} []" for name in ("prefill", "decode")]


def test_text_goes_through_the_tokenizer(runner, tmp_path):
    write_toy(tmp_path, toy_constants(get_bos_id=49))
    done = runner(tmp_path, "--prompt", "ABC")
    assert (done.returncode, done.stderr) == (1, f"error: {tmp_path}/tokenizer.json is missing; give --prompt-ids\n")
    (tmp_path / "tokenizer.json").touch()
    expected = ids(runner(tmp_path, *prompt_ids([1, 2, 3]), "--max-new-tokens", 8))
    done = runner(tmp_path, "--prompt", "ABC", "--max-new-tokens", 8)
    assert done.stdout == "".join(chr(token + 64) for token in expected) + "\n"
    expected = ids(runner(tmp_path, *prompt_ids([49, 1, 2, 3]), "--max-new-tokens", 8))
    done = runner(tmp_path, "--prompt", "ABC", "--bos", "--max-new-tokens", 8)
    assert done.stdout == "".join(chr(token + 64) for token in expected) + "\n"


def test_states_that_cannot_go_back_are_decoded_token_by_token(runner, tmp_path):
    rules = StateRules("recurrent", {}, goes_back="snapshot", fed_twice=False)
    write_toy(tmp_path, toy_constants(chain=3), manifest=json.dumps({"states": [rules.to_dict()]}, indent=2))
    runner(tmp_path, *prompt_ids([1, 2, 3]), "--max-new-tokens", 4)
    assert [call.split()[0] for call in calls_of(tmp_path)] == ["prefill", "decode", "decode", "decode"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--prompt-ids", "1,50"], 2, "prompt token 50 is no token"),
        (["--prompt-ids", ",".join(["1"] * 65)], 2, "the prompt has 65 tokens, the cache holds 64"),
        (["--prompt-ids", "1,x"], 2, "--prompt-ids x: not a number in range"),
        (["--prompt-ids", "1", "--max-new-tokens", "0"], 2, "--max-new-tokens must be at least 1"),
        (["--prompt-ids", "1", "--temperature", "-1"], 2, "--temperature must be at least 0"),
        (["--prompt-ids", "1", "--seed"], 2, "--seed needs a value"),
        (["--prompt-ids", "1", "--top-p", "1"], 2, "unknown argument --top-p"),
        ([], 2, "give one of --prompt and --prompt-ids"),
    ],
)
def test_wrong_options_are_one_line(runner, tmp_path, args, code, message):
    write_toy(tmp_path, toy_constants())
    done = runner(tmp_path, *args)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"error: {message}\n")


def test_wrong_folders_are_one_line(runner, tmp_path):
    def error(*args):
        done = runner(tmp_path, *prompt_ids([1, 2, 3]), *args)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert f"{tmp_path}/model.pte is missing" in error()
    write_toy(tmp_path, toy_constants(), inputs=3)
    assert "prefill has other inputs: export without --runner executorch-gemma" in error()
    write_toy(tmp_path, toy_constants(), methods={"prefill": 2})
    assert "no decode, no draft" in error()
    write_toy(tmp_path, toy_constants(chain=2), methods={"prefill": 2, "target_verify": 2, "draft_decode": 3})
    assert "export with --with-decode" in error("--no-draft")
    constants = toy_constants()
    del constants["get_max_context_len"]
    write_toy(tmp_path, constants)
    assert "the program has no get_max_context_len" in error()


def test_it_compiles_without_a_tokenizer(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-I", STANDIN]
    done = subprocess.run([compiler, *flags, EXAMPLE / "main.cpp"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
