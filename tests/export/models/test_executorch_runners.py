"""Files for ExecuTorch's own runners: what they call, what they read, and which models they cannot drive."""

import dataclasses
import json

import pytest
import torch
from shared_programs import SharedPrograms

from flashpte.export.common.errors import ExportError, UsageError
from flashpte.export.common.options import RUNNERS, ExportOptions
from flashpte.export.models.executorch_runners import GEMMA, TEXT, check_runner, find_runner
from flashpte.export.models.registry import get_target
from flashpte.export.pipeline import export_programs, plan_export
from flashpte.export.pipeline.programs import replace_attention

pytestmark = pytest.mark.xdist_group("runners")


def options(tmp_path, fields, runner="executorch", **others):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    return ExportOptions("hf", config=path, random_seed=0, dtype="float32", runner=runner, **others)


@pytest.fixture
def llama(tmp_path, tiny):
    return lambda **others: options(tmp_path, tiny("llama"), **others)


def test_each_target_has_a_runner():
    assert find_runner("executorch", get_target("gemma4-31b")) is GEMMA
    assert find_runner("executorch", get_target("hf")) is TEXT
    assert [find_runner(name, get_target("hf")) for name in RUNNERS[1:]] == [TEXT, GEMMA]
    assert find_runner(None, get_target("hf")) is None


@pytest.mark.parametrize(
    "others", [{"verify_window": 4}, {"chain": 3}, {"method": "decode"}, {"draft": "folder"}], ids=str
)
def test_runners_call_prefill_and_decode_alone(llama, others):
    name = next(iter(others))
    with pytest.raises(UsageError, match=f"runner and {name} cannot be combined"):
        plan_export(llama(**others))


def test_an_unknown_runner(llama):
    with pytest.raises(UsageError, match="runner=vllm: must be executorch, executorch-text, executorch-gemma"):
        plan_export(llama(runner="vllm"))


def test_the_text_runner_needs_every_position(tmp_path, tiny):
    ring = {**tiny("llama"), "model_type": "mistral", "sliding_window": 8}
    with pytest.raises(ExportError, match=r"layer \d keeps a window of 8 tokens in a ring of 16 slots"):
        plan_export(options(tmp_path, ring))
    # no ring when the window holds the context
    plan = plan_export(options(tmp_path, {**ring, "sliding_window": 64}, max_seq_len=64))
    assert plan.runner is TEXT


def test_a_target_that_limits_a_call(llama):
    states = plan_export(llama()).facts.states
    with pytest.raises(ExportError, match="may pass 64 tokens in one call, which takes at most 32"):
        check_runner(TEXT, get_target("hf"), states, 64, 32)
    with pytest.raises(ExportError, match="one token at a time, target pairs takes 2"):
        check_runner(TEXT, dataclasses.replace(get_target("hf"), name="pairs", min_forward=2), states, 64, 64)


def test_constants_of_the_text_runner(llama):
    plan = plan_export(llama(max_seq_len=96))
    values = plan.constant_methods
    # A shorter get_max_seq_len would make the runner stop counting positions.
    assert values["get_max_seq_len"] == values["get_max_context_len"] == values["get_max_prefill_chunk"] == 96
    assert values["get_min_prefill_chunk"] == 1
    assert (values["enable_dynamic_shape"], values["use_sdpa_with_kv_cache"]) == (True, False)
    assert values["get_n_layers"] == len(plan.facts.states)
    assert plan.manifest()["runner"] == "executorch-text"
    assert [method.name for method in plan.methods] == ["prefill", "decode"]


def test_the_default_export_says_nothing_of_runners(llama):
    plan = plan_export(llama(runner=None))
    assert "runner" not in plan.manifest()
    assert not {"enable_dynamic_shape", "get_n_layers", "use_sdpa_with_kv_cache"} & plan.constant_methods.keys()


@pytest.fixture
def exported(tmp_path, tiny, reference):
    """Rewritten programs for a runner, a sequence, and the logits of the Hugging Face model that they come from."""

    def make(runner, **others):
        model = reference(tiny("llama"))
        model.save_pretrained(tmp_path / "model")
        options = ExportOptions("hf", checkpoint=tmp_path / "model", dtype="float32", runner=runner, **others)
        plan = plan_export(options)
        tokens = torch.randint(0, plan.facts.vocab_size, (1, 48), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            expected = model(tokens, use_cache=False).logits[0]
        return plan, SharedPrograms(replace_attention(export_programs(plan))[0]), tokens, expected

    return make


def test_the_text_program_takes_any_part_of_a_prompt(exported):
    _, run, tokens, expected = exported("executorch-text", max_seq_len=48)
    for sizes in ((1, 1, 5, 1, 40), (48,), (47, 1), (2, 46)):
        position = 0
        for size in sizes:
            logits = run("prefill", tokens[:, position : position + size], position)
            position += size
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits[0], expected[position - 1 : position], rtol=1e-4, atol=1e-4)


def test_the_sampling_program_answers_as_the_model_does(exported):
    plan, run, tokens, expected = exported("executorch-gemma", max_seq_len=48, max_prefill_chunk=16)
    assert not any("logits" in name for name in plan.constant_methods)
    assert set(run.modules) == {"prefill", "decode"}
    greedy, hot = torch.tensor([1e-6]), torch.tensor([2.0])
    for start, end in ((0, 16), (16, 29)):
        token = run("prefill", tokens[:, start:end], start, greedy)
        assert (token.shape, token.dtype) == ((1, 1), torch.int64)
        assert int(token) == int(expected[end - 1].argmax())
    assert int(run("decode", tokens[:, 29:30], 29, greedy)) == int(expected[29].argmax())
    assert len({int(run("decode", tokens[:, 29:30], 29, hot)) for _ in range(20)}) > 1
