"""Targets: built in, installed by other packages, and misspelled."""

import sys

import pytest

from flashpte.export.common.errors import ExportError, UsageError
from flashpte.export.common.options import ExportOptions
from flashpte.export.models.registry import ENTRY_POINT_GROUP, get_target, list_targets
from flashpte.export.pipeline import plan_export

PLUGIN = """
from flashpte.export.models.hugging_face import build
from flashpte.export.models.registry import TargetSpec

FIELDS = {"model_type": "llama", "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32,
          "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
TARGET = TargetSpec("tiny-llama", "from a package of its own", ("llama",), build, config=FIELDS)
WRONG = 3
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Installs a package with two targets: a good one and one that is not a TargetSpec."""
    (tmp_path / "target_plugin.py").write_text(PLUGIN)
    info = tmp_path / "target_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: target-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[{ENTRY_POINT_GROUP}]\ntiny-llama = target_plugin:TARGET\nwrong = target_plugin:WRONG\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("target_plugin", None)


def test_installed_target_is_found_and_planned(plugin):
    plan = plan_export(ExportOptions("tiny-llama"))
    assert get_target("tiny-llama").description == "from a package of its own"
    assert plan.facts.vocab_size == 32
    assert plan.max_seq_len == 64


def test_entry_point_that_is_no_target_is_named(plugin):
    with pytest.raises(ExportError, match=r"wrong = target_plugin:WRONG .* int"):
        get_target("wrong")
    with pytest.raises(ExportError, match="wrong"):
        list_targets()


def test_unknown_name_gets_a_suggestion_or_the_list(plugin):
    with pytest.raises(UsageError, match="did you mean 'gemma4-31b'"):
        get_target("gemma-4-31b")
    with pytest.raises(UsageError, match="did you mean 'tiny-llama'"):
        get_target("tinyllama")
    with pytest.raises(UsageError, match="known: gemma4-31b, hf, tiny-llama"):
        get_target("zzz")


def test_builtin_targets_are_listed():
    assert [spec.name for spec in list_targets()] == ["gemma4-31b", "hf"]


def test_gemma4_31b_is_what_its_name_says():
    plan = plan_export(ExportOptions("gemma4-31b"))
    attention = plan.facts.states
    assert len(attention) == plan.total_layers == 60
    for index, shape in enumerate(attention):
        full = index % 6 == 5
        assert (shape.kv_heads, shape.head_dim, shape.window) == ((4, 512, None) if full else (16, 256, 1024))
    weights = plan.model.state_dict()
    assert 30.6e9 < sum(tensor.numel() for tensor in weights.values()) < 30.8e9
    assert weights["model.layers.0.mlp.up_proj.weight"].is_meta
    assert "model.layers.5.self_attn.v_proj.weight" not in weights
    assert "model.layers.4.self_attn.v_proj.weight" in weights
    assert plan.model.config.final_logit_softcapping == 30.0
    assert (plan.methods[0].max_tokens, plan.max_seq_len, plan.facts.vocab_size) == (1024, 4096, 262_144)


def test_small_gemma4_has_the_architecture_of_the_large_one():
    large, small = (plan_export(ExportOptions("gemma4-31b", small=s, layers=6)) for s in (False, True))
    for a, b in zip(large.facts.states, small.facts.states, strict=True):
        assert (a.window is None) == (b.window is None)
    first, last = small.facts.states[0], small.facts.states[-1]
    assert first.slots(small.max_seq_len) < small.max_seq_len  # the ring wraps
    assert last.head_dim == 2 * first.head_dim
    assert set(large.model.state_dict()) == set(small.model.state_dict())
