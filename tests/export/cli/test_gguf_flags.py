"""``--gguf-file``: an export from a GGUF file, and flags that contradict it."""

from __future__ import annotations

import json

import pytest
from eager_program import EagerProgram
from gguf_files import LLAMA, write_gguf
from model_folder import write_model_folder
from tokenizers import pre_tokenizers

from flashpte.export.cli import run_main, run_model
from flashpte.export.common.options import ExportOptions
from flashpte.export.lowering.describe_methods import describe_method
from flashpte.export.pipeline import export_programs, load_weights, plan_export


def tokenizer(writer):
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])


@pytest.fixture
def gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    config = {**LLAMA, "vocab_size": 260, "num_hidden_layers": 1}
    write_gguf(path, config, {"attn_q": "Q4_0", "ffn_down": "Q6_K"}, tokenizer=tokenizer)
    return path


def test_a_file_goes_to_lower(export_model, lowered, gguf_file, output):
    result = export_model("--target", "hf", "--gguf-file", gguf_file, "--output-dir", output, "-q")
    assert (result.code, result.err) == (0, "")
    (call,) = lowered
    assert "tokenizer.json" in [path.name for path in call["extra_files"]]
    assert call["manifest"]["weights"] == "gguf_file"
    assert [format for _, format in call["manifest"]["weight_formats"]["rules"]] == ["int4-g32-f16", "int8-g32"]
    assert call["constant_methods"]["get_eos_ids"] == [2, 5]
    assert "weights: Q4_0: 1 weight as int4-g32-f16 (codes kept)" in result.out
    assert "weights: Q6_K: 1 weight as int8-g32 (rounded to nearest" in result.out


def test_a_dry_run_reads_it(export_model, gguf_file, tmp_path):
    report = tmp_path / "report.json"
    result = export_model("--target", "hf", "--gguf-file", gguf_file, "--dry-run", "--report", report, "-q")
    assert result.code == 0
    assert json.loads(report.read_text())["weights"] == "gguf_file"


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--random-weights",), 2, "--gguf-file and --random-weights cannot be combined: both name weights"),
        (("--small",), 2, "--gguf-file and --small cannot be combined: the file describes its model"),
        (("--qlinear", "8w"), 2, "--qlinear 8w: the weights are quantized already"),
        (("--qhead", "4w"), 2, "--qhead 4w: the weights are quantized already"),
        (("--qembedding", "8w"), 2, "--qembedding 8w: the weights are quantized already"),
        (("--qrecipe", "default", "--qalgorithm", "hqq"), 2, "--qrecipe default: the weights are quantized already"),
        (("--chain", "2"), 2, "--chain needs --draft DIR"),
    ],
)
def test_flags_that_contradict_it(export_model, gguf_file, output, flags, code, message):
    result = export_model("--target", "hf", "--gguf-file", gguf_file, "--output-dir", output, "-q", *flags)
    assert result.code == code
    assert message in result.error


def test_a_file_that_is_not_there_and_one_that_is_none(export_model, output, tmp_path):
    missing = tmp_path / "none.gguf"
    result = export_model("--target", "hf", "--gguf-file", missing, "--output-dir", output)
    assert f"--gguf-file {missing} is not an existing file" in result.error
    missing.write_text("{}")
    result = export_model("--target", "hf", "--gguf-file", missing, "--output-dir", output, "-q")
    assert f"{missing} is truncated or not a GGUF file" in result.error


def test_the_file_is_not_in_the_output_folder(export_model, gguf_file):
    result = export_model("--target", "hf", "--gguf-file", gguf_file, "--output-dir", gguf_file.parent)
    assert f"--gguf-file {gguf_file} is in the --output-dir" in result.error


def test_a_check_says_why_it_has_no_accuracy(monkeypatch, gguf_file, tmp_path, capsys):
    plan = plan_export(ExportOptions("hf", gguf_file=gguf_file, max_seq_len=24, method="decode"))
    load_weights(plan)
    methods = {name: describe_method(program) for name, program in export_programs(plan).items()}
    (tmp_path / "out").mkdir()
    folder = write_model_folder(tmp_path / "out", methods, plan.constant_methods, plan.manifest())
    monkeypatch.setattr(run_model, "open_program", lambda *_: EagerProgram(plan))
    assert run_main([str(folder), "--check", "--gguf-file", str(gguf_file), "-q"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "accuracy against the unquantized model: not measured, model.gguf was quantized already" in lines


def test_run_model_takes_it_for_a_check_only(gguf_file, tmp_path, capsys):
    assert run_main([str(tmp_path), "--prompt", "a", "--gguf-file", str(gguf_file)]) == 2
    assert "--gguf-file belongs to --check" in capsys.readouterr().err
    assert run_main([str(tmp_path), "--check", "--gguf-file", str(tmp_path / "x")]) == 1
    assert "is not an existing file" in capsys.readouterr().err
