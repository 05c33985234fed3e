"""examples/perplexity.py: shuffled channels change no result of the dense model, but the groups of quantized ones."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import hugging_face

EXAMPLE = Path(__file__).parents[3] / "examples" / "perplexity.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("perplexity_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = hugging_face("Llama", tie_word_embeddings=request.param, **sizes)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor.uniform_(0.5, 1.5)
    if request.param:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), "model_type": "llama"}))
    return folder


def logits(example, checkpoint, options, shuffle):
    model, _ = example.quantized_model(checkpoint, {"dtype": "float32", **options}, shuffle)
    with torch.no_grad():
        return model(torch.arange(20)[None], use_cache=False).logits


def test_shuffling_keeps_the_dense_model_and_mixes_groups(example, checkpoint):
    dense, shuffled = (logits(example, checkpoint, {}, shuffle) for shuffle in (False, True))
    torch.testing.assert_close(shuffled, dense, rtol=1e-4, atol=1e-5 * float(dense.abs().max()))
    narrow = [logits(example, checkpoint, {"qlinear": "4w"}, shuffle) for shuffle in (False, True)]
    assert float((narrow[0] - narrow[1]).norm()) > 0.01 * float(dense.norm())


def test_every_format_of_the_table_can_be_made(example, checkpoint):
    sizes = {name: example.quantized_model(checkpoint, options)[1] for name, options in example.FORMATS.items()}
    assert sizes["int4-g128"] < sizes["int4-g32"] < sizes["int4-g32-hqq"] < sizes["int8-g32"] < sizes["bfloat16"]
