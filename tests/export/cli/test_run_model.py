"""``run-model`` without a GPU: flags, errors, and every task with a program that runs eagerly."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from eager_program import EagerProgram, small_plan
from model_folder import write_model_folder

import flashpte.export.cli.run_model as command
from flashpte.export.cli.run_model_flags import build_run_parser, check_run_arguments
from flashpte.export.lowering.describe_methods import describe_method
from flashpte.export.pipeline import export_programs

pytestmark = pytest.mark.xdist_group("run command")


@pytest.fixture(scope="module")
def plan():
    return small_plan(max_seq_len=24, layers=2)


@pytest.fixture(scope="module")
def folder(plan, tmp_path_factory):
    """A folder as export-model writes it, without the compiled code."""
    methods = {name: describe_method(p) for name, p in export_programs(plan).items()}
    return write_model_folder(tmp_path_factory.mktemp("model"), methods, plan.constant_methods, plan.manifest())


@pytest.fixture
def eager(plan, monkeypatch):
    """Replaces the compiled program by an eager one and records the options that it was opened with."""
    made = []

    def install(program=None):
        def open_program(options, progress):
            made.append(options)
            return program or EagerProgram(plan)

        monkeypatch.setattr(command, "open_program", open_program)
        return made

    return install


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: MODEL_DIR"),
        (["."], "give --prompt TEXT or --prompt-ids IDS, --check, --profile or --perplexity FILE (none"),
        ([".", "--prompt", "a", "--prompt-ids", "1"], "(both were given)"),
        ([".", "--prompt-ids", "1,x"], "'1,x' is not a list of whole numbers"),
        ([".", "--prompt-ids=-1"], "holds a negative number"),
        ([".", "--check", "--profile"], "--check and --profile cannot be combined"),
        ([".", "--profile", "--perplexity", "a"], "--profile and --perplexity cannot be combined"),
        ([".", "--prompt", "a", "--window", "9"], "--window belongs to --perplexity, this is generating text"),
        ([".", "--perplexity", "a", "--window", "1"], "--window 1: must be at least 2"),
        ([".", "--check", "--prompt", "a"], "--prompt belongs to generating text, this is --check"),
        ([".", "--prompt", "a", "--checkpoint", "."], "--checkpoint belongs to --check, this is generating text"),
        ([".", "--prompt", "a", "--contexts", "5"], "--contexts belongs to --profile"),
        ([".", "--profile", "--chat"], "--chat belongs to generating text"),
        ([".", "--prompt-ids", "1", "--chat"], "--chat needs --prompt"),
        ([".", "--prompt", "a", "--seed", "3"], "--seed belongs to --temperature"),
        ([".", "--prompt", "a", "--temperature", "-1"], "--temperature -1.0: must be 0 or more"),
        ([".", "--prompt", "a", "--temperature", "nan"], "must be 0 or more"),
        ([".", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        ([".", "--profile", "--contexts", "0,5"], "--contexts: must be at least 1"),
        ([".", "--profile", "--plot", "x.bmp"], "must end in .png"),
        ([".", "--promt", "a"], "unknown flag --promt; did you mean --prompt?"),
    ],
)
def test_wrong_options(run_model, arguments, said):
    ended = run_model(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.error
    assert len(ended.err.splitlines()) == 1


def test_loud_and_quiet(run_model):
    ended = run_model(".", "--prompt", "a", "-v", "-q")
    assert (ended.code, "they are opposites" in ended.error) == (2, True)


def test_wrong_folders(run_model, tmp_path):
    for arguments, said in (
        ((tmp_path / "no", "--check"), "does not exist"),
        ((tmp_path, "--check"), "has no manifest.json: give a folder that export-model wrote"),
        ((tmp_path, "--check", "--checkpoint", tmp_path / "no"), "--checkpoint"),
    ):
        ended = run_model(*arguments)
        assert ended.code == 1
        assert said in ended.error


def test_help_needs_no_torch():
    code = (
        "import sys; from flashpte.export.cli import run_main\n"
        "try: run_main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert run_main(['nowhere', '--check']) == 1\n"
        "assert not {'torch', 'transformers', 'rich'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("--prompt-ids", "--no-cuda-graph", "--contexts", "examples:", "exit codes:"):
        assert word in done.stdout


def test_defaults(tmp_path):
    options = check_run_arguments(build_run_parser().parse_args([str(tmp_path), "--prompt", "x"]))
    assert (options.max_new_tokens, options.temperature, options.seed, options.cuda_graph) == (128, 0.0, 0, True)
    assert not options.unverified


def test_no_gpu_is_one_line(run_model, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for task in (("--prompt-ids", "1,2"), ("--check",), ("--profile",)):
        ended = run_model(folder, *task, "-q")
        assert (ended.code, ended.out) == (1, "")
        assert "no GPU: model.pte runs on an sm_90 GPU" in ended.error


def test_a_prompt_is_checked_before_the_program_is_loaded(run_model, folder, eager):
    opened = eager()
    for ids, code, said in (
        ("1,512", 2, "prompt token 512 is not in the vocabulary (0..511)"),
        (",".join(["1"] * 25), 1, "the prompt has 25 tokens, the cache holds 24"),
    ):
        ended = run_model(folder, "--prompt-ids", ids, "-q")
        assert ended.code == code
        assert said in ended.error
    ended = run_model(folder, "--prompt", "hello", "-q")
    assert (ended.code, "has no tokenizer: give --prompt-ids" in ended.error) == (1, True)
    assert not opened


def test_tokens_and_statistics(run_model, folder, eager, plan):
    eager()
    ended = run_model(folder, "--prompt-ids", "5,6,7", "--max-new-tokens", "4", "--ignore-eos", "-q")
    assert ended.code == 0
    first, *rest = ended.out.splitlines()
    model = EagerProgram(plan)
    logits = model.run("prefill", torch.tensor([[5, 6, 7]]), torch.arange(3))[0]
    assert first.split()[0] == str(int(logits[0, -1].argmax()))
    assert len(first.split()) == 4
    text = "\n".join(rest)
    for part in ("load", "time to first token", "prefill", "decode", "p99", "CUDA graphs"):
        assert part in text


def test_json_is_all_there_is_on_stdout(run_model, folder, eager):
    options = eager()
    ended = run_model(
        folder, "--prompt-ids", "5,6,7", "--max-new-tokens", "4", "--ignore-eos", "--json", "--no-cuda-graph"
    )
    document = json.loads(ended.out)
    assert document["prompt_tokens"] == [5, 6, 7]
    assert len(document["tokens"]) == 4
    assert (document["text"], document["stopped"]) == (None, "length")
    assert document["statistics"]["decode_tokens"] == 3
    assert not options[0].cuda_graph
    assert "generating" in ended.err


def test_a_full_cache_ends_in_an_error_after_the_last_token(run_model, folder, eager):
    program = EagerProgram(small_plan(max_seq_len=24, layers=2))
    eager(program)
    ids = ",".join(["3"] * 20)
    ended = run_model(folder, "--prompt-ids", ids, "--max-new-tokens", "9", "--ignore-eos", "--json", "-q")
    assert ended.code == 1
    assert len(json.loads(ended.out)["tokens"]) == 5
    assert "the cache is full: 24 positions hold the prompt and 4 new tokens, 9 were asked for" in ended.error
    assert max(start + count for _, count, start in program.calls) == 24


@pytest.fixture
def folder_with_text(folder, tmp_path):
    """A folder whose tokenizer has one token per letter, so the test can read both input and output."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(0x4E00 + i): i for i in range(512)}
    inner = Tokenizer(models.BPE(letters, []))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    copy = tmp_path / "text"
    shutil.copytree(folder, copy)
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        data = (copy / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_text_in_and_out(run_model, folder_with_text, eager, plan):
    copy = folder_with_text
    program = EagerProgram(plan)
    eager(program)
    prompt = "".join(chr(0x4E00 + i) for i in (5, 6, 7))
    ended = run_model(copy, "--prompt", prompt, "--max-new-tokens", "4", "--ignore-eos", "--json", "-q")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert document["prompt_tokens"] == [5, 6, 7]
    assert document["text"] == "".join(chr(0x4E00 + token) for token in document["tokens"])
    shown = run_model(copy, "--prompt", prompt, "--max-new-tokens", "4", "--ignore-eos", "-q")
    assert shown.out.startswith(document["text"] + "\n")
    chat = run_model(copy, "--prompt", prompt, "--chat", "-q")
    assert (chat.code, "no chat template" in chat.error) == (1, True)


def test_perplexity_of_a_file(run_model, folder, folder_with_text, eager, plan, tmp_path):
    eager(EagerProgram(plan))
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(0x4E00 + 7 * i % 512) for i in range(50)), encoding="utf-8")
    ended = run_model(folder_with_text, "--perplexity", text, "--json", "-q")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    # The caches hold 24 positions, target_verify takes 5 at a time.
    assert (found["tokens"], found["window"], found["predicted"]) == (50, 20, 19 + 19 + 9)
    shown = run_model(folder_with_text, "--perplexity", text, "--window", "20", "-q").out
    assert shown == f"perplexity {found['perplexity']:.4f} over 47 tokens, in windows of 20\n"
    text.write_bytes(b"\xff")
    for arguments, code, said in (
        ((folder_with_text, "--perplexity", text), 1, "is not UTF-8"),
        ((folder_with_text, "--perplexity", tmp_path / "no"), 1, "is not an existing file"),
        ((folder, "--perplexity", text), 1, "has no tokenizer"),
    ):
        ended = run_model(*arguments, "-q")
        assert (ended.code, said in ended.error) == (code, True), ended.error


def test_a_check_says_what_quantized_weights_cost(run_model, eager, tmp_path):
    quantized = small_plan(max_seq_len=24, layers=1, method="decode", verify_window=None, qrecipe="default")
    programs = export_programs(quantized).items()
    described = {name: describe_method(program) for name, program in programs}
    folder = write_model_folder(tmp_path, described, quantized.constant_methods, quantized.manifest())
    eager(EagerProgram(quantized))
    found = run_model(folder, "--check", "-q")
    assert found.code == 0, found.out
    assert "accuracy against the unquantized model: relative logits error" in found.out


def test_check_ends_with_its_verdict(run_model, folder, eager, plan):
    eager()
    good = run_model(folder, "--check", "-q")
    assert good.code == 0
    assert good.out.splitlines()[-1] == "check passed"
    eager(EagerProgram(plan, unshared="decode"))
    bad = run_model(folder, "--check", "--json", "-q")
    assert (bad.code, bad.err) == (1, "")
    assert json.loads(bad.out)["passed"] is False
