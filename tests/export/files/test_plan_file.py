"""The plan of an export in entries, as a file."""

import json
from pathlib import Path

import pytest

from flashpte.export.common.errors import ExportError, UsageError
from flashpte.export.common.options import ExportOptions
from flashpte.export.files.output_folder import OutputError
from flashpte.export.files.plan_file import PlanFile, command_line, parts_folder, read_plan_file, write_plan_file

OPTIONS = ExportOptions(
    "hf", checkpoint=Path("check point"), verify_window=4, attention="math", qrecipe="default", midm_sdpa=False
)
PLAN = PlanFile(OPTIONS, Path("out"), ("sm_80", "sm_90"), ("prefill", "decode"), {"torch": "2.13.0", "g++": "12"})


@pytest.fixture
def path(tmp_path):
    write_plan_file(PLAN, tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_a_plan_is_read_as_it_was_written(path):
    assert read_plan_file(path) == PLAN
    assert read_plan_file(path).digest == PLAN.digest
    assert [entry.name for entry in path.parent.iterdir()] == ["plan.json"]
    assert parts_folder(path) == path.parent / "plan.parts"


def test_the_file_says_what_to_run(path):
    *compiled, join = json.loads(path.read_text())["entries"]
    assert [entry["id"] for entry in compiled] == ["prefill-sm_80", "decode-sm_80", "prefill-sm_90", "decode-sm_90"]
    assert compiled[1] == {
        "id": "decode-sm_80",
        "method": "decode",
        "arch": "sm_80",
        "run": ["export-model", "--plan", str(path), "--entry", "decode-sm_80"],
    }
    assert (join["id"], join["after"]) == ("join", [entry["id"] for entry in compiled])
    assert json.loads(path.read_text())["options"]["checkpoint"] == "check point"
    assert command_line(Path("a b"), "join") == "export-model --plan 'a b' --entry join"


@pytest.mark.parametrize(
    "other",
    [
        PlanFile(ExportOptions("hf", random_seed=0), PLAN.output_dir, PLAN.arches, PLAN.methods, PLAN.versions),
        PlanFile(OPTIONS, PLAN.output_dir, ("sm_90",), PLAN.methods, PLAN.versions),
        PlanFile(OPTIONS, PLAN.output_dir, PLAN.arches, PLAN.methods, {**PLAN.versions, "g++": "13"}),
    ],
    ids=["options", "arches", "versions"],
)
def test_another_plan_has_another_digest(other):
    assert other.digest != PLAN.digest


def test_an_entry_by_its_id(path):
    plan = read_plan_file(path)
    assert (plan.entry("decode-sm_90").method, plan.entry("decode-sm_90").arch) == ("decode", "sm_90")
    with pytest.raises(UsageError, match=r"no entry 'decode'; it has prefill-sm_80, .*, decode-sm_90, join$"):
        plan.entry("decode")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not JSON", "is not a plan: it is not JSON"),
        ("[1]", "is not a plan that export-model wrote"),
        ('{"generator": "flashpte", "version": 2, "arch": "sm_90"}', "is not a plan that export-model wrote"),
    ],
)
def test_another_file_is_refused(path, text, said):
    path.write_text(text)
    with pytest.raises(ExportError, match=said):
        read_plan_file(path)


@pytest.mark.parametrize(
    ("field", "wrong", "said"),
    [
        ("version", 2, "is a plan of version 2, this flashpte reads 1"),
        ("methods", None, "is not a whole plan: it has no methods"),
        ("methods", [], r"\[\] stands where a list of different texts belongs"),
        ("arches", ["sm_80", "sm_80"], "stands where a list of different texts belongs"),
        ("output_dir", 3, "3 stands where a text belongs"),
        ("versions", ["torch"], "is not a plan that export-model wrote"),
        ("options", {"target": "hf", "new": 1}, "unknown option new"),
        ("options", {}, "has no target|target"),
        ("options", {"target": "hf", "layers": "3"}, "option layers is '3'"),
        ("options", {"target": "hf", "attention": "none"}, "option attention is 'none'"),
        ("options", {"target": "hf", "small": 1}, "option small is 1"),
    ],
)
def test_a_changed_plan_is_refused(path, field, wrong, said):
    content = json.loads(path.read_text())
    content[field] = wrong
    if wrong is None:
        del content[field]
    path.write_text(json.dumps(content))
    with pytest.raises(ExportError, match=said):
        read_plan_file(path)


def test_a_plan_that_cannot_be_read_or_written(path, tmp_path):
    with pytest.raises(ExportError, match=r"cannot read the plan .*: No such file"):
        read_plan_file(tmp_path / "missing.json")
    with pytest.raises(OutputError, match=r"cannot write the plan .*: Not a directory"):
        write_plan_file(PLAN, path / "plan.json")
