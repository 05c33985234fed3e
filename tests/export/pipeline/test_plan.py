"""Lengths and conflicts that are decided before any weight is read."""

import dataclasses
import json

import pytest
from drafts import draft_tensors, speculators_config, write_draft

from flashpte.export.common.errors import ExportError, UsageError
from flashpte.export.common.options import ExportOptions
from flashpte.export.models.registry import get_target
from flashpte.export.pipeline import export_model, plan_export
from flashpte.export.weights.checkpoint_folder import read_json, read_token_ids


@pytest.fixture
def config(tmp_path, tiny):
    def write(name, **changes):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**tiny(name), **changes}))
        return path

    return write


@pytest.mark.parametrize(
    ("name", "changes", "options", "max_seq_len", "chunk"),
    [
        ("llama", {"max_position_embeddings": 10_000}, {}, 4096, 2048),
        (
            "llama",
            {"max_position_embeddings": 10_000},
            {"max_seq_len": 10_000, "max_prefill_chunk": 9000},
            10_000,
            9000,
        ),
        ("llama", {}, {}, 128, 128),
        ("llama", {}, {"max_seq_len": 20}, 20, 20),
        ("gemma4", {}, {}, 128, 8),
        ("gemma4", {}, {"max_seq_len": 6}, 6, 6),
        ("gemma4", {"sliding_window": 3000, "max_position_embeddings": 8000}, {}, 4096, 3000),
    ],
)
def test_default_lengths(config, target_of, name, changes, options, max_seq_len, chunk):
    plan = plan_export(ExportOptions(target_of(name), config=config(name, **changes), **options))
    assert (plan.max_seq_len, plan.methods[0].max_tokens) == (max_seq_len, chunk)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"verify_window": 40}, "verify_window=40: must be 2..16"),
        ({"verify_window": 1}, "verify_window=1"),
        ({"verify_window": 9}, "sliding window of 8"),
        ({"max_seq_len": 3, "verify_window": 4}, "must not exceed max_seq_len=3"),
        ({"max_seq_len": 1}, "max_seq_len=1: must be at least 2"),
        ({"max_seq_len": 129}, "max_seq_len=129: must be 2..128"),
        ({"max_prefill_chunk": 9}, r"max_prefill_chunk=9: must be 2..8 \(the sliding window\)"),
        ({"max_prefill_chunk": 1}, "max_prefill_chunk=1"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"layers": 0}, "layers=0"),
        ({"small": True}, "both name a size"),
    ],
    ids=str,
)
def test_options_out_of_range(config, options, named):
    with pytest.raises(UsageError, match=named):
        plan_export(ExportOptions("gemma4-31b", config=config("gemma4"), **options))


def test_a_target_bounds_its_forwards(monkeypatch, config):
    """Prefill, decode and verify respect the most tokens of one forward of the target."""

    import flashpte.export.pipeline.plan as planning

    def plan(options, **bounds):
        monkeypatch.setattr(planning, "get_target", lambda name: dataclasses.replace(get_target(name), **bounds))
        return plan_export(ExportOptions("hf", config=config("llama"), random_seed=0, **options))

    bounded = plan({"chain": 4}, min_forward=3, max_forward=6)
    assert [(m.name, m.min_tokens, m.max_tokens) for m in bounded.methods] == [
        ("prefill", 3, 6),
        ("target_verify", 5, 5),
        ("draft_decode", 1, 6),
    ]
    assert [m.name for m in plan({}, min_forward=3).methods] == ["prefill"]
    with pytest.raises(
        UsageError, match=r"chain=6 \(a target_verify of 7 tokens\): must not exceed what target hf takes"
    ):
        plan({"chain": 6}, max_forward=6)
    with pytest.raises(UsageError, match=r"verify_window=2: must be 3\.\.16"):
        plan({"verify_window": 2}, min_forward=3)
    with pytest.raises(UsageError, match=r"max_prefill_chunk=7: must be 2\.\.6 \(what target hf takes at once\)"):
        plan({"max_prefill_chunk": 7}, max_forward=6)
    with pytest.raises(UsageError, match="chain and verify_window cannot be combined"):
        plan({"verify_window": 3, "chain": 4})


def test_a_drafts_window_bounds_the_calls(config, tmp_path):
    layer = {"layer_types": ["sliding_attention"], "sliding_window": 6}
    draft = speculators_config(layer)
    write_draft(tmp_path / "draft", draft, draft_tensors(draft, taps=2))
    options = ExportOptions("hf", config=config("llama"), random_seed=0, draft=tmp_path / "draft", chain=5)
    plan = plan_export(options)
    assert [m.max_tokens for m in plan.methods] == [6, 6, 6]
    with pytest.raises(UsageError, match="must not exceed the draft's sliding window, 6"):
        plan_export(dataclasses.replace(options, chain=6))


@pytest.mark.parametrize("also", [{"small": True}, {"random_seed": 0}, {"config": "config.json"}], ids=str)
def test_a_checkpoint_is_not_combined(tmp_path, also):
    with pytest.raises(UsageError, match=r"checkpoint and \w+ cannot be combined"):
        plan_export(ExportOptions("hf", checkpoint=tmp_path, **also))


def test_an_export_needs_weights(tmp_path):
    plan = plan_export(ExportOptions("gemma4-31b", small=True))
    with pytest.raises(UsageError, match="no weights"):
        export_model(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_caches_larger_than_memory(config):
    path = config("llama", max_position_embeddings=10**13)
    with pytest.raises(ExportError, match=r"max_seq_len=1000000000000: the KV caches take 128000\.0 GB, this machine"):
        plan_export(ExportOptions("hf", config=path, max_seq_len=10**12))


def test_a_window_too_short_for_a_prefill(config):
    with pytest.raises(ExportError, match="sliding window is 1, must be at least 2"):
        plan_export(ExportOptions("gemma4-31b", config=config("gemma4", sliding_window=1)))


@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", ["2", True, {}, [2, "x"], 2.5, -1], ids=repr)
def test_token_ids_that_are_none(config, field, value):
    path = config("llama", **{field: value})
    with pytest.raises(ExportError, match=rf"{path}: {field} is .*, not a token id"):
        plan_export(ExportOptions("hf", config=path))


def test_token_ids_of_a_generation_config(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 3]}')
    assert read_token_ids(tmp_path) == {"bos_token_id": 1, "eos_token_id": [2, 3]}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ExportError, match=r"generation_config.json: eos_token_id is '</s>'"):
        read_token_ids(tmp_path)


def test_json_nested_too_deeply(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[" * 200_000)
    with pytest.raises(ExportError, match="nested too deeply"):
        read_json(path, "model config")


def test_tools_are_looked_for_before_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    plan = plan_export(ExportOptions("gemma4-31b", small=True, random_seed=0))
    with pytest.raises(ExportError, match="TRITON_INTERPRET=1 is set"):
        export_model(plan, tmp_path / "out", progress=pytest.fail)
