"""Experts' weights that a checkpoint holds one by one, and a model as one tensor."""

import pytest
import torch
from safetensors.torch import save_file

from flashpte.export.common.errors import ExportError
from flashpte.export.weights.merged import Merged, merged_names
from flashpte.export.weights.safetensors import Checkpoint

LAYER = "model.layers.0.mlp."


def pieces(experts=3):
    torch.manual_seed(0)
    shapes = {"gate_proj": (4, 6), "up_proj": (4, 6), "down_proj": (6, 4)}
    return {
        f"{LAYER}experts.{e}.{name}.weight": torch.randn(shape)
        for e in range(experts)
        for name, shape in shapes.items()
    }


def opened(tmp_path, tensors, model_type="qwen3_moe"):
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.merge(model_type)
    return checkpoint


def test_experts_are_stacked_and_gate_and_up_joined(tmp_path):
    tensors = {**pieces(11), "model.norm.weight": torch.ones(6)}
    checkpoint = opened(tmp_path, tensors)
    assert set(checkpoint.tensors) == {f"{LAYER}experts.gate_up_proj", f"{LAYER}experts.down_proj", "model.norm.weight"}
    assert checkpoint.tensors[f"{LAYER}experts.gate_up_proj"].shape == (11, 8, 6)
    found = checkpoint.read(f"{LAYER}experts.gate_up_proj")
    for e in range(11):
        gate, up = (tensors[f"{LAYER}experts.{e}.{name}.weight"] for name in ("gate_proj", "up_proj"))
        assert torch.equal(found[e], torch.cat([gate, up]))
        assert torch.equal(
            checkpoint.read(f"{LAYER}experts.down_proj")[e], tensors[f"{LAYER}experts.{e}.down_proj.weight"]
        )


def test_mixtral_is_renamed_too():
    block = "model.layers.3.block_sparse_moe."
    names = [f"{block}experts.{e}.w{i}.weight" for e in range(2) for i in (1, 2, 3)]
    renamed, merged = merged_names("mixtral", [*names, f"{block}gate.weight", "lm_head.weight"])
    assert renamed[f"{block}gate.weight"] == "model.layers.3.mlp.gate.weight"
    assert "lm_head.weight" not in renamed
    assert merged["model.layers.3.mlp.experts.gate_up_proj"] == Merged(
        (
            tuple(f"{block}experts.{e}.w1.weight" for e in range(2)),
            tuple(f"{block}experts.{e}.w3.weight" for e in range(2)),
        ),
        1,
    )


def test_fused_weights_stay_as_they_are(tmp_path):
    checkpoint = opened(tmp_path, {f"{LAYER}experts.gate_up_proj": torch.ones(2, 8, 6)})
    assert set(checkpoint.tensors) == {f"{LAYER}experts.gate_up_proj"}


@pytest.mark.parametrize("missing", ["experts.1.gate_proj.weight", "experts.2.up_proj.weight"])
def test_a_missing_piece_is_named(tmp_path, missing):
    tensors = pieces()
    del tensors[LAYER + missing]
    with pytest.raises(
        ExportError, match=f"the checkpoint has no tensor {LAYER}mlp.{missing}".replace("mlp.mlp", "mlp")
    ):
        opened(tmp_path, tensors)


def test_a_piece_of_another_shape_or_dtype_is_named(tmp_path):
    name = f"{LAYER}experts.1.up_proj.weight"
    with pytest.raises(ExportError, match=rf"tensor {name} has shape \[4, 5\]"):
        opened(tmp_path, {**pieces(), name: torch.ones(4, 5)})
    with pytest.raises(ExportError, match=f"tensor {name} has dtype F16"):
        opened(tmp_path, {**pieces(), name: torch.ones(4, 6).half()})


def test_models_without_a_table_keep_their_names():
    assert merged_names("llama", ["model.norm.weight", "a.experts.0.gate_proj.weight"]) == ({}, {})
