"""Every wrong input gives one line that names the problem, the right exit code, and no output."""

import json

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
        (
            ("--target", "gemma4-31b", "--output-dir", "OUT"),
            "no weights: give --checkpoint DIR, --gguf-file FILE or --random-weights",
        ),
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
        ((*GEMMA, "--output-dir", "OUT", "--format", "pt2", "--runner", "executorch"), "--runner needs --format pte"),
        ((*GEMMA, "--output-dir", "OUT", "--runner", "vllm"), "--runner vllm: must be executorch, executorch-text"),
        ((*GEMMA, "--output-dir", "OUT", "--runner", "executorch", "--verify-window", "4"), "cannot be combined"),
        (
            (*GEMMA, "--output-dir", "OUT", "--runner", "executorch-text"),
            "layer 0 keeps a window of 64 tokens in a ring",
        ),
        ((*GEMMA, "--checkpoint", "x", "--output-dir", "OUT"), "--random-weights cannot be combined"),
        ((*GEMMA, "--qlinear", "5w", "--output-dir", "OUT"), "--qlinear 5w: must be 4w or 8w"),
        ((*GEMMA, "--qhead", "5w", "--output-dir", "OUT"), "--qhead 5w: must be 4w or 8w"),
        ((*GEMMA, "--qembedding", "4w", "--qrecipe", "default", "--output-dir", "OUT"), "--qrecipe and --qembedding"),
        ((*GEMMA, "--qalgorithm", "hqq", "--output-dir", "OUT"), "is for weights of 4 bits: add --qlinear 4w"),
        ((*GEMMA, "--qlinear-group-size", "32", "--output-dir", "OUT"), "belongs to --qlinear 4w"),
        ((*GEMMA, "--config", "x", "--output-dir", "OUT"), "--small and --config cannot be combined"),
        ((*GEMMA, "--dry-run", "--no-replace", "math"), "--dry-run and --no-replace cannot be combined"),
        ((*GEMMA, "-v", "--dry-run"), "--verbose and --quiet cannot be combined"),
        (("--target", "gemma4-31b", "--seed", "3", "--dry-run"), "--seed belongs to --random-weights"),
        ((*GEMMA, "--output-dir", ""), "--output-dir: the path is empty"),
        (("--target", "hf", "--checkpoint", "", "--output-dir", "OUT"), "--checkpoint: the path is empty"),
        (
            (*GEMMA, "--output-dir", "OUT", "--method", "decode", "--verify-window", "4"),
            "--verify-window belongs to the method target_verify, which --method decode leaves out",
        ),
        (
            (*GEMMA, "--output-dir", "OUT", "--method", "decode", "--max-prefill-chunk", "8"),
            "--max-prefill-chunk belongs to the method prefill, which --method decode leaves out",
        ),
        ((*GEMMA, "--output-dir", "OUT", "--report", "OUT"), "is in the --output-dir, which is replaced as a whole"),
        ((*GEMMA, "--output-dir", "OUT", "--report", "OUT/r.json"), "is in the --output-dir"),
        ((*GEMMA, "--ouput-dir", "OUT"), "unknown flag --ouput-dir; did you mean --output-dir?"),
        ((*GEMMA, "--max-seq", "8", "--output-dir", "OUT"), "unknown flag --max-seq; did you mean --max-seq-len?"),
    ],
    ids=lambda value: None if isinstance(value, tuple) else value[:40],
)
def test_wrong_options_exit_2(export_model, output, arguments, named):
    result = export_model(*(str(argument).replace("OUT", str(output)) for argument in arguments))
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
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))


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
        (other_model, "transformers has no causal language model of model_type 't5'"),
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


def test_inputs_in_the_output_folder(export_model, checkpoint, tmp_path):
    result = export_model("--target", "hf", "--checkpoint", checkpoint, "--output-dir", checkpoint)
    assert result.code == 2
    assert f"--checkpoint {checkpoint} is in the --output-dir" in result.error
    config = checkpoint / "config.json"
    arguments = ("--target", "hf", "--config", config, "--random-weights")
    assert "is in the --output-dir" in export_model(*arguments, "--output-dir", checkpoint).error
    result = export_model(*arguments, "--output-dir", tmp_path / "out", "--report", config)
    assert "--report and --config name the same file" in result.error


def test_names_that_are_too_long(export_model, tmp_path, output):
    long = tmp_path / ("x" * 300)
    for arguments in (
        (*GEMMA, "--output-dir", long),
        (*GEMMA, "--output-dir", output, "--report", long),
        ("--target", "hf", "--checkpoint", long, "--output-dir", output),
        ("--target", "hf", "--config", long, "--dry-run"),
    ):
        result = export_model(*arguments)
        assert result.code == 1
        assert "File name too long" in result.error
        assert "unexpected" not in result.error


def test_output_into_the_current_folder(export_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = export_model(*GEMMA, "--output-dir", ".")
    assert result.code == 1
    assert ". is the current folder" in result.error


def test_a_missing_compiler_is_found_before_the_model_is_built(export_model, monkeypatch, output):
    from flashpte.export.lowering.cross_compile import toolchain

    fail_with(monkeypatch, AssertionError("too late"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    toolchain.find_compiler.cache_clear()
    try:
        result = export_model(*GEMMA, "--output-dir", output)
    finally:
        toolchain.find_compiler.cache_clear()
    assert "no-such-compiler is not on PATH" in result.error


def test_libraries_do_not_log_errors(export_model, monkeypatch, output):
    import logging

    import flashpte.export.pipeline

    def plan_export(options):
        try:
            raise RuntimeError("inner")
        except RuntimeError:
            logging.getLogger("torch.somewhere").exception("a traceback")
            raise

    monkeypatch.setattr(flashpte.export.pipeline, "plan_export", plan_export)
    assert "unexpected RuntimeError: inner" in export_model(*GEMMA, "--output-dir", output).error


def test_recipe_files(export_model, tmp_path):
    flags = ("--target", "gemma4-31b", "--small", "--random-weights", "--qrecipe")
    result = export_model(*flags, tmp_path / "none.toml", "--dry-run")
    assert result.code == 1
    assert f"--qrecipe {tmp_path / 'none.toml'} is neither default, sensitive nor an existing file" in result.error
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("rules = [['nothing', 'int8']]")
    result = export_model(*flags, recipe, "--dry-run")
    assert (result.code, "rule 1: 'nothing' matches no weight of this model" in result.error) == (1, True)
    for more, said in (
        (("--report", recipe, "--dry-run"), "--report and --qrecipe name the same file"),
        (("--output-dir", tmp_path), f"--qrecipe {recipe} is in the --output-dir"),
    ):
        result = export_model(*flags, recipe, *more)
        assert (result.code, said in result.error) == (2, True), result.error
