"""Exports on a GPU: prompts of many lengths, up to the last slot, as CUDA graphs, and errors."""

import json
import shutil

import pytest
import torch
from gpu_models import follow, tampered

from flashpte.export.check.eager_model import eager_pair, rebuild
from flashpte.export.runtime import InputError, Program
from flashpte.export.runtime.language_model import CacheFullError, LanguageModel

pytestmark = pytest.mark.gpu

LENGTH = 4096
MODELS = ("gemma", "llama")


@pytest.fixture(scope="module", params=MODELS)
def case(request, model_folder):
    """A program and the eager models that it must follow: in its own dtype, and the reference."""
    folder = model_folder(request.param)
    program = Program.open(folder)
    return program, *eager_pair(rebuild(program.manifest, None))


@pytest.fixture(scope="module")
def sequence():
    return torch.randint(0, 512, (LENGTH,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize("length", [1, 5, 500, 3000])
def test_prompts_of_every_length(case, sequence, length):
    model = LanguageModel(case[0])
    model.reset()
    logits = model.prefill(sequence[:length])
    assert model.position == length
    assert logits.shape == (1, 1, 512)
    follow(*case[1:], sequence[:length], logits)


def test_to_the_last_slot_and_no_further(case, sequence):
    program = case[0]
    model = LanguageModel(program)
    model.reset()
    model.prefill(sequence[:-40])
    for token in sequence[-40:-1]:
        model.decode(token)
    follow(*case[1:], sequence, model.decode(sequence[-1]))
    assert model.position == LENGTH
    before = {name: tensor.clone() for name, tensor in program.buffers.items()}
    for call in (lambda: model.decode(7), lambda: model.prefill([1, 2]), lambda: model.call("target_verify", [1] * 5)):
        with pytest.raises(CacheFullError, match="4096 positions"):
            call()
    assert all(torch.equal(before[name], tensor) for name, tensor in program.buffers.items())


def steps(program, sequence):
    """Logits of a prompt past the window, then decodes and verifies."""
    model = LanguageModel(program)
    model.reset()
    found = [model.prefill(sequence[:150])]
    at = 150
    for _ in range(20):
        found.append(model.decode(sequence[at]))
        found.append(model.call("target_verify", sequence[at + 1 : at + 6]))
        at += 6
    torch.cuda.synchronize()
    return found, {name: tensor.clone() for name, tensor in program.buffers.items()}


def test_graphs_give_the_same_bits(case, sequence):
    program = case[0]
    plain, caches = steps(program, sequence)
    # Capture in the middle of a sequence: it runs the method, but must leave no trace.
    for method in ("decode", "target_verify"):
        program.capture(method)
    assert program.captured == ("decode", "target_verify")
    try:
        for name, tensor in program.buffers.items():
            assert torch.equal(caches[name], tensor), f"capturing changed {name}"
        replayed, after = steps(program, sequence)
    finally:
        for method in ("decode", "target_verify"):
            program.release(method)
    for index, (a, b) in enumerate(zip(plain, replayed, strict=True)):
        assert torch.equal(a, b), f"call {index} differs"
    assert all(torch.equal(caches[name], after[name]) for name in caches)


def test_graphs_from_the_start_and_results_that_stay(model_folder, sequence):
    program = Program.open(model_folder("llama"), cuda_graphs=True)
    assert set(program.captured) == {"decode", "target_verify"}
    assert not any(tensor.any() for tensor in program.buffers.values())
    model = LanguageModel(program)
    model.prefill(sequence[:9])
    first = model.decode(1)
    kept = first.clone()
    model.decode(2)
    torch.cuda.synchronize()
    assert torch.equal(first, kept)
    with pytest.raises(InputError, match="dynamic"):
        program.capture("prefill")


def test_a_rewritten_position(case, sequence):
    """After rejected drafts, going back and writing the same tokens gives the same logits."""
    model = LanguageModel(case[0])
    model.reset()
    model.prefill(sequence[:100])
    expected = model.decode(sequence[100])
    model.call("target_verify", [9, 8, 7, 6, 5])
    model.move_back(100)
    assert torch.equal(model.decode(sequence[100]), expected)


def test_reset_forgets(case, sequence):
    program = case[0]
    LanguageModel(program).prefill(sequence[:10])
    assert any(tensor.any() for tensor in program.buffers.values())
    program.reset()
    assert not any(tensor.any() for tensor in program.buffers.values())


def test_text_on_the_command_line(model_folder, run_model_process):
    folder = model_folder("llama")
    ids = ",".join(str(i % 512) for i in range(600))
    arguments = ("--prompt-ids", ids, "--max-new-tokens", "50", "--ignore-eos", "--json", "-q")
    graphs, plain = (run_model_process(folder, *arguments, flag) for flag in ("--cuda-graph", "--no-cuda-graph"))
    assert graphs.code == plain.code == 0, graphs.err + plain.err
    first, second = json.loads(graphs.out), json.loads(plain.out)
    assert first["tokens"] == second["tokens"]
    assert len(first["tokens"]) == 50
    assert first["statistics"]["cuda_graphs"] == ["decode", "target_verify"]
    assert second["statistics"]["cuda_graphs"] == []
    assert first["statistics"]["peak_gpu_bytes"] > 0
    assert first["statistics"]["decode_p99_s"] >= first["statistics"]["decode_median_s"] > 0


def test_a_full_cache_is_an_error(model_folder, run_model_process):
    ids = ",".join(["3"] * (LENGTH - 2))
    done = run_model_process(
        model_folder("gemma"), "--prompt-ids", ids, "--max-new-tokens", "9", "--ignore-eos", "--json", "-q"
    )
    assert done.code == 1
    assert "the cache is full: 4096 positions hold the prompt and 2 new tokens, 9 were asked for" in done.error
    assert len(json.loads(done.out)["tokens"]) == 3


def without_weights(good, out):
    shutil.copytree(good, out)
    (out / "aoti_cuda_blob.ptd").unlink()
    return out


def for_another_gpu(good, out):
    shutil.copytree(good, out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["arch"] = "sm_80"
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


@pytest.mark.parametrize(
    ("make", "environment", "said"),
    [
        (lambda good, out: good, {"CUDA_VISIBLE_DEVICES": ""}, "no GPU: model.pte runs on an sm_"),
        (tampered, {}, "model.pte is not the file that manifest.json describes"),
        (without_weights, {}, "aoti_cuda_blob.ptd is missing"),
        (for_another_gpu, {}, "compiled for sm_80, but"),
    ],
    ids=["no GPU", "hash", "no ptd", "arch"],
)
def test_wrong_inputs_end_in_one_line(make, environment, said, model_folder, run_model_process, tmp_path):
    folder = make(model_folder("llama"), tmp_path / "copy")
    done = run_model_process(folder, "--prompt-ids", "1,2,3", "-q", **environment)
    assert (done.code, done.out) == (1, "")
    assert said in done.error
    assert len(done.err.splitlines()) == 1


def test_a_prompt_longer_than_the_cache(model_folder, run_model_process):
    ids = ",".join(["3"] * (LENGTH + 1))
    done = run_model_process(model_folder("llama"), "--prompt-ids", ids, "-q")
    assert (done.code, done.out) == (1, "")
    assert "the prompt has 4097 tokens, the cache holds 4096" in done.error


def test_a_profile(model_folder, run_model_process):
    done = run_model_process(model_folder("gemma"), "--profile", "--contexts", "512,2048", "--json", "-q")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert [(row["case"]["name"], row["case"]["context"]) for row in rows] == [
        (name, context) for context in (512, 2048) for name in ("prefill", "target_verify", "decode")
    ]
    for row in rows:
        assert all(row["families_us"][family] > 0 for family in ("attention", "matmul", "rest")), row
        assert row["total_us"] > 0
        assert row["kernels"] > 10
