"""A ``.pt2`` of one method on a GPU: prefill of any length after any prefix, with its own cache."""

import json

import pytest
import torch
from gpu_models import follow, tampered

from flashpte.export.check.eager_model import eager_pair, rebuild
from flashpte.export.runtime import InputError, Program
from flashpte.export.runtime.language_model import CacheFullError, LanguageModel

pytestmark = pytest.mark.gpu

MODEL, LENGTH, CHUNK = "llama-pt2", 4096, 512


@pytest.fixture(scope="module")
def program(model_folder):
    return Program.open(model_folder(MODEL))


@pytest.fixture(scope="module")
def eager(program):
    """The model in its own dtype and the reference."""
    return eager_pair(rebuild(program.manifest, None))


@pytest.fixture(scope="module")
def sequence():
    return torch.randint(0, 512, (LENGTH,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture
def model(program):
    found = LanguageModel(program)
    found.reset()
    return found


def held(program):
    program.synchronize()
    return {name: tensor.clone() for name, tensor in program.buffers.items()}


def test_one_method_and_its_caches(program, model):
    assert (model.limits.prefill, model.limits.decode, model.limits.verify) == ((2, CHUNK), False, None)
    assert set(program.buffers) == {f"kv_cache.{letter}_{layer}" for letter in "kv" for layer in range(4)}
    assert all(tensor.is_cuda and not tensor.any() for tensor in program.buffers.values())


# Up to 16 rows run the kernel for few rows. The chunk before the last gives up tokens for the shortest prefill.
@pytest.mark.parametrize("length", [2, 15, 16, 17, 511, 512, 513, 3000])
def test_prompts_of_every_length(model, eager, sequence, length):
    logits = model.prefill(sequence[:length])
    assert model.position == length
    assert logits.shape == (1, 1, 512)
    follow(*eager, sequence[:length], logits)


def test_calls_see_the_keys_of_those_before_to_the_last_slot(program, model, eager, sequence):
    at = 0
    for size in (2, 7, 300, 16, 2, 17, CHUNK, 31):
        logits = model.call("prefill", sequence[at : at + size])
        at += size
        follow(*eager, sequence[:at], logits)
    model.prefill(sequence[at : LENGTH - 2])
    follow(*eager, sequence, model.call("prefill", sequence[-2:]))
    before = held(program)
    with pytest.raises(CacheFullError, match="4096 positions"):
        model.call("prefill", [1, 2])
    assert all(torch.equal(before[name], tensor) for name, tensor in program.buffers.items())


def test_only_the_slots_of_a_call_are_written(program, model, sequence):
    model.prefill(sequence[:100])
    before = held(program)
    model.call("prefill", sequence[100:140])
    for name, tensor in held(program).items():
        assert torch.equal(tensor[:, :, :100], before[name][:, :, :100]), name
        assert tensor[:, :, 100:140].any(dim=-1).all(), name
        assert not tensor[:, :, 140:].any(), name


def test_the_buffers_are_what_the_method_reads(program, model, sequence):
    """Clearing the buffers from outside is a reset, and restoring them undoes it: the package has no copy of them."""
    model.prefill(sequence[:200])
    kept = held(program)
    expected = model.call("prefill", sequence[200:220]).clone()
    for name, tensor in program.buffers.items():
        tensor.copy_(kept[name])
    model.move_back(200)
    assert torch.equal(model.call("prefill", sequence[200:220]), expected)
    for tensor in program.buffers.values():
        tensor.zero_()
    model.move_back(200)
    assert not torch.equal(model.call("prefill", sequence[200:220]), expected)


def test_reset_forgets(program, model, eager, sequence):
    first = model.prefill(sequence[:150]).clone()
    model.prefill(sequence[150:400])
    model.reset()
    assert not any(tensor.any() for tensor in program.buffers.values())
    assert torch.equal(model.prefill(sequence[:150]), first)
    follow(*eager, sequence[:150], first)


def test_two_programs_have_caches_of_their_own(program, model, model_folder, sequence):
    model.prefill(sequence[:50])
    before = held(program)
    other = LanguageModel(Program.open(model_folder(MODEL)))
    other.prefill(sequence[1000:1300])
    after = held(program)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("size", [1, CHUNK + 1])
def test_a_length_it_was_not_compiled_for_is_refused(program, size):
    tokens, positions = torch.zeros(1, size, dtype=torch.int64), torch.arange(size)
    with pytest.raises(InputError, match=r"prefill: input tokens.* was given shape"):
        program.run("prefill", tokens, positions)
    with pytest.raises(InputError, match="they must be equal"):
        program.run("prefill", tokens.new_zeros(1, 4), torch.arange(5))


def test_a_method_of_dynamic_shapes_is_no_graph(model_folder):
    program = Program.open(model_folder(MODEL), cuda_graphs=True)
    assert program.captured == ()
    with pytest.raises(InputError, match="dynamic"):
        program.capture("prefill")


def test_the_check_passes(model_folder, run_model_process):
    done = run_model_process(model_folder(MODEL), "--check", "--json", "-q")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["passed"]
    assert {entry["what"] for entry in report["comparisons"]} == {"prefill logits", "full keys", "full values"}
    assert report["calls"]["prefill"] >= 9
    assert report["unchecked_methods"] == []


def test_the_first_token_and_no_other(model_folder, run_model_process):
    arguments = (model_folder(MODEL), "--prompt-ids", "1,2,3", "--ignore-eos", "--json", "-q", "--max-new-tokens")
    done = run_model_process(*arguments, "1")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["tokens"]) == 1
    done = run_model_process(*arguments, "2")
    assert (done.code, done.out) == (1, "")
    assert "the program has no method decode" in done.error


def test_another_file_is_not_run(model_folder, run_model_process, tmp_path):
    wrong = tampered(model_folder(MODEL), tmp_path / "copy", "model.pt2")
    done = run_model_process(wrong, "--check", "-q")
    assert (done.code, done.out) == (1, "")
    assert "model.pt2 is not the file that manifest.json describes" in done.error


def test_a_file_that_is_no_package_ends_in_one_line(model_folder, run_model_process, tmp_path):
    """With ``--unverified``, any error of the loader must also be one line."""
    wrong = tampered(model_folder(MODEL), tmp_path / "copy", "model.pt2")
    data = (wrong / "model.pt2").read_bytes()
    (wrong / "model.pt2").write_bytes(data[: len(data) // 2])
    done = run_model_process(wrong, "--check", "--unverified", "-q")
    assert (done.code, done.out) == (1, "")
    assert "cannot load" in done.error
    assert len(done.err.splitlines()) == 1
