"""Target ``hf``: a Hugging Face folder of a dense Llama or Qwen3 model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flashpte.export.models.registry import TargetSpec

if TYPE_CHECKING:
    from torch import nn

# model_type -> names of the config class and the model class in transformers
_CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}


def build(fields: Mapping[str, Any]) -> nn.Module:
    """Builds the causal language model that a Llama or Qwen3 config describes, with parameters on meta.

    Raises:
        ExportError: the config is not valid or cannot be exported.
    """
    from flashpte.export.models.build import build_causal_lm

    config_class, model_class = _CLASSES[fields["model_type"]]
    return build_causal_lm(config_class, model_class, fields)


TARGET = TargetSpec(
    name="hf",
    description="a dense Llama or Qwen3 model, from a checkpoint or a config",
    model_types=tuple(_CLASSES),
    build=build,
)
