"""``run-model --check`` on a GPU passes good exports and fails deliberately wrong ones."""

import json

import pytest
from wrong_programs import perturb_weight, swap_inputs, unshare_cache

pytestmark = pytest.mark.gpu

MODELS = ("gemma", "llama", "gemma-fp32")


@pytest.mark.parametrize("name", MODELS)
def test_a_good_export_passes(name, model_folder, run_model_process):
    done = run_model_process(model_folder(name), "--check", "--json", "-q")
    assert done.code == 0, (done.err[-2000:], done.out[-3000:])
    report = json.loads(done.out)
    assert report["passed"]
    assert {"prefill logits", "decode logits", "target_verify logits", "full keys", "full values"} <= {
        comparison["what"] for comparison in report["comparisons"]
    }
    assert not report["unchecked_methods"]
    assert report["weights"]["equal"] > 20
    assert not report["weights"]["different"]
    forced = report["teacher_forced"]
    assert forced["tokens"] == 200
    assert forced["above"] >= 190
    assert not forced["wrong"]


WRONG = {
    "weight": lambda good, out: perturb_weight(good, out),
    "one element": lambda good, out: perturb_weight(good, out, share=0.0),
    "cache": lambda good, out: unshare_cache(good, out),
    "inputs": lambda good, out: swap_inputs(good, out),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("name", ["gemma", "llama"])
def test_a_wrong_one_fails(what, name, model_folder, run_model_process, tmp_path):
    wrong = WRONG[what](model_folder(name), tmp_path / "wrong")
    done = run_model_process(wrong, "--check", "-q")
    assert done.code == 1, (done.err[-2000:], done.out[-3000:])
    if what == "inputs" and not done.out:  # a token used as a position may also end in an illegal access
        assert any(line.startswith("run-model: error: ") and "failed: " in line for line in done.err.splitlines())
        return
    assert done.out.splitlines()[-1] == "check FAILED"
    logits = [line for line in done.out.splitlines() if " logits" in line]
    assert any("WRONG" in line for line in logits) == (what != "one element")
    assert ("weights: WRONG, 1 differ" in done.out) == (what in ("weight", "one element"))
