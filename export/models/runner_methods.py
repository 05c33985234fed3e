"""The methods that ExecuTorch's own runners call, see :mod:`flashpte.export.models.executorch_runners`."""

from __future__ import annotations

import torch
from torch import nn
from torch.export import ExportedProgram

from flashpte.export.common.options import TEMPERATURE
from flashpte.export.models.executorch_runners import RunnerContract
from flashpte.export.models.methods import CausalLMMethod, MethodSpec, export_method
from flashpte.export.state.model_state import ModelState

GREEDY_TEMPERATURE = 1e-6
"""Temperatures up to this one take the most likely token. ExecuTorch's runner passes it for a temperature of 0."""

_TINY = 1e-20  # keeps both logarithms finite when a random number is 0


def sample(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Draws a token by the Gumbel-max trick: the argmax of ``logits / temperature - log(-log(u))``, u uniform.

    The draw has the distribution ``softmax(logits / temperature)`` (Gumbel, 1954) and needs neither a sort nor a sum
    over the vocabulary, so no kernel that ExecuTorch's CUDA backend lacks. At :data:`GREEDY_TEMPERATURE` and below
    there is no noise, so that ties between bfloat16 logits go to the lowest id, as with ``torch.argmax``.

    Args:
        logits: [1, V], any floating dtype; computed in float32.
        temperature: float32 [1].

    Returns:
        int64 [1, 1].
    """
    uniform = torch.rand_like(logits, dtype=torch.float32)
    gumbel = -torch.log(-torch.log(uniform + _TINY) + _TINY)
    noise = torch.where(temperature > GREEDY_TEMPERATURE, gumbel, torch.zeros_like(gumbel))
    scores = logits.float() / temperature.clamp(min=GREEDY_TEMPERATURE) + noise
    return scores.argmax(dim=-1, keepdim=True)


class SamplingMethod(CausalLMMethod):
    """A method of a language model that returns one token, sampled from its last row of logits."""

    def forward(  # type: ignore[override]
        self, tokens: torch.Tensor, input_pos: torch.Tensor, temperature: torch.Tensor
    ) -> torch.Tensor:
        """Maps tokens int64 [1, T], ``input_pos`` int64 [T] and temperature float32 [1] to a token int64 [1, 1]."""
        return sample(super().forward(tokens, input_pos)[:, -1], temperature)


class FloatLogitsMethod(CausalLMMethod):
    """A method that returns float32 logits, in which ``TextLLMRunner`` computes its softmax and cumulative sum."""

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        """Maps tokens int64 [1, T] at ``input_pos`` int64 [T] to logits float32 [1, 1, V]."""
        return super().forward(tokens, input_pos).float()


def export_for_runner(
    contract: RunnerContract, model: nn.Module, kv_cache: ModelState, spec: MethodSpec
) -> ExportedProgram:
    """Exports one method as a runner calls it; see :func:`.export_method`."""
    if not contract.samples:
        return export_method(model, kv_cache, spec, FloatLogitsMethod(model, kv_cache, all_logits=False))
    module = SamplingMethod(model, kv_cache, all_logits=False)
    return export_method(model, kv_cache, spec, module, {TEMPERATURE: torch.ones(1)})
