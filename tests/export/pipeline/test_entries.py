"""An export in entries: each compiles one method in a process of its own, and the last one joins them."""

import json
import multiprocessing
import os
from unittest import mock

import pytest
import torch

from flashpte.export.cli import main
from flashpte.export.common.errors import ExportError
from flashpte.export.files.plan_file import read_plan_file
from flashpte.export.lowering import PartError, parts
from flashpte.export.lowering.program_digest import program_digest
from flashpte.export.pipeline import entries, export_programs, fused_products, plan_export
from flashpte.export.pipeline.entries import compile_entry, join_entries
from flashpte.export.pipeline.fused_products import rewrite_products
from flashpte.export.weights import random


@pytest.fixture
def flags(request, tiny, tmp_path):
    """Flags of an export of one layer; tests may add some."""
    more = getattr(request, "param", ())
    if "--small" not in more:
        (tmp_path / "config.json").write_text(json.dumps({**tiny("llama"), "num_hidden_layers": 1}))
        more = ("--target", "hf", "--config", str(tmp_path / "config.json"), *more)
    return (*more, "--random-weights", "--max-seq-len", "64", "--arch", "sm_80", "-q")


@pytest.fixture
def plan(flags, tmp_path):
    """A plan file in a folder of its own, with that of the output and of the parts."""
    folder = tmp_path / "planned"
    folder.mkdir()
    path = folder / "plan.json"
    assert main([*flags, "--output-dir", str(folder / "out"), "--plan", str(path)]) == 0
    assert [entry.name for entry in folder.iterdir()] == ["plan.json"]
    return path


@pytest.fixture
def no_compiler(monkeypatch):
    """Replaces the compiler: a part holds no code."""

    def compile_method(method, program, *, output, arch, attention, plan, progress):
        library = output.parent.parent / "empty.so"
        library.write_bytes(b"")
        part = parts.Part(method, arch, program_digest(program, attention), plan, parts.build_versions())
        parts.write_part(output, part, parts.Answer(str(library), {}))
        return output

    monkeypatch.setattr(entries, "compile_method", compile_method)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


GEMMA = ("--target", "gemma4-31b", "--small", "--layers", "1")
DRAFT = ("--target", "gemma4-31b", "--small", "--layers", "2", "--chain", "3")


@pytest.mark.parametrize(
    "flags", [(), (*GEMMA, "--qrecipe", "default"), DRAFT], ids=["dense", "quantized", "draft"], indirect=True
)
def test_an_entry_reads_no_weights_and_agrees_with_the_join(plan, no_compiler, monkeypatch):
    read, joined = random.RandomWeights.read, []
    monkeypatch.setattr(random.RandomWeights, "read", mock.Mock(side_effect=AssertionError("a weight was read")))
    plan_file, folder = read_plan_file(plan), plan.parent / "plan.parts"
    for entry in plan_file.entries:
        compile_entry(plan_file, entry.id, folder)
    monkeypatch.undo()
    assert random.RandomWeights.read is read

    def lower(programs, *, arch, attention, compiled, **options):
        for method, path in compiled.items():
            digest = program_digest(programs[method], attention)
            parts.check_part(path, method=method, arch=arch, program=digest)
            joined.append((method, arch))

    monkeypatch.setattr("flashpte.export.lowering.lower", lower)
    join_entries(plan_file, folder)
    assert joined == [(entry.method, entry.arch) for entry in plan_file.entries]
    assert len(joined) >= 2


def test_parts_are_missing_or_of_another_plan(plan, flags, no_compiler, tmp_path):
    plan_file, folder = read_plan_file(plan), plan.parent / "plan.parts"
    with pytest.raises(PartError, match=r"2 of 2 parts are missing in .*plan.parts: run the entries prefill-sm_80, de"):
        join_entries(plan_file, folder)
    first = compile_entry(plan_file, "prefill-sm_80", folder)
    with pytest.raises(PartError, match=r"1 of 2 parts are missing in .*: run the entries decode-sm_80 first$"):
        join_entries(plan_file, folder)
    other = tmp_path / "other.json"
    assert main([*flags, "--dtype", "fp16", "--output-dir", str(tmp_path / "out"), "--plan", str(other)]) == 0
    compile_entry(read_plan_file(other), "decode-sm_80", folder)
    with pytest.raises(
        PartError, match=r"decode-sm_80.zip belongs to another plan: run the entry decode-sm_80 of this"
    ):
        join_entries(plan_file, folder)
    again = first.read_bytes()
    assert compile_entry(plan_file, "prefill-sm_80", folder).read_bytes() == again
    first.write_bytes(again[:-50])
    compile_entry(plan_file, "decode-sm_80", folder)
    with pytest.raises(PartError, match=r"prefill-sm_80.zip is damaged"):
        join_entries(plan_file, folder)
    assert not (plan.parent / "out").exists()


def test_a_machine_with_other_versions_is_refused(plan, monkeypatch):
    monkeypatch.setattr(parts, "compiler_version", lambda compiler: "g++ 1.0")
    for run in (lambda p: compile_entry(p, "decode-sm_80", plan.parent), lambda p: join_entries(p, plan.parent)):
        with pytest.raises(ExportError, match=r"^the plan is for other versions \(g\+\+ .*, here g\+\+ 1.0\): install"):
            run(read_plan_file(plan))


def test_another_config_is_refused(plan, flags, tmp_path):
    content = json.loads(plan.read_text())
    content["methods"].append("target_verify")
    plan.write_text(json.dumps(content))
    with pytest.raises(ExportError, match="the model has the methods prefill, decode, not prefill, decode, target_ver"):
        compile_entry(read_plan_file(plan), "decode-sm_80", plan.parent / "plan.parts")


def test_one_method_is_rewritten_as_with_all(flags, plan):
    programs = export_programs(plan_export(read_plan_file(plan).options), trace_only=True)
    every, _, _ = rewrite_products(programs)
    one, _, _ = rewrite_products(programs, only=["decode"], values=False)
    assert list(one) == ["decode"]
    assert program_digest(one["decode"]) == program_digest(every["decode"])
    assert "few_rows_linear" in one["decode"].graph_module.code
    whole = fused_products.JoinedWeights(values=False)([torch.ones(2, 3), torch.ones(4, 3)])
    assert whole.shape == (6, 3)


def side_by_side(*command_lines):
    """Runs ``export-model`` in forked processes, one for each list of arguments; returns their exit codes."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=lambda line=line: os._exit(main([*map(str, line)]))) for line in command_lines]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.lowering
@pytest.mark.xdist_group("entries")
@pytest.mark.parametrize("flags", [("--max-prefill-chunk", "2")], ids=["small"], indirect=True)
def test_entries_in_separate_processes_give_the_bytes_of_one_export(plan, flags, tmp_path, capfd):
    assert main([*flags, "--output-dir", str(tmp_path / "direct")]) == 0
    folder = plan.parent / "plan.parts"
    lines = [("--plan", plan, "--entry", entry, "-q") for entry in ("prefill-sm_80", "decode-sm_80", "join")]
    assert side_by_side(*lines[:2]) == [0, 0]
    assert sorted(path.name for path in folder.iterdir()) == ["decode-sm_80.zip", "prefill-sm_80.zip"]
    assert side_by_side(lines[2]) == [0]
    assert files(plan.parent / "out") == files(tmp_path / "direct")
    (folder / "decode-sm_80.zip").write_bytes((folder / "prefill-sm_80.zip").read_bytes())
    capfd.readouterr()
    assert side_by_side(lines[2]) == [1]
    assert "decode-sm_80.zip holds prefill for sm_80, not decode for sm_80" in capfd.readouterr().err
    assert files(plan.parent / "out") == files(tmp_path / "direct")
