"""Rules for states, as a manifest holds them."""

import json

import pytest

from flashpte.export.common.errors import ProgramError
from flashpte.export.common.options import ExportOptions
from flashpte.export.pipeline import plan_export
from flashpte.export.state.layer_state import StateRules, read_states


@pytest.mark.parametrize("options", [{}, {"chain": 4}], ids=str)
def test_rules_survive_the_manifest(options):
    plan = plan_export(ExportOptions("gemma4-31b", small=True, random_seed=0, **options))
    assert read_states(json.loads(json.dumps(plan.manifest()))) == plan.states


@pytest.mark.parametrize("options", [{}, {"chain": 4}], ids=str)
def test_an_older_manifest_has_caches_known_by_name(options):
    plan = plan_export(ExportOptions("gemma4-31b", small=True, random_seed=0, max_seq_len=1024, **options))
    assert {rules.kind for rules in plan.states} == {"full", "sliding"}
    manifest = json.loads(json.dumps(plan.manifest()))
    del manifest["states"]
    layers = [*plan.facts.states, *([plan.draft.head.attention] if plan.draft else [])]
    buffers = {}
    for layer, rules in zip(layers, plan.states, strict=True):
        shape, _ = layer.buffers(plan.max_seq_len, plan.dtype)["k"]
        buffers |= {fqn: {"dtype": "bfloat16", "shape": list(shape)} for fqn in rules.buffers.values()}
    manifest["methods"] = {"prefill": {"buffers": buffers}}
    assert read_states(manifest) == plan.states


def test_a_program_without_a_model_has_no_states():
    assert read_states({"methods": {"forward": {"buffers": {"counter": {"dtype": "int64", "shape": [1]}}}}}) == ()


@pytest.mark.parametrize("states", [7, [7], [{"kind": "full"}], [{"kind": "full", "buffers": 3}], [{"colour": "red"}]])
def test_broken_rules(states):
    with pytest.raises(ProgramError, match=r"manifest\.json: cannot read its states"):
        read_states({"states": states})


@pytest.mark.parametrize("changes", [{"goes_back": "time machine"}, {"compared": "never"}], ids=str)
def test_rules_of_a_later_version(changes):
    entry = {**StateRules("new", {"keys": "kv_cache.k_0"}).to_dict(), **changes}
    with pytest.raises(ProgramError, match="which this flashpte does not know"):
        read_states({"states": [entry]})
