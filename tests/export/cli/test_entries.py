"""``export-model --plan``, ``--entry`` and ``--parts``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = ("--target", "gemma4-31b", "--small", "--layers", "1", "--random-weights")


@pytest.fixture
def plan(export_model, tmp_path):
    path = tmp_path / "my plan.json"
    output = tmp_path / "out"
    assert export_model(*SMALL, "--arch", "sm_80,sm_90", "--output-dir", output, "--plan", path).code == 0
    return path


def test_a_plan_is_written_and_nothing_else(export_model, tmp_path):
    plan, output = tmp_path / "plan.json", tmp_path / "out"
    result = export_model(*SMALL, "--method", "decode", "--arch", "sm_80,sm_90", "--output-dir", output, "--plan", plan)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        f"export-model --plan {plan} --entry decode-sm_80",
        f"export-model --plan {plan} --entry decode-sm_90",
        f"export-model --plan {plan} --entry join",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    content = json.loads(plan.read_text())
    assert content["options"] == {
        "target": "gemma4-31b",
        "random_seed": 0,
        "small": True,
        "layers": 1,
        "method": "decode",
    }


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--entry", "join"), "--entry needs --plan FILE"),
        (("--parts", "parts"), "--parts belongs to --entry"),
        (("--plan", "PLAN", "--parts", "parts"), "--parts belongs to --entry"),
        (("--plan", "PLAN", "--entry", "join", "--target", "hf"), "leave out --target"),
        (("--plan", "PLAN", "--entry", "join", "--dtype", "fp16"), "leave out --dtype"),
        (("--plan", "PLAN", "--entry", "join", "--random-weights"), "leave out --random-weights"),
        (("--plan", "PLAN", "--entry", "prefill"), "has no entry 'prefill'; it has prefill-sm_80, decode-sm_80, pre"),
        ((*SMALL, "--plan", "new.json", "--dry-run"), "--plan and --dry-run cannot be combined"),
        ((*SMALL, "--plan", "new.json", "--report", "r.json"), "--plan and --report cannot be combined"),
        ((*SMALL, "--plan", "new.json", "--format", "pt2", "--method", "decode"), "--plan needs --format pte"),
        ((*SMALL, "--plan", "new.json"), "no output: give --output-dir DIR"),
        (("--target", "gemma4-31b", "--plan", "new.json", "--output-dir", "out"), "no weights: give"),
        ((*SMALL, "--plan", "out/plan.json", "--output-dir", "out"), "is in the --output-dir"),
    ],
)
def test_flags_that_do_not_fit(export_model, plan, tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    result = export_model(*(str(plan) if flag == "PLAN" else flag for flag in flags))
    assert result.code == 2
    assert said in result.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my plan.json", "out"]


def test_a_plan_that_cannot_be_used(export_model, plan, tmp_path):
    result = export_model("--plan", tmp_path / "missing.json", "--entry", "join", "-q")
    assert result.code == 1
    assert "cannot read the plan" in result.error
    result = export_model("--plan", plan, "--entry", "join", "-q")
    assert result.code == 1
    assert f"4 of 4 parts are missing in {tmp_path / 'my plan.parts'}: run the entries prefill-sm_80, " in result.error
    result = export_model("--plan", plan, "--entry", "join", "--parts", tmp_path / "elsewhere", "-q")
    assert f"parts are missing in {tmp_path / 'elsewhere'}" in result.error
    (tmp_path / "my plan.parts").write_text("")
    result = export_model("--plan", plan, "--entry", "decode-sm_90", "-q")
    assert result.code == 1
    assert "not a folder, or no permission" in result.error
    plan.write_text("{}")
    result = export_model("--plan", plan, "--entry", "join", "-q")
    assert (result.code, "is not a plan" in result.error) == (1, True)


def test_a_wrong_entry_is_refused_before_torch_loads(plan):
    code = (
        "import sys; from flashpte.export.cli import main\n"
        "assert main(sys.argv[1:]) == 2\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", code, "--plan", str(plan), "--entry", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_an_entry_prints(export_model, plan, monkeypatch, tmp_path):
    from flashpte.export.pipeline import entries

    def compile_method(method, program, *, output, progress, **options):
        progress(f"compiling {method}")
        output.parent.mkdir()
        output.write_bytes(bytes(3000))
        return output

    monkeypatch.setattr(entries, "compile_method", compile_method)
    result = export_model("--plan", plan, "--entry", "decode-sm_90", "--parts", tmp_path / "parts")
    assert result.code == 0
    assert result.out.split(maxsplit=2) == ["2.9", "KiB", f"{tmp_path / 'parts' / 'decode-sm_90.zip'}\n"]
    assert "export prefill" in result.err
    assert "replace attention in decode" in result.err
    assert "compiling decode" in result.err
    assert "replace attention in prefill" not in result.err


EXAMPLES = Path(__file__).parents[3] / "examples" / "scheduled_export"


def write_program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("fails", [False, True])
def test_the_slurm_script_runs_every_entry_and_joins_last(tmp_path, fails):
    """``sbatch`` stands in for Slurm: it runs the tasks of an array at once, and writes down its flags."""
    entries = ("a-sm_80", "b-sm_80", "join")
    commands = "".join(f"export-model --plan plan.json --entry {entry}\\n" for entry in entries)
    write_program(
        tmp_path / "bin" / "export-model",
        f"""echo "export-model $*" >> log
case "$*" in *--output-dir*) printf "{commands}"; exit {int(fails)} ;; esac""",
    )
    write_program(
        tmp_path / "bin" / "sbatch",
        """for flag; do case "$flag" in
  --array=1-*) last=${flag#--array=1-} ;;
  --dependency=*) echo "$flag" >> log ;;
esac; done
for task in $(seq "${last:-1}"); do SLURM_ARRAY_TASK_ID=$task sh -c "$flag"; done
echo '17;cluster'""",
    )
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", str(EXAMPLES / "slurm.sh"), "--target", "hf", "--output-dir", "my out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (int(fails), "")
    log = (tmp_path / "log").read_text().splitlines()
    assert log[0] == "export-model --target hf --output-dir my out --plan plan.json"
    ran = [f"export-model --plan plan.json --entry {entry}" for entry in entries]
    assert log[1:] == ([] if fails else [*ran[:2], "--dependency=afterok:17", ran[2]])


def test_the_workflow_plans_compiles_and_joins(export_model, tmp_path, monkeypatch):
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((EXAMPLES / "github_actions.yml").read_text())
    jobs = workflow["jobs"]
    assert [(name, job.get("needs")) for name, job in jobs.items()] == [
        ("plan", None),
        ("compile", "plan"),
        ("join", "compile"),
    ]
    monkeypatch.chdir(tmp_path)
    assert export_model(*workflow["env"]["FLAGS"].split(), "--plan", "plan.json").code == 0
    ids = [entry["id"] for entry in json.loads(Path("plan.json").read_text())["entries"]]
    assert len(ids) == 7
    assert ids[-1] == "join"
