"""What ``export-model`` does with correct arguments, up to the call that generates code."""

import json
import os
import subprocess
import sys

import pytest

from flashpte.export.lowering import several_arches
from flashpte.export.models.gemma4 import GEMMA4_SMALL

SMALL = ("--target", "gemma4-31b", "--small", "--layers", "1")


def test_help_and_targets_need_no_torch():
    code = (
        "import sys; from flashpte.export.cli import main\n"
        "assert main(['--list-targets']) == 0\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert main(['--target', 'gema4-31b']) == 2\n"
        "assert not {'torch', 'transformers', 'rich'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gemma4-31b  Gemma 4 31B" in done.stdout
    for word in ("--max-seq-len", "default:", "examples:", "exit codes:"):
        assert word in done.stdout


def test_dry_run_prints_the_table_and_writes_nothing(export_model, tmp_path):
    result = export_model(*SMALL, "--dry-run", "--verify-window", "4")
    assert result.code == 0
    lines = result.out.splitlines()
    for method, kernel in (("prefill", "dispatch"), ("decode", "decode"), ("target_verify", "verify")):
        row = lines[lines.index(method) + 1].split()
        assert row[:2] == ["layers", "0"]
        assert row[-2] == f"sdpa_{kernel}"
    assert not list(tmp_path.iterdir())


def test_dry_run_of_the_full_size_touches_no_weights(export_model):
    result = export_model("--target", "gemma4-31b", "--layers", "6", "--dry-run", "--method", "decode", "-q")
    assert result.code == 0
    assert not result.err
    assert result.out.count("sdpa_decode") == 2
    assert "layers 0-4 x5 " in result.out
    assert "layers 5 " in result.out
    assert max(map(len, result.out.splitlines())) <= 100


def test_progress_names_stages_and_time_on_stderr(export_model):
    result = export_model(*SMALL, "--dry-run", "--method", "decode")
    lines = result.err.splitlines()
    assert [line.partition("] ")[2] for line in lines] == ["export decode", "replace attention in decode", "done"]
    assert all(line.startswith("[") and " s] " in line for line in lines)
    assert not export_model(*SMALL, "--dry-run", "--method", "decode", "-q").err


def test_report_is_json_with_every_node(export_model, tmp_path):
    report = tmp_path / "report.json"
    assert export_model(*SMALL, "--dry-run", "-q", "--report", report).code == 0
    content = json.loads(report.read_text())
    assert (content["version"], content["target"], content["attention"]) == (1, "gemma4-31b", "flashpte")
    assert content["routing"].keys() == {"prefill", "decode"}
    (node,) = content["routing"]["decode"]["nodes"]
    assert node["op"] == "flashpte::sdpa_decode"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_checkpoint_goes_to_lower(export_model, lowered, checkpoint, output):
    result = export_model(
        *("--target", "hf", "--checkpoint", checkpoint, "--output-dir", output, "--arch", "sm_80"),
        *("--dtype", "fp16", "--max-seq-len", "32", "--max-prefill-chunk", "8", "--verify-window", "3"),
    )
    assert result.code == 0
    (call,) = lowered
    assert list(call["programs"]) == ["prefill", "decode", "target_verify"]
    assert all("flashpte" in program.graph_module.code for program in call["programs"].values())
    assert (call["output_dir"], call["arch"], call["format"], call["attention"]) == (output, "sm_80", "pte", "flashpte")
    assert call["constant_methods"]["get_max_prefill_chunk"] == 8
    assert {path.name for path in call["extra_files"]} >= {"tokenizer.json", "tokenizer_config.json"}
    manifest = call["manifest"]
    assert manifest["target"] == "hf"
    assert manifest["model"]["dtype"] == "float16"
    assert manifest["weights"] == "checkpoint"
    assert manifest["routing"]["target_verify"]["nodes"][0]["op"] == "flashpte::sdpa_verify"
    assert str(checkpoint) not in json.dumps(manifest)
    assert "sdpa_verify" in result.out
    *_, file, then, check, prompt, profile = result.out.splitlines()
    assert file.split() == ["2.9", "KiB", str(output / "model.pte")]
    assert then == "next, on an sm_90 GPU:"
    assert check == f"  run-model {output} --check --checkpoint {checkpoint}"
    assert prompt == f'  run-model {output} --prompt "The capital of France is"'
    assert profile == f"  run-model {output} --profile"
    assert "] lower" in result.err


@pytest.mark.parametrize("attention", ["executorch", "math"])
def test_no_replace_leaves_attention_alone(export_model, lowered, output, attention):
    result = export_model(*SMALL, "--random-weights", "-q", "--no-replace", attention, "--output-dir", output)
    assert result.code == 0
    (call,) = lowered
    assert call["attention"] == attention
    assert call["manifest"]["routing"] == {}
    for program in call["programs"].values():
        assert "scaled_dot_product_attention" in program.graph_module.code
        assert "flashpte" not in program.graph_module.code
    assert f"attention was not replaced (--no-replace {attention})" in result.out


def test_files_for_executorchs_runner_end_with_its_name(export_model, lowered, output):
    result = export_model(*SMALL, "--random-weights", "-q", "--runner", "executorch", "--output-dir", output)
    assert result.code == 0
    (call,) = lowered
    assert call["device_tensors"] is True
    assert call["manifest"]["runner"] == "executorch-gemma"
    assert result.out.splitlines()[-1] == (
        f"next: give model.pte aoti_cuda_blob.ptd of {output} to ExecuTorch's Gemma 4 31B runner (docs/executorch.md)"
    )


def test_several_archs_go_to_their_own_lowering(export_model, monkeypatch, output):
    calls = []
    monkeypatch.setattr(several_arches, "lower_for_each", lambda *arguments: calls.append(arguments) or ())
    flags = (*SMALL, "--random-weights", "-q", "--method", "decode")
    assert export_model(*flags, "--arch", "sm_80, sm_90", "--output-dir", output).code == 0
    ((_, arches, folder, _, methods),) = calls
    assert (arches, folder, methods) == (("sm_80", "sm_90"), output, 1)
    for wrong in ("sm_80,sm_80", "sm_80,", ","):
        assert export_model(*SMALL, "--dry-run", "--arch", wrong).code == 2
    assert export_model(*SMALL, "--dry-run", "--arch", "sm_80,sm_91").code == 2


def test_config_file_and_one_method_for_pt2(export_model, lowered, tmp_path, output):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**GEMMA4_SMALL, "num_hidden_layers": 6, "vocab_size": 128}))
    flags = ("--target", "gemma4-31b", "--config", config, "--random-weights", "--seed", "5", "--layers", "1")
    result = export_model(*flags, "--format", "pt2", "--method", "decode", "--output-dir", output, "-q")
    assert result.code == 0
    (call,) = lowered
    assert (list(call["programs"]), call["format"]) == (["decode"], "pt2")
    assert call["constant_methods"]["get_vocab_size"] == 128
    assert call["manifest"]["weights"] == {"random_seed": 5}


def test_report_into_a_pipe_and_through_a_link(export_model, tmp_path):
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "folder" / "report.json"
    os.mkfifo(pipe)
    file.parent.mkdir()
    link.symlink_to(file)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    dry_run = (*SMALL, "--dry-run", "-q", "--method", "decode")
    assert export_model(*dry_run, "--report", pipe).code == 0
    through_pipe, _ = reader.communicate(timeout=10)
    assert export_model(*dry_run, "--report", link).code == 0
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert json.loads(through_pipe) == json.loads(file.read_text())
    assert [path.name for path in file.parent.iterdir()] == ["report.json"]
