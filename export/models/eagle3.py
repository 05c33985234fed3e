"""An EAGLE-3 draft head: fuses (usually three) hidden states of the target; one decoder layer then proposes tokens.

Source of the formulas: Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via
Training-Time Test" (arXiv 2503.01840); the flags follow the configs of published checkpoints
(:mod:`flashpte.export.models.eagle3_config`). e is a token's embedding, f the feature of the position before it::

    f  = fc(concatenate(taps))                          FeatureFusion; later steps feed back their own g
    x  = concatenate(norm(e), norm(f))                  twice the hidden size
    h  = f + attention(x)
    g  = h + mlp(norm(h))
    proposal = argmax(lm_head(norm(g))), mapped to the target's vocabulary by d + d2t[d]

Shape legend: T tokens, C hidden size of the draft, C_t of the target, V_d draft vocabulary. The batch is always 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from flashpte.export.common.errors import ExportError
from flashpte.export.models.attention_interface import ATTENTION_NAME
from flashpte.export.models.build import EmptyTensorsOnMeta, wrong_size
from flashpte.export.models.eagle3_config import CONFIG_CLASSES, DraftConfig
from flashpte.export.state.kv_cache import attention_state
from flashpte.export.state.model_state import StateView

_ATTENTION: dict[str, Callable[..., nn.Module]] = {"llama": LlamaAttention, "qwen3": Qwen3Attention}


def layer_config(config: DraftConfig) -> Any:
    """The transformers config of the draft's layer; fields missing in the checkpoint get that class's defaults.

    Raises:
        ExportError: a size is impossible, or transformers refuses the fields.
    """
    name = CONFIG_CLASSES[config.model_type]
    if problem := wrong_size(config.layer):
        raise ExportError(f"not a valid draft config: {problem}")
    try:
        built = getattr(transformers, name).from_dict({**config.layer, "num_hidden_layers": 1})
    except Exception as error:  # transformers' own checks raise errors of many kinds
        raise ExportError(f"not a valid draft config ({name}): {' '.join(str(error).split())}") from error
    built._attn_implementation = ATTENTION_NAME
    if built.num_attention_heads % built.num_key_value_heads:
        raise ExportError(
            f"the draft config has {built.num_attention_heads} attention heads, "
            f"must be a multiple of its {built.num_key_value_heads} key heads"
        )
    return built


class FeatureFusion(nn.Module):
    """Fuses the target's n tapped hidden states, each [1, T, C_t], to the draft's feature [1, T, C]."""

    def __init__(self, config: DraftConfig, taps: int, target_hidden_size: int):
        super().__init__()
        layer = layer_config(config)
        eps, width = layer.rms_norm_eps, taps * target_hidden_size
        self.input_norm = LlamaRMSNorm(width, eps=eps) if config.norm_before_fc else None
        self.fc_norm = (
            nn.ModuleList(LlamaRMSNorm(target_hidden_size, eps=eps) for _ in range(taps)) if config.fc_norm else None
        )
        self.fc = nn.Linear(width, layer.hidden_size, bias=False)

    def forward(self, taps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuses one hidden state [1, T, C_t] per tap to the feature [1, T, C]."""
        if self.fc_norm is not None:
            taps = [norm(tap) for norm, tap in zip(self.fc_norm, taps, strict=True)]
        joined = torch.cat(tuple(taps), -1)
        if self.input_norm is not None:
            joined = self.input_norm(joined)
        return self.fc(joined)


class DraftLayer(nn.Module):
    """The decoder layer of a draft; its attention reads the token's embedding and the feature, concatenated."""

    def __init__(self, config: DraftConfig, layer: Any):
        super().__init__()
        self.norm_before_residual = config.norm_before_residual
        attention: Any = _ATTENTION[config.model_type](layer, 0)
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = getattr(attention, name).weight.shape[0]
            setattr(attention, name, nn.Linear(2 * layer.hidden_size, rows, bias=layer.attention_bias))
        self.self_attn = attention
        self.mlp = LlamaMLP(_with_mlp_bias(layer))
        self.input_layernorm = LlamaRMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)

    def forward(
        self,
        embeds: torch.Tensor,
        features: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        cache: StateView,
    ) -> torch.Tensor:
        """Maps embeddings and features [1, T, C] to the next step's features [1, T, C]; mask is bool [1, 1, T, S]."""
        normalised = self.hidden_norm(features)
        residual = normalised if self.norm_before_residual else features
        joined = torch.cat((self.input_layernorm(embeds), normalised), -1)
        attended, _ = self.self_attn(joined, position_embeddings=rope, attention_mask=mask, past_key_values=cache)
        hidden = residual + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def _with_mlp_bias(layer: Any) -> Any:
    if not hasattr(layer, "mlp_bias"):  # only Llama's config has it
        layer.mlp_bias = False
    return layer


class DraftHead(nn.Module):
    """One step of the chain: maps a token and the feature before it to a proposal and the feature after it.

    Attributes:
        embed_tokens: the draft's own embedding, or ``None`` to use the target's.
        lm_head: the output projection, or ``None`` if it is tied to the embedding.
        d2t: int64 [V_d], offsets to add to draft ids for target ids; ``None`` if the ids are the same.
        hidden_size: C.
        attention: the state of the draft's layer.
    """

    def __init__(self, config: DraftConfig, *, own_embedding: bool, own_head: bool, own_map: bool):
        super().__init__()
        layer = layer_config(config)
        self.hidden_size = layer.hidden_size
        self.vocab_size = layer.vocab_size
        self.norm_output = config.norm_output
        self.embed_tokens = nn.Embedding(layer.vocab_size, layer.hidden_size) if own_embedding else None
        self.layer = DraftLayer(config, layer)
        self.norm = LlamaRMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)
        self.lm_head = nn.Linear(layer.hidden_size, config.draft_vocab_size, bias=False) if own_head else None
        self.rotary_emb = LlamaRotaryEmbedding(layer)
        self.d2t: torch.Tensor | None
        d2t = torch.zeros(config.draft_vocab_size, dtype=torch.int64, device="meta") if own_map else None
        self.register_buffer("d2t", d2t)
        attn: Any = self.layer.self_attn
        self.attention = attention_state(attn.k_proj.weight.shape[0] // attn.head_dim, attn.head_dim, config.window)

    def forward(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        input_pos: torch.Tensor,
        mask: torch.Tensor,
        cache: StateView,
        embedding: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward of the draft.

        Args:
            tokens: int64 [1, T], the tokens that follow the features' positions.
            features: [1, T, C], features of the positions before the tokens.
            input_pos: int64 [T], positions of the features; row i writes its keys there.
            mask: bool [1, 1, T, S], true where a row attends to a slot of the draft's cache.
            cache: the cache that the layer writes its keys and values to.
            embedding: [V, C], the embedding table.

        Returns:
            Logits of the last row over the draft's vocabulary [1, 1, V_d] and the feature after it [1, 1, C].
        """
        embeds = F.embedding(tokens, embedding)
        hidden = self.layer(embeds, features, self.rotary_emb(features, input_pos[None]), mask, cache)[:, -1:]
        normalised = self.norm(hidden)
        head = embedding if self.lm_head is None else self.lm_head.weight
        return F.linear(normalised, head), normalised if self.norm_output else hidden

    def to_target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Maps int64 ids of the draft's vocabulary to the target's; the shape stays the same."""
        return draft_ids if self.d2t is None else draft_ids + self.d2t[draft_ids]


def build_draft(
    config: DraftConfig, taps: int, target_hidden_size: int, *, own_embedding: bool, own_head: bool, own_map: bool
) -> tuple[FeatureFusion, DraftHead]:
    """Builds both parts of a draft for inference, with parameters on the meta device.

    Args:
        config: config of the draft.
        taps: number of the target's hidden states to fuse.
        target_hidden_size: C_t.
        own_embedding: whether the checkpoint has an embedding; otherwise the draft uses the target's.
        own_head: whether the checkpoint has an output projection; otherwise the draft uses the embedding.
        own_map: whether the checkpoint maps draft ids to target ids; otherwise they are the same.

    Raises:
        ExportError: the config does not describe a possible layer.
    """
    try:
        with EmptyTensorsOnMeta():
            fusion = FeatureFusion(config, taps, target_hidden_size)
            head = DraftHead(config, own_embedding=own_embedding, own_head=own_head, own_map=own_map)
    except KeyError as error:
        raise ExportError(f"not a valid draft config: {error.args[0]!r} is unknown or missing") from error
    return fusion.eval().requires_grad_(False), head.eval().requires_grad_(False)


@dataclasses.dataclass(frozen=True)
class Draft:
    """A draft head that fits a target.

    Attributes:
        config: its config.
        chain: K, number of tokens that it proposes at a time.
        taps: hidden states of the target that it reads: 0 is the embedding, k the output of layer k - 1.
        fusion: the part that runs in the target's methods.
        head: the part that runs in ``draft_decode``.
    """

    config: DraftConfig
    chain: int
    taps: tuple[int, ...]
    fusion: FeatureFusion
    head: DraftHead

    @property
    def window(self) -> int | None:
        """Sliding window of the draft's attention in tokens; ``None`` for full attention."""
        return self.head.attention.window
