"""Formats of weights: a recipe assigns one to each name, and loader, programs, manifest and check follow it."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from eager_program import EagerProgram
from shared_programs import SharedPrograms
from toy_int4 import ToyInt4

from flashpte.export.check.check_program import check_program, named_weights
from flashpte.export.check.eager_model import eager_pair, rebuild
from flashpte.export.common.errors import ExportError
from flashpte.export.common.options import ExportOptions
from flashpte.export.files.mapped_tensors import mapped_file
from flashpte.export.models import registry
from flashpte.export.models.gemma4 import TARGET as GEMMA4
from flashpte.export.pipeline import export_programs, load_weights, plan_export
from flashpte.export.weights import recipe as recipe_module
from flashpte.export.weights.formats import FORMATS, Dense
from flashpte.export.weights.random import RandomWeights
from flashpte.export.weights.recipe import PlannedWeight, Recipe, fill_weights, read_recipe, rules_of, weight_bytes
from flashpte.kernels.linear.format import Groupwise

NORMS = r".*norm\.weight"
DOWN = r"model\.layers\.\d+\.mlp\.down_proj\.weight"
QUERY = r"model\.layers\.1\.self_attn\.q_proj\.weight"
RULES = ((NORMS, "float32"), (DOWN, "toy-int4"), (QUERY, "toy-int4"))


@pytest.fixture(autouse=True)
def _mixed_target(monkeypatch):
    """The small Gemma 4 with norms in float32 and some 4-bit linear layers."""
    monkeypatch.setitem(FORMATS, "toy-int4", ToyInt4(torch.bfloat16))
    known = registry._builtin_targets()
    mixed = dataclasses.replace(GEMMA4, name="mixed", weight_formats=RULES)
    monkeypatch.setattr(registry, "_builtin_targets", lambda: {**known, "mixed": mixed})


def planned(target="mixed", **options):
    return plan_export(ExportOptions(target, small=True, random_seed=3, layers=2, max_seq_len=64, **options))


def loaded(**options):
    plan = planned(**options)
    load_weights(plan)
    return plan


def test_each_weight_is_held_in_its_format():
    plain, mixed = loaded(target="gemma4-31b").model.state_dict(), loaded().model.state_dict()
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}
    quantised = [name for name in plain if re.fullmatch(f"{DOWN}|{QUERY}", name)]
    assert len(quantised) == 3
    for name, tensor in plain.items():
        if name in quantised:
            path = name.removesuffix(".weight")
            packed, scale = mixed[f"{path}.packed"], mixed[f"{path}.scale"]
            values = torch.stack((packed & 15, packed >> 4), -1).flatten(1).float() - 8
            assert ((values * scale.float() - tensor.float()).abs() <= 0.51 * scale.float()).all()
        else:
            expected = torch.float32 if re.fullmatch(NORMS, name) else torch.bfloat16
            assert mixed[name].dtype == expected
            assert torch.equal(mixed[name], tensor.to(expected))


def test_programs_hold_the_formats_tensors_and_compute_with_them():
    plan = planned(verify_window=4)
    programs = export_programs(plan)
    held = programs["decode"].state_dict
    assert held["model.model.layers.0.mlp.down_proj.packed"].dtype == torch.uint8
    assert "model.model.layers.0.mlp.down_proj.weight" not in held
    assert held["model.model.norm.weight"].dtype == torch.float32
    tokens, positions = torch.tensor([[5, 9, 2, 33]]), torch.arange(4)
    found = SharedPrograms(programs).run("target_verify", tokens, positions)
    expected = EagerProgram(plan).run("target_verify", tokens, positions)[0]
    torch.testing.assert_close(found, expected)


def test_a_program_can_be_traced_without_weights():
    plan = planned(verify_window=4)
    export_programs(plan, trace_only=True)
    assert plan.model.state_dict()["model.layers.0.mlp.down_proj.packed"].dtype == torch.uint8
    load_weights(plan)  # weights are loaded afterwards
    expected = loaded(verify_window=4).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in plan.model.state_dict().items())


def checked(plan, change=lambda weights: None):
    model = rebuild(json.loads(json.dumps(plan.manifest())), None)
    weights = {name: tensor.clone() for name, tensor in named_weights(plan.model).items()}
    change(weights)
    return check_program(EagerProgram(plan), *eager_pair(model), weights=weights, model_weights=named_weights(model))


def test_check_rebuilds_the_formats_from_the_manifest():
    report = checked(loaded(verify_window=4))
    assert report.passed, report.lines()
    assert report.weights_equal == len(planned().model.state_dict())


def test_check_is_red_when_a_packed_weight_differs_or_is_absent():
    name = "model.model.layers.1.mlp.down_proj.packed"
    plan = loaded(verify_window=4)
    report = checked(plan, lambda weights: weights[name].view(-1)[7].bitwise_xor_(16))
    assert (report.passed, report.weights_different) == (False, (name,))
    report = checked(plan, lambda weights: weights.pop(name))
    assert not report.passed
    assert f"{name}: the program has no tensor of this name" in report.not_compared


def test_check_is_red_when_a_format_was_lost():
    """If the program holds a float32 norm in bfloat16, the check fails even though the values are equal."""
    name = "model.model.norm.weight"
    report = checked(loaded(verify_window=4), lambda weights: weights.update({name: weights[name].bfloat16()}))
    assert not report.passed
    assert any(line.startswith(f"{name}: the program has bfloat16") for line in report.not_compared)


def test_the_first_rule_that_matches_the_whole_name_counts():
    recipe = Recipe("bfloat16", ((r"a\.weight", "float16"), (r"a.*", "float32")))
    assert [recipe.format_of(name) for name in ("a.weight", "a.weights", "b.a.weight")] == [
        "float16",
        "float32",
        "bfloat16",
    ]


def test_a_manifest_without_formats_has_one_dtype():
    assert read_recipe(None, "float16") == Recipe("float16")
    recipe = Recipe("bfloat16", RULES)
    assert read_recipe(json.loads(json.dumps(recipe.to_dict())), "float16") == recipe


@pytest.mark.parametrize("entry", [{}, {"default": "bfloat16"}, 7, {"default": "bfloat16", "rules": [1]}])
def test_a_broken_recipe_in_a_manifest(entry):
    with pytest.raises(ExportError, match="cannot read the manifest's weight_formats"):
        read_recipe(entry, "float16")


def test_what_no_recipe_may_say():
    with pytest.raises(ExportError, match=r"unknown weight format 'int3'; known: bfloat16.*int4-gN, int8-gN or int8"):
        Recipe("bfloat16", (("a", "int3"),))
    with pytest.raises(ExportError, match=r"'\(' is not a regular expression"):
        Recipe("bfloat16", (("(", "float16"),))


def test_a_format_refuses_what_it_cannot_hold(monkeypatch):
    target = dataclasses.replace(GEMMA4, name="mixed", weight_formats=((NORMS, "toy-int4"),))
    monkeypatch.setattr(registry, "_builtin_targets", lambda: {"mixed": target})
    with pytest.raises(ExportError, match=r"norm\.weight: toy-int4 holds linear layers"):
        planned()


def test_dense_casts_and_says_so():
    weight = torch.arange(6.0).reshape(2, 3)
    (name, encoded), *_ = Dense(torch.float16).encode("w", weight).items()
    assert (name, encoded.dtype) == ("w", torch.float16)
    assert Dense(torch.float16).stored("w", weight.shape) == {"w": ((2, 3), torch.float16)}


def test_random_weights_are_read_one_by_one_in_any_order():
    plan = planned(target="gemma4-31b")
    source = RandomWeights(planned(target="gemma4-31b").model, torch.bfloat16, 3)
    load_weights(plan)
    for name, tensor in reversed(plan.model.state_dict().items()):
        assert torch.equal(source.read(name), tensor)


def test_rules_of_a_quantized_checkpoint_give_each_weight_its_format():
    formats = {f"model.layers.{i}.mlp.up_proj.weight": "int4-g32-o-f32" for i in range(12)}
    formats |= {f"model.layers.{i}.mlp.down_proj.weight": "int8-g32" if i % 4 else "int4-g32" for i in range(12)}
    formats |= {"lm_head.weight": "int8-g32-f16"}
    dense = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(12)]
    formats |= dict.fromkeys(dense[:3], "int4-g32")
    rules = rules_of(formats, [*formats, *dense[3:], "model.norm.weight"])
    assert len(rules) == 5
    assert (r"model\.layers\.\d+\.mlp\.up_proj\.weight", "int4-g32-o-f32") in rules
    recipe = Recipe("bfloat16", rules)
    assert {name: recipe.format_of(name) for name in formats} == formats
    for name in (*dense[3:], "model.layers.1.mlp.up_projxweight", "model.norm.weight"):
        assert recipe.format_of(name) == "bfloat16"


def test_a_recipe_that_contradicts_the_source_is_refused():
    class Source:
        def read(self, name):
            return Groupwise(torch.zeros(16, 32, dtype=torch.uint8), torch.zeros(16, 1))

    with pytest.raises(ExportError, match=r"a\.weight is quantized in its checkpoint, the recipe makes it bfloat16"):
        fill_weights(torch.nn.Module(), [PlannedWeight("a.weight", (16, 32), "bfloat16", "a.weight")], Source())


def test_weights_in_a_folder_are_those_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_module, "_MAPPED_BYTES", 1 << 10)
    in_memory, planned_again = loaded().model.state_dict(), planned()
    threads = torch.get_num_threads()
    load_weights(planned_again, tmp_path)
    assert torch.get_num_threads() == threads
    in_files = planned_again.model.state_dict()
    assert in_files.keys() == in_memory.keys()
    mapped = {name for name, tensor in in_files.items() if mapped_file(tensor.untyped_storage())}
    assert mapped == {name for name, tensor in in_memory.items() if tensor.nbytes >= 1 << 10}
    assert len(mapped) > 10
    for name, tensor in in_memory.items():
        assert torch.equal(in_files[name], tensor), name


def test_the_first_weight_that_cannot_be_read_is_named():
    class Broken:
        def read(self, name):
            if "layers.1" in name:
                raise ExportError(f"cannot read {name}")
            return source.read(name)

    plan = planned()
    source, threads = plan.source, torch.get_num_threads()
    first = next(weight.name for weight in plan.weights if "layers.1" in weight.name)
    with pytest.raises(ExportError, match=f"cannot read {re.escape(first)}$"):
        fill_weights(plan.model, plan.weights, Broken())
    assert torch.get_num_threads() == threads


def test_bytes_of_a_plan():
    plan = planned()
    load_weights(plan)
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in plan.model.state_dict().values()}
    assert weight_bytes(plan.weights) == sum(tensors.values())


def test_progress_ends_with_all_bytes(tmp_path):
    plan, told = planned(), []
    fill_weights(plan.model, plan.weights, plan.source, tmp_path, lambda *numbers: told.append(numbers))
    assert len(told) == len(plan.weights)
    assert told == sorted(told)
    assert told[-1] == (weight_bytes(plan.weights), weight_bytes(plan.weights))
