"""Every wrong input: one line that names the thing, the exit code, and no output."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file, save_file

GEMMA = ("--target", "gemma4-31b", "--small", "--random-weights", "-q")


def entries(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "no target: give --target NAME"),
        (("--target", "gema4-31b"), "unknown target 'gema4-31b'; did you mean 'gemma4-31b'?"),
        (("--target", "zzz"), "unknown target 'zzz'; known: gemma4-31b, hf"),
        (("--target", "hf", "--random-weights", "--small", "--output-dir", "OUT"), "target hf has no small model"),
        (("--target", "hf", "--dry-run"), "target hf has no default model: give --checkpoint DIR or --config FILE"),
        (("--target", "gemma4-31b", "--output-dir", "OUT"), "no weights: give --checkpoint DIR or --random-weights"),
        ((*GEMMA,), "no output: give --output-dir DIR"),
        ((*GEMMA, "--output-dir", "OUT", "--arch", "sm_91"), "unknown arch 'sm_91'; did you mean sm_"),
        ((*GEMMA, "--output-dir", "OUT", "--verify-window", "40"), "--verify-window 40: must be 2..16"),
        ((*GEMMA, "--output-dir", "OUT", "--verify-window", "1"), "--verify-window 1: must be 2..16"),
        ((*GEMMA, "--output-dir", "OUT", "--verify-window", "four"), "--verify-window: invalid int value: 'four'"),
        ((*GEMMA, "--output-dir", "OUT", "--max-seq-len", "1"), "--max-seq-len 1: must be at least 2"),
        (
            (*GEMMA, "--output-dir", "OUT", "--max-seq-len", "4", "--verify-window", "8"),
            "--verify-window 8: must not exceed --max-seq-len 4",
        ),
        ((*GEMMA, "--output-dir", "OUT", "--max-seq-len", "5000"), "--max-seq-len 5000: must be 2..4096"),
        ((*GEMMA, "--output-dir", "OUT", "--max-prefill-chunk", "65"), "must be 2..64 (the sliding window)"),
        (
            (*GEMMA, "--output-dir", "OUT", "--max-seq-len", "32", "--max-prefill-chunk", "33"),
            "--max-prefill-chunk 33: must not exceed --max-seq-len 32",
        ),
        ((*GEMMA, "--output-dir", "OUT", "--max-prefill-chunk", "1"), "--max-prefill-chunk 1: must be at least 2"),
        ((*GEMMA, "--output-dir", "OUT", "--layers", "7"), "--layers 7: the model has 6 layers"),
        ((*GEMMA, "--output-dir", "OUT", "--layers", "0"), "--layers 0: must be at least 1"),
        ((*GEMMA, "--output-dir", "OUT", "--seed", "-1"), "--seed -1: must be at least 0"),
        ((*GEMMA, "--output-dir", "OUT", "--dtype", "int8"), "unknown dtype 'int8'; known: bf16, fp16, fp32"),
        ((*GEMMA, "--output-dir", "OUT", "--method", "target_verify"), "--method target_verify needs --verify-window"),
        ((*GEMMA, "--output-dir", "OUT", "--method", "sample"), "invalid choice: 'sample'"),
        ((*GEMMA, "--output-dir", "OUT", "--format", "pt2"), "--format pt2 holds one method: add --method"),
        (
            (*GEMMA, "--output-dir", "OUT", "--format", "pt2", "--method", "decode", "--no-replace", "executorch"),
            "--no-replace executorch needs --format pte",
        ),
        ((*GEMMA, "--checkpoint", "x", "--output-dir", "OUT"), "--random-weights cannot be combined"),
        ((*GEMMA, "--config", "x", "--output-dir", "OUT"), "--small and --config cannot be combined"),
        ((*GEMMA, "--dry-run", "--no-replace", "math"), "--dry-run and --no-replace cannot be combined"),
        ((*GEMMA, "-v", "--dry-run"), "--verbose and --quiet cannot be combined"),
        (("--target", "gemma4-31b", "--seed", "3", "--dry-run"), "--seed belongs to --random-weights"),
        ((*GEMMA, "--ouput-dir", "OUT"), "unknown flag --ouput-dir; did you mean --output-dir?"),
        ((*GEMMA, "--max-seq", "8", "--output-dir", "OUT"), "unknown flag --max-seq; did you mean --max-seq-len?"),
    ],
    ids=lambda value: None if isinstance(value, tuple) else value[:40],
)
def test_wrong_options_exit_2(export_model, output, arguments, named):
    result = export_model(*(output if argument == "OUT" else argument for argument in arguments))
    if "--quiet cannot" in named:
        assert named in result.err
    else:
        assert named in result.error
    assert result.code == 2
    assert not result.out
    assert not output.parent.exists() or not entries(output.parent)


def test_verify_window_wider_than_the_sliding_window(export_model, tmp_path, output):
    from flashpte.export.models.gemma4 import GEMMA4_SMALL

    config = tmp_path / "config.json"
    config.write_text(json.dumps({**GEMMA4_SMALL, "sliding_window": 8}))
    flags = ("--target", "gemma4-31b", "--config", config, "--random-weights", "-q", "--output-dir", output)
    result = export_model(*flags, "--verify-window", "9")
    assert result.code == 2
    assert "--verify-window 9: must not exceed the model's sliding window of 8" in result.error


def lose_config(folder):
    (folder / "config.json").unlink()


def break_config(folder):
    (folder / "config.json").write_text("{")


def other_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def wrong_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:8].clone()
    save_file(tensors, folder / "model.safetensors")


def remove(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def become_a_file(folder):
    remove(folder)
    folder.write_text("")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (remove, "--checkpoint {} does not exist"),
        (become_a_file, "--checkpoint {} is not a folder"),
        (lose_config, "--checkpoint {} has no config.json"),
        (break_config, "model config {}/config.json is not valid JSON"),
        (other_model, "{}/config.json has model_type 'mistral', target hf exports llama, qwen3"),
        (truncate, "{}/model.safetensors is truncated or not a safetensors file"),
        (wrong_shape, "tensor model.norm.weight in {}/model.safetensors has shape [8], the config asks for [16]"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or value[:30],
)
@pytest.mark.parametrize("quiet", [(), ("-q",)], ids=["", "quiet"])
def test_broken_checkpoints_exit_1(export_model, checkpoint, output, damage, named, quiet):
    damage(checkpoint)
    result = export_model("--target", "hf", "--checkpoint", checkpoint, "--output-dir", output, *quiet)
    assert named.format(checkpoint) in result.error
    assert result.code == 1
    assert not result.out
    assert not output.exists()


def test_output_folder_that_cannot_be_made(export_model, tmp_path):
    (tmp_path / "file").write_text("")
    for output, named in (
        (tmp_path / "file", "is a file; give a folder"),
        (tmp_path / "file" / "deep" / "er", f"cannot be made in {tmp_path / 'file'}: Not a directory"),
        ("/proc/flashpte-output", "cannot be made in /proc: "),
    ):
        result = export_model(*GEMMA, "--output-dir", output)
        assert result.code == 1
        assert f"--output-dir {output} {named}" in result.error
    assert [path.name for path in entries(tmp_path)] == ["file"]


def test_output_folder_of_somebody_else(export_model, output):
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    result = export_model(*GEMMA, "--output-dir", output)
    assert result.code == 1
    assert f"{output} is not empty" in result.error
    assert (output / "thesis.tex").read_text() == "precious"


def test_report_that_cannot_be_written(export_model, tmp_path):
    for report, named in (
        (tmp_path, "is a folder; give a file"),
        (tmp_path / "no" / "report.json", f"the folder {tmp_path / 'no'} does not exist"),
        ("/proc/report.json", "cannot be written"),
    ):
        result = export_model("--target", "gemma4-31b", "--small", "--dry-run", "-q", "--report", report)
        assert result.code == 1
        assert str(report) in result.error
        assert named in result.error
        assert not result.out
    assert not entries(tmp_path)


def test_missing_config_file(export_model, tmp_path):
    result = export_model("--target", "hf", "--config", tmp_path / "none.json", "--dry-run")
    assert result.code == 1
    assert f"--config {tmp_path / 'none.json'} is not an existing file" in result.error


def fail_with(monkeypatch, error):
    import flashpte.export.pipeline

    def plan_export(options):
        raise error

    monkeypatch.setattr(flashpte.export.pipeline, "plan_export", plan_export)


def test_what_nobody_expected_is_one_line_too(export_model, monkeypatch, output):
    fail_with(monkeypatch, RuntimeError("first\nsecond"))
    result = export_model(*GEMMA, "--output-dir", output)
    assert result.code == 1
    assert "unexpected RuntimeError: first second (run again with -v" in result.error
    loud = export_model(*GEMMA[:-1], "-v", "--output-dir", output)
    assert loud.code == 1
    assert "Traceback" in loud.err
    assert loud.err.splitlines()[-1].startswith("export-model: error: unexpected RuntimeError")


def test_interrupt_in_this_process(export_model, monkeypatch, output):
    fail_with(monkeypatch, KeyboardInterrupt())
    result = export_model(*GEMMA, "--output-dir", output)
    assert (result.code, result.out) == (130, "")
    assert result.err.splitlines() == ["export-model: interrupted; nothing written"]


def test_ctrl_c_in_the_middle(tmp_path):
    """A real process, interrupted while it exports: one line after the progress, and the folder is as it was."""
    command = [sys.executable, "-c", "import sys; from flashpte.export.cli import main; sys.exit(main())"]
    process = subprocess.Popen(
        [*command, *GEMMA[:-1], "--output-dir", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stderr:
        if "export prefill" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "export-model: interrupted; nothing written"
    assert "Traceback" not in err
    assert not out
    assert not entries(tmp_path)
