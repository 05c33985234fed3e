"""What a quantized folder becomes in a program, compared with the dense weights that it stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from eager_program import EagerProgram

from flashpte.export.check.check_program import check_program, named_weights
from flashpte.export.check.eager_model import eager_pair, rebuild
from flashpte.export.common.options import ExportOptions
from flashpte.export.pipeline import export_programs, load_weights, plan_export
from flashpte.export.pipeline.plan import ExportPlan
from flashpte.export.weights.quantized import QuantizedLinear


def planned(folder: Path, **options: Any) -> ExportPlan:
    """The plan of an export in float32."""
    return plan_export(ExportOptions("hf", checkpoint=folder, dtype="float32", max_seq_len=64, **options))


def formats_of(plan: ExportPlan) -> set[str]:
    """The formats of a plan's weights."""
    return {weight.format for weight in plan.weights}


def same_weights(plan: ExportPlan, meant: Mapping[str, torch.Tensor]) -> None:
    """Loads a plan's weights and compares what they stand for, bit by bit."""
    load_weights(plan)
    for name, expected in meant.items():
        owner = plan.model.get_submodule(name.rpartition(".")[0])
        found = owner.dequantized() if isinstance(owner, QuantizedLinear) else plan.model.get_parameter(name)
        assert torch.equal(found, expected), name


def assert_runs_as_its_weights(folder: Path, meant: Mapping[str, torch.Tensor]) -> None:
    """Compares logits with those of the dense weights, exports decode, and checks it as ``run-model --check`` does."""
    plan = planned(folder, layers=1, method="decode")
    load_weights(plan)
    fields = {**json.loads((folder / "config.json").read_text()), "num_hidden_layers": 1}
    fields.pop("quantization_config")
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).float().eval()
    reference.load_state_dict({name: tensor for name, tensor in meant.items() if ".layers.1." not in name})
    with torch.no_grad():
        plan.model.set_attn_implementation("sdpa")  # type: ignore[operator]
        reference.set_attn_implementation("sdpa")
        ids = torch.tensor([[1, 7, 3, 90, 15]])
        found, expected = (model(input_ids=ids, use_cache=False).logits for model in (plan.model, reference))
    assert torch.equal(found, expected)

    plan = planned(folder, layers=1, method="decode")
    program = export_programs(plan)["decode"]
    calls = [node for node in program.graph.nodes if node.target is torch.ops.flashpte.quantized_linear.default]
    assert len(calls) == sum(weight.format.startswith("int") for weight in plan.weights) >= 7

    plan = planned(folder, layers=1)
    load_weights(plan)
    model = rebuild(json.loads(json.dumps(plan.manifest())), folder)
    weights = named_weights(plan.model)
    report = check_program(EagerProgram(plan), *eager_pair(model), weights=weights, model_weights=named_weights(model))
    assert report.passed, report.lines()
    assert report.weights_equal == len(weights)
