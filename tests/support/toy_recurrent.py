"""A target whose second layer is recurrent: a short convolution and a delta rule replace attention.

Its state is two buffers, which go back only by snapshots: the last inputs of the convolution, and a matrix that every
token changes. With k, v, q of one head, b in (0, 1) and the state S [D_k, D_v]::

    S_t = S_{t-1} + k_t b_t (v_t - k_t^T S_{t-1}),    out_t = q_t^T S_t

All tokens of a call are computed at once: the corrections u solve (1 + tril(b K K^T, -1)) u = b (V - K S).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import LinearAttentionLayer

from flashpte.export.models.build import attention_of, build_causal_lm
from flashpte.export.models.registry import TargetSpec
from flashpte.export.state.layer_state import StateRules

KERNEL, HEAD = 3, 16  # taps of the convolution, D_k = D_v
CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


@dataclasses.dataclass(frozen=True)
class RecurrentState:
    """The state of the recurrent layer."""

    mask_name = None

    def buffers(self, max_seq_len, dtype):
        return {"conv": ((1, 3 * HEAD, KERNEL - 1), dtype), "delta": ((1, HEAD, HEAD), dtype)}

    def mask(self, input_pos, max_seq_len):
        raise NotImplementedError

    def view(self, buffers, input_pos, max_seq_len):
        return _View(buffers["conv"], buffers["delta"], input_pos)

    def rules(self, names, part):
        held = {"convolution": names["conv"], "state": names["delta"]}
        return StateRules("recurrent", held, goes_back="snapshot", fed_twice=False, compared="last", part=part)

    def reference(self):
        return _Reference()

    def read_reference(self, layer):
        return {"convolution": layer.conv[0], "state": layer.delta[0]}


class _View:
    """The buffers during one call; a sequence that starts at position 0 starts with zeros."""

    def __init__(self, conv, delta, input_pos):
        self._buffers, self._later = (conv, delta), input_pos[0] > 0

    def read(self, like):
        return tuple(torch.where(self._later, buffer, torch.zeros_like(buffer)) for buffer in self._buffers)

    def write(self, *values):
        for buffer, value in zip(self._buffers, values, strict=True):
            buffer.copy_(value)


class _Reference(LinearAttentionLayer):
    """The same state for the eager model, with its own tensors."""

    conv = delta = None

    def read(self, like):
        if self.conv is None:
            return like.new_zeros(1, 3 * HEAD, KERNEL - 1), like.new_zeros(1, HEAD, HEAD)
        return self.conv, self.delta

    def write(self, conv, delta):
        self.conv, self.delta = conv, delta


class DeltaRule(nn.Module):
    """Replaces an attention layer; has one head."""

    def __init__(self, hidden_size, layer):
        super().__init__()
        self.layer = layer
        self.in_proj = nn.Linear(hidden_size, 3 * HEAD, bias=False)
        self.gate = nn.Linear(hidden_size, 1, bias=False)
        self.conv = nn.Parameter(torch.empty(3 * HEAD, KERNEL))
        self.out_proj = nn.Linear(HEAD, hidden_size, bias=False)

    def forward(self, hidden_states, past_key_values=None, **_kwargs):
        cache = past_key_values.layers[self.layer]
        before, state = cache.read(hidden_states)
        joined = torch.cat((before, self.in_proj(hidden_states).transpose(1, 2)), -1)  # [1, 3 D, K - 1 + T]
        mixed = F.conv1d(joined, self.conv[:, None], groups=3 * HEAD).transpose(1, 2)
        q, k, v = mixed.split(HEAD, -1)
        k = F.normalize(k, dim=-1)
        b = self.gate(hidden_states).sigmoid()
        system = torch.eye(k.shape[1], dtype=k.dtype) + (b * k @ k.mT).tril(-1)
        u = torch.linalg.solve_triangular(system, b * (v - k @ state), upper=False, unitriangular=True)
        out = q @ state + (q @ k.mT).tril() @ u
        cache.write(joined[..., joined.shape[-1] - (KERNEL - 1) :], state + k.mT @ u)
        return self.out_proj(out), None


def build(fields):
    model = build_causal_lm("LlamaConfig", "LlamaForCausalLM", fields)
    with torch.device("meta"):
        model.model.layers[1].self_attn = DeltaRule(model.config.hidden_size, 1)
    return model.eval().requires_grad_(False)


def layer_state(layer):
    return RecurrentState() if isinstance(layer.self_attn, DeltaRule) else attention_of(layer)


TARGET = TargetSpec(
    name="toy-recurrent",
    description="a Llama with a recurrent layer",
    model_types=("llama",),
    build=build,
    config=CONFIG,
    small_config=CONFIG,
    max_seq_len=48,
    small_max_seq_len=48,
    layer_state=layer_state,
)
