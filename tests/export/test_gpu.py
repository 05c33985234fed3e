"""An export made on a machine with a GPU: runs the .pte there and compares it with the eager model.

The dtype is float32. Attention scores of this small random model are large, so bfloat16 rounding moves its logits by
about as much as they differ, and a bfloat16 comparison could not show a wrong mask or cache.
"""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from flashpte.export.cli import main
from flashpte.export.common.options import ExportOptions
from flashpte.export.pipeline import load_weights, plan_export
from flashpte.export.runtime import Program

pytestmark = pytest.mark.gpu

VERIFY = 4
SEED = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "out"
    arguments = ["--target", "gemma4-31b", "--small", "--random-weights", "--seed", str(SEED), "--dtype", "float32"]
    assert main([*arguments, "--verify-window", str(VERIFY), "--output-dir", str(out), "-q"]) == 0
    return out


@pytest.fixture(scope="module")
def eager():
    """The Hugging Face model with its own attention, in float32, on the CPU."""
    plan = plan_export(ExportOptions(target="gemma4-31b", small=True, random_seed=SEED, dtype="float32"))
    load_weights(plan)
    plan.model.set_attn_implementation("sdpa")
    return plan.model.eval()


def test_the_manifest_names_this_gpu(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    major, minor = torch.cuda.get_device_capability()
    assert manifest["arch"] == f"sm_{major}{minor}"
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]


def test_prefill_decode_and_verify_follow_the_eager_model_past_the_window(folder, eager):
    program = Program.open(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    chunk = manifest["constant_methods"]["get_max_prefill_chunk"]
    generator = torch.Generator().manual_seed(1)
    length = 3 * chunk
    tokens = torch.randint(0, manifest["constant_methods"]["get_vocab_size"], (1, length), generator=generator)
    with torch.no_grad():
        expected = eager(tokens, use_cache=False).logits
    spread = expected.std().item()

    def close(logits, positions):
        worst = (logits.cpu() - expected[:, positions]).abs().max().item()
        assert worst < 0.02 * spread, f"worst logit is off by {worst:.4f}; the logits' deviation is {spread:.3f}"

    def pos(start, end):
        return torch.arange(start, end, device="cuda")

    at = 0
    for size in (chunk, 5, chunk - 7, 2):
        (logits,) = program.run("prefill", tokens[:, at : at + size].cuda(), pos(at, at + size))
        at += size
        close(logits, [at - 1])
    for _ in range(10):
        (logits,) = program.run("decode", tokens[:, at : at + 1].cuda(), pos(at, at + 1))
        close(logits, [at])
        at += 1
    while at + VERIFY <= length:
        (logits,) = program.run("target_verify", tokens[:, at : at + VERIFY].cuda(), pos(at, at + VERIFY))
        close(logits, list(range(at, at + VERIFY)))
        at += VERIFY
    # A rejected draft: the positions are written again.
    back = at - VERIFY - 1
    (logits,) = program.run("decode", tokens[:, back : back + 1].cuda(), pos(back, back + 1))
    close(logits, [back])
