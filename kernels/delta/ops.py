"""The operator of the gated delta rule: registration, fake and CPU implementations.

Its CUDA implementation is the launcher, which AOTInductor traces into. Its CPU implementation is the reference. All
raise the same ``ValueError`` (:func:`flashpte.kernels.delta.call.why_not`). It returns the new state and changes none
of its arguments. A model copies the state to its buffer at the end of a method.

Prefill's kernels (:mod:`flashpte.kernels.delta.scan`) have no operator: they gave wrong results in some layouts on a
GPU, for a reason that is not known (docs/notes/delta.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch.library import CustomOpDef, triton_op

from flashpte.kernels.delta.call import MAX_TOKENS, DeltaCall, check
from flashpte.kernels.delta.recurrent import launch_recurrent
from flashpte.kernels.delta.reference import delta_reference

Results = tuple[torch.Tensor, torch.Tensor]


def _operator(name: str, launch: Callable[[DeltaCall], Results], most_tokens: int | None) -> CustomOpDef:
    """Registers an operator that takes at most ``most_tokens`` tokens, and its implementations.

    Programs are serialized with its arguments, so their names, order and types must not change. They are those of
    :class:`flashpte.kernels.delta.call.DeltaCall`. The results are ``[B, L, H_v, D_v]`` in the dtype of the value and
    the state after the last token, float32, both contiguous.
    """

    def cuda(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor | None,
        scale: float,
        l2norm: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return launch(DeltaCall(query, key, value, g, beta, state, scale, l2norm))

    def fake(*args: object) -> Results:
        call = DeltaCall(*args)  # type: ignore[arg-type]
        check(call, most_tokens)
        return call.empty_results()

    def cpu(*args: object) -> Results:
        call = DeltaCall(*args)  # type: ignore[arg-type]
        check(call, most_tokens)
        tensors = (call.query, call.key, call.value, call.g, call.beta, call.state)
        out, state = delta_reference(*tensors, call.scale, call.l2norm)
        return out.to(call.value.dtype), state

    op = cast(CustomOpDef, triton_op(f"flashpte::{name}", cuda, mutates_args=()))
    op.register_fake(fake)
    op.register_kernel("cpu")(cpu)
    return op


delta_recurrent = _operator("delta_recurrent", launch_recurrent, MAX_TOKENS)
"""The gated delta rule of 1 to 16 tokens: decode and verify."""
