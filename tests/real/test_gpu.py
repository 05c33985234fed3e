"""Real weights on a GPU: the answer of an export, and ``run-model --check`` against the eager model.

A folder of the model's name beside its GGUF file may hold an export made on another machine. Without one, the export
is made here.
"""

from __future__ import annotations

import json

import pytest
from run_model_process import run_model_process

pytestmark = [pytest.mark.real, pytest.mark.gpu]

SECONDS = 600


@pytest.fixture(scope="module")
def export(real, tmp_path_factory):
    folder = real.folder / real.name
    if not folder.is_dir():
        from flashpte.export.cli import main

        folder = tmp_path_factory.mktemp(real.name) / "out"
        given = ["--target", "hf", "--gguf-file", str(real.gguf_file), "--max-seq-len", "2048", "--verify-window", "4"]
        assert main([*given, "--output-dir", str(folder), "-q"]) == 0
    return folder


def test_the_answer_is_that_of_the_eager_model(real, export):
    given = ["--prompt", real.question, "--max-new-tokens", len(real.answer), "--json", "-q"]
    done = run_model_process(export, *given, seconds=SECONDS)
    assert done.code == 0, (done.err[-2000:], done.out[-2000:])
    report = json.loads(done.out)
    print(repr(report["text"]))
    assert report["prompt_tokens"] == real.prompt
    assert report["tokens"] == real.answer
    whole, prompt = (
        real.tokenizer.decode(ids, skip_special_tokens=True) for ids in (real.prompt + real.answer, real.prompt)
    )
    assert prompt + report["text"] == whole


def test_the_check_passes(real, export):
    done = run_model_process(export, "--check", "--gguf-file", real.gguf_file, "--json", "-q", seconds=SECONDS)
    assert done.code in (0, 1), (done.err[-2000:], done.out[-3000:])
    report = json.loads(done.out)
    print(json.dumps({name: report[name] for name in ("comparisons", "teacher_forced")}, indent=1))
    assert report["passed"], [comparison for comparison in report["comparisons"] if not comparison["passed"]]
    assert done.code == 0
    kinds = ("full", "sliding") if real.name.startswith("gemma") else ("full",)
    assert {"prefill logits", "decode logits", "target_verify logits", *(f"{kind} keys" for kind in kinds)} <= {
        comparison["what"] for comparison in report["comparisons"]
    }
    assert not report["unchecked_methods"]
    assert not report["weights"]["different"]
    assert report["weights"]["equal"] > 200
    assert report["teacher_forced"]["tokens"] == 200
    assert not report["teacher_forced"]["wrong"]
