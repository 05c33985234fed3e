"""Target ``gemma4-31b``: the text model of Gemma 4 31B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flashpte.export.common.errors import ExportError
from flashpte.export.common.options import RUNNER_GEMMA
from flashpte.export.models.registry import TargetSpec

if TYPE_CHECKING:
    from torch import nn

# common to all sizes: 5 sliding layers per full one, no v_proj on full layers, no per-layer embeddings
_ARCHITECTURE: dict[str, Any] = {
    "model_type": "gemma4_text",
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}

GEMMA4_31B: dict[str, Any] = {
    **_ARCHITECTURE,
    "vocab_size": 262_144,
    "hidden_size": 5376,
    "intermediate_size": 21_504,
    "num_hidden_layers": 60,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "num_global_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 1024,
    "max_position_embeddings": 262_144,
}
"""Config of the model with 30.7 B parameters; a checkpoint's own config.json replaces it."""

GEMMA4_SMALL: dict[str, Any] = {
    **_ARCHITECTURE,
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    # 2 query heads per key/value head on sliding layers and 8 on full ones, as in the 31B model
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 1,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 64,
    "max_position_embeddings": 4096,
}
"""Config with one period of the layer pattern; the default length of 256 makes a ring of 128 slots wrap."""

# Features of other Gemma 4 models that this target does not export, by the config field that enables them.
_UNSUPPORTED = {
    "enable_moe_block": "mixture-of-experts layers",
    "num_kv_shared_layers": "layers that share keys and values",
    "hidden_size_per_layer_input": "per-layer embeddings",
}


def build(fields: Mapping[str, Any]) -> nn.Module:
    """Builds the Gemma 4 text model from the fields of a ``gemma4`` or ``gemma4_text`` config, with parameters on meta.

    Raises:
        ExportError: the config is not valid, or belongs to another model of the family (experts, shared caches, ...).
    """
    from flashpte.export.models.build import build_causal_lm, text_fields

    return build_causal_lm("Gemma4TextConfig", "Gemma4ForCausalLM", text_fields(fields), _check)


def _check(config: Any) -> None:
    for field, meaning in _UNSUPPORTED.items():
        if getattr(config, field, None):
            raise ExportError(f"this Gemma 4 config has {meaning} ({field}), which target gemma4-31b does not export")
    if config.use_bidirectional_attention == "all":
        raise ExportError("this Gemma 4 config has bidirectional attention, which target gemma4-31b does not export")


TARGET = TargetSpec(
    name="gemma4-31b",
    description="Gemma 4 31B, text only: 60 layers (5 sliding : 1 full), window 1024, 30.7 B parameters",
    model_types=("gemma4", "gemma4_text"),
    build=build,
    config=GEMMA4_31B,
    small_config=GEMMA4_SMALL,
    executorch_runner=RUNNER_GEMMA,
)
