"""Real weights on a CPU: what becomes of a GGUF file, and the logits and the answer of its rewritten programs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from shared_programs import SharedPrograms

from flashpte.export.check.compare import compare, worst
from flashpte.export.common.options import ExportOptions
from flashpte.export.pipeline import export_programs, plan_export, replace_attention
from flashpte.export.pipeline.fused_products import rewrite_products
from flashpte.export.runtime.text import load_tokenizer
from flashpte.export.weights.quantized import QuantizedLinear

pytestmark = pytest.mark.real

VERIFY = 4
CHUNKS = (512, 3, 400, 130)  # 1,045 tokens: past Gemma's window of 512, and around its ring of 1,024
TEXT = Path(__file__).parents[2] / "docs" / "design.md"
ROUNDED = {"smollm2": 0, "gemma3-270m": 9}
"""How many weights are rounded, because the packed layout does not hold their type (Q6_K)."""
NAMES = ("_name_or_path", "_model_name_or_path", "dtype", "unk_token_id", "pad_token_id", "transformers_version")
"""Fields of a config that change no result."""


@pytest.fixture(scope="module")
def plan(real):
    return plan_export(
        ExportOptions("hf", gguf_file=real.gguf_file, dtype="float32", max_seq_len=1280, verify_window=VERIFY)
    )


@pytest.fixture(scope="module")
def exported(plan):
    """The plan's programs, rewritten as export-model does it; the plan's model has its weights then."""
    programs, _, _ = rewrite_products(export_programs(plan))
    replaced, reports = replace_attention(programs)
    assert all(report.replaced and not report.declined for report in reports.values())
    return replaced


def weight_of(model, name):
    owner = model.get_submodule(name.rpartition(".")[0])
    return owner.dequantized().float() if isinstance(owner, QuantizedLinear) else model.get_parameter(name)


def test_the_config_is_what_transformers_reads(real, plan):
    expected, found = (model.config.to_dict() for model in (real.eager, plan.model))
    assert found.pop("rms_norm_eps") == pytest.approx(expected.pop("rms_norm_eps"), rel=1e-6)
    different = {name for name in {*expected, *found} if expected.get(name) != found.get(name)}
    assert different <= {*NAMES}, {name: (expected.get(name), found.get(name)) for name in different}


def test_the_tokenizer_of_the_export_is_that_of_the_file(real, plan):
    exported = load_tokenizer(plan.extra_files[0].parent)
    text = TEXT.read_text(encoding="utf-8") + "\n\n\tÄrger,  日本 \N{CRAB} 1234\n"
    ids = real.tokenizer(text)["input_ids"]
    assert exported(text)["input_ids"] == ids
    assert exported.decode(ids, skip_special_tokens=True) == text
    assert exported("Paris")["input_ids"] == real.tokenizer("Paris")["input_ids"]


def test_each_weight_is_what_transformers_dequantizes(real, plan, exported):
    rounded = 0
    for name in plan.model.state_dict():
        name = name.replace(".packed", ".weight")
        if not name.endswith(".weight"):
            continue  # scales and offsets of a packed weight
        expected, found = real.eager.get_parameter(name), weight_of(plan.model, name)
        if not torch.equal(found, expected):
            assert (found - expected).norm() < 0.006 * expected.norm(), name
            rounded += 1
    assert rounded == ROUNDED[real.name]


def test_logits_along_a_text_are_those_of_the_eager_model(real, plan, exported):
    tokens = torch.tensor([real.tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"][:1100]])
    run, found, rows, at = SharedPrograms(exported), [], [], 0
    for chunk in CHUNKS:
        found.append(run("prefill", tokens[:, at : at + chunk], at)[0])
        at += chunk
        rows.append(at - 1)
    for _ in range(3):
        found.append(run("decode", tokens[:, at : at + 1], at)[0])
        rows.append(at)
        at += 1
    rejected = tokens[:, at : at + VERIFY].clone()
    rejected[:, 2:] += 1
    found.append(run("target_verify", rejected, at)[0, :2])
    rows += [at, at + 1]
    at += 2
    for _ in range(2):
        found.append(run("target_verify", tokens[:, at : at + VERIFY], at)[0])
        rows += range(at, at + VERIFY)
        at += VERIFY
    found.append(run("decode", tokens[:, at : at + 1], at)[0])
    rows.append(at)

    own = copy.deepcopy(real.eager)
    for name in [name for name, _ in own.named_parameters()]:  # of the same weights: Q6_K is rounded
        own.get_parameter(name).copy_(weight_of(plan.model, name))
    with torch.no_grad():
        read = {"input_ids": tokens[:, : at + 1], "use_cache": False, "logits_to_keep": torch.tensor(rows)}
        narrow = own(**read).logits[0]
        wide = own.double()(**read).logits[0]
    assert wide.std() > 1.0  # the logits differ enough for an error to show
    actual = torch.cat(found)
    compared = [
        compare("logits", f"token {row}", actual[i], wide[i], narrow[i], torch.float32) for i, row in enumerate(rows)
    ]
    print(worst(compared))
    assert compare("logits", "all tokens", actual, wide, narrow, torch.float32).passed, worst(compared)


def test_the_answer_is_that_of_the_eager_model(real, exported):
    run = SharedPrograms(exported)
    logits = run("prefill", torch.tensor([real.prompt]), 0)
    answer = []
    while True:
        answer.append(int(logits[0, -1].argmax()))
        if len(answer) == len(real.answer):
            break
        logits = run("decode", torch.tensor([answer[-1:]]), len(real.prompt) + len(answer) - 1)
    print(repr(real.tokenizer.decode([*real.prompt, *answer], skip_special_tokens=True)))
    assert answer == real.answer
