"""Target ``hf``: any decoder-only model of transformers whose attention others may serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flashpte.export.common.errors import ExportError
from flashpte.export.models.registry import TargetSpec

if TYPE_CHECKING:
    from torch import nn

TESTED = (
    *("afmoe", "apertus", "arcee", "aria_text", "bitnet", "cohere", "cohere2", "cohere2_moe", "cwm"),
    *("dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma2", "gemma3_text"),
    *("glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_oss", "granite", "granite_swa", "granitemoe"),
    *("granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3"),
    *(
        "iquestcoder",
        "jais2",
        "kolibri1",
        "laguna",
        "llama",
        "llama4_text",
        "mellum",
        "minimax_m2",
        "ministral",
        "ministral3",
    ),
    *("mistral", "mixtral", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi"),
    *("phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open"),
    *("stablelm", "starcoder2", "vaultgemma"),
)
"""Values of ``model_type`` that tests/export/models/test_families.py compares with transformers."""


def build(fields: Mapping[str, Any]) -> nn.Module:
    """Builds the causal language model of a config's ``model_type``, with parameters on meta.

    Raises:
        ExportError: transformers has no such model, or the config is not valid or cannot be exported.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from flashpte.export.models.build import build_causal_lm, text_fields

    fields = text_fields(fields)
    model_type: Any = fields.get("model_type")
    if not {model_type} <= CONFIG_MAPPING_NAMES.keys() & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys():
        raise ExportError(f"transformers has no causal language model of model_type {model_type!r}")
    return build_causal_lm(CONFIG_MAPPING_NAMES[model_type], MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], fields)


TARGET = TargetSpec(
    name="hf",
    description="any decoder of transformers with plain attention, from a checkpoint or a config",
    model_types=None,
    build=build,
    tested=TESTED,
)
