"""The gated delta rule of Qwen3-Next and Qwen3.5 (gated DeltaNet): decode, verify and prefill."""

from flashpte.kernels.delta import scan  # noqa: F401  (states the facts about its kernels)
from flashpte.kernels.delta.ops import delta_recurrent
from flashpte.kernels.delta.reference import delta_reference

__all__ = ["delta_recurrent", "delta_reference"]
