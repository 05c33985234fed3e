"""The experts that Hugging Face layers call during tracing: all of them for every token, and a weighted sum.

Which experts a token takes is data, and a program's sizes must not depend on data. So each expert sees each token, and
the weight of those that a token did not choose is 0. That costs E / k times the arithmetic of the chosen experts, and
reads all experts' weights in every call, which a prefill does anyway.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS_NAME = "fpte_experts"
"""Hugging Face name of :func:`all_experts`."""


def served(module: nn.Module) -> bool:
    """Whether an export can compute this module of experts.

    transformers lets others compute it, or it takes nothing but what every expert sees (Llama 4), so that no size in it
    depends on the routing.
    """
    if len(inspect.signature(module.forward).parameters) == 1:
        return True
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "_apply_gate"))


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of experts, by its class's name."""
    return type(module).__name__.lower().endswith("experts")


def has_experts(model: nn.Module) -> bool:
    """Whether some layer of a model is a mixture of experts."""
    return any(is_experts(module) for module in model.modules())


def all_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Hugging Face experts implementation without sizes that depend on data.

    Args:
        module: the experts, with weights [E, N, K], or [E, K, N] if they are transposed.
        hidden_states: [T, C].
        top_k_index: the k experts of each token, int64 [T, k].
        top_k_weights: their weights, [T, k].

    Returns:
        The weighted sum of the experts' results, [T, C].
    """
    name = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _products(module, hidden_states[None], name)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    result = _products(module, inner, "down_proj")
    if getattr(module, "has_post_expert_norm", False):
        result = module.post_expert_norm(result)
    experts = torch.arange(module.down_proj.shape[0], device=top_k_index.device)
    chosen = top_k_index[None] == experts[:, None, None]  # [E, T, k]
    weights = (chosen * top_k_weights[None]).sum(-1)
    return (result * weights[..., None]).sum(0).to(hidden_states.dtype)


def _products(module: Any, x: torch.Tensor, name: str) -> torch.Tensor:
    """``x`` [1 or E, T, K] by each expert's weight: [E, T, N]."""
    weight = getattr(module, name)
    y = torch.matmul(x, weight if module.is_transposed else weight.transpose(1, 2))
    return y + getattr(module, f"{name}_bias")[:, None] if module.has_bias else y


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, all_experts)
