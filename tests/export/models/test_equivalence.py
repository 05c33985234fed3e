"""Exported programs, run on a CPU with shared caches, give the logits of the original Hugging Face model."""

import pytest
import torch
from sessions import LENGTH, TOLERANCE, VERIFY, run_session
from shared_programs import SharedPrograms

from flashpte.export.common.options import ExportOptions
from flashpte.export.pipeline import export_programs, plan_export, replace_attention

pytestmark = pytest.mark.xdist_group("equivalence")


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen3-sliding", "gemma4"])
def exported(request, tmp_path_factory, tiny, reference, target_of):
    """The reference's logits for one sequence, and three programs exported from its saved folder."""
    model = reference(tiny(request.param))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    options = ExportOptions(
        target_of(request.param), checkpoint=folder, dtype="float32", max_seq_len=64, verify_window=VERIFY
    )
    if request.param in ("llama", "qwen3"):
        options = ExportOptions(**{**vars(options), "max_prefill_chunk": 8})
    tokens = torch.randint(0, model.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    return tokens, expected, export_programs(plan_export(options))


def test_session_matches_hugging_face(exported):
    tokens, expected, programs = exported
    assert expected.std() > 0.3  # the logits differ enough for an error to show
    assert run_session(programs, tokens, expected) < TOLERANCE
    # the rewritten programs also start from caches full of other keys
    replaced, reports = replace_attention(programs)
    assert all(report.replaced and not report.declined for report in reports.values())
    assert run_session(replaced, tokens, expected) < TOLERANCE


def test_second_sequence_needs_no_reset(exported):
    tokens, expected, programs = exported
    run = SharedPrograms(programs)
    for start in range(0, 40, 8):
        run("prefill", (tokens[:, start : start + 8] + 5) % 96, start)
    got = run("prefill", tokens[:, :8], 0)
    assert (got - expected[:, 7:8]).abs().max() < TOLERANCE
    got = run("target_verify", tokens[:, 8:12], 8)
    assert (got - expected[:, 8:12]).abs().max() < TOLERANCE
