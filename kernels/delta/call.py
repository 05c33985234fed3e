"""One call of the gated delta rule: its tensors, its sizes, and why the kernels refuse it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton

from flashpte.kernels.contract import SUPPORTED_DTYPES, Size, may_be_equal, printable
from flashpte.kernels.launch import copies_in_16_bytes, with_unit_stride

MAX_TOKENS = 16
"""The most tokens of a call that ``flashpte::delta_recurrent`` takes."""

MAX_HEAD_DIM = 256
"""The largest D_k and D_v."""

MAX_CHUNKED_DIM = 128
"""The largest D_k and D_v of the chunked kernels."""


@dataclasses.dataclass(frozen=True)
class DeltaCall:
    """One call; see :func:`flashpte.kernels.delta.reference.delta_reference` for what it computes.

    Attributes:
        query, key: ``[B, L, H_k, D_k]``.
        value: ``[B, L, H_v, D_v]``.
        g, beta: ``[B, L, H_v]``.
        state: float32 ``[B, H_v, D_k, D_v]``, or ``None`` for zeros.
        scale: factor of the result.
        l2norm: whether queries and keys are first divided by their length.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    state: torch.Tensor | None
    scale: float
    l2norm: bool = True

    # Sizes; B and L may be symbolic.
    batch = property(lambda self: self.value.shape[0])
    length = property(lambda self: self.value.shape[1])
    heads_k = property(lambda self: self.key.shape[2])
    heads = property(lambda self: self.value.shape[2], doc="Value heads.")
    k_dim = property(lambda self: self.key.shape[3])
    v_dim = property(lambda self: self.value.shape[3])

    def for_launch(self, aligned: bool = False) -> DeltaCall:
        """The same call in the memory layouts that kernels take: rows, gates and the state are contiguous.

        With ``aligned``, rows that are not known to start at multiples of 16 bytes are copied.
        """
        rows = {name: with_unit_stride(getattr(self, name)) for name in ("query", "key", "value")}
        if aligned:
            rows = {name: row if copies_in_16_bytes(row) else row.contiguous() for name, row in rows.items()}
        state = None if self.state is None else self.state.contiguous()
        g, beta = self.g.contiguous(), self.beta.contiguous()
        return DeltaCall(rows["query"], rows["key"], rows["value"], g, beta, state, self.scale, self.l2norm)

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of query, key and value along B, L and H."""
        return tuple(tensor.stride(d) for tensor in (self.query, self.key, self.value) for d in range(3))

    @property
    def constants(self) -> dict[str, Any]:
        """Constants of every kernel."""
        return {
            "HEADS": self.heads,
            "GROUP": self.heads // self.heads_k,
            "K_DIM": self.k_dim,
            "BLOCK_K": max(16, triton.next_power_of_2(self.k_dim)),
            "L2NORM": self.l2norm,
        }

    def empty_results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialized ``[B, L, H_v, D_v]`` in the dtype of the value, and the state after the last token."""
        shape = (self.batch, self.heads, self.k_dim, self.v_dim)
        return self.value.new_empty(self.value.shape), self.value.new_empty(shape, dtype=torch.float32)


def _why_not_sizes(call: DeltaCall) -> str | None:
    """Which size does not fit, or ``None``."""
    for name, size in (("D_k", call.k_dim), ("D_v", call.v_dim), ("H_k", call.heads_k), ("H_v", call.heads)):
        if not isinstance(size, int) or size == 0:
            return f"{name} must be static and at least 1"
    for name, size in (("key", call.k_dim), ("value", call.v_dim)):
        if size > MAX_HEAD_DIM:
            return f"{name} head dim {size} is above {MAX_HEAD_DIM}: a program's part of the state exceeds registers"
    if call.heads % call.heads_k:
        return f"{call.heads} value heads on {call.heads_k} key heads"
    rows = (call.batch, call.length)
    wanted: dict[str, tuple[Size, ...]] = {
        "query": (*rows, call.heads_k, call.k_dim),
        "key": (*rows, call.heads_k, call.k_dim),
        "g": (*rows, call.heads),
        "beta": (*rows, call.heads),
        "state": (call.batch, call.heads, call.k_dim, call.v_dim),
    }
    for name, sizes in wanted.items():
        tensor = getattr(call, name)
        if tensor is not None and not (
            tensor.dim() == len(sizes) and all(may_be_equal(a, b) for a, b in zip(tensor.shape, sizes, strict=True))
        ):
            found, asked = ("[" + ", ".join(map(printable, each)) + "]" for each in (tensor.shape, sizes))
            return f"{name} has the sizes {found}, the value asks for {asked}"
    return None


def _why_not_chunked(call: DeltaCall) -> str | None:
    """Which head dim the chunked kernels refuse, or ``None``.

    Their loop needs operands that are copied to shared memory in 16 bytes and two stages of them. On an H200 with
    Triton 3.6, other operands gave wrong results and illegal accesses, for a reason that is not known.
    """
    for name, dim in (("key", call.k_dim), ("value", call.v_dim)):
        if dim % 16 or dim > MAX_CHUNKED_DIM:
            return f"{name} head dim {dim}: the chunked kernels take multiples of 16 up to {MAX_CHUNKED_DIM}"
    return None


def why_not(call: DeltaCall, most_tokens: int | None = None) -> str | None:
    """Why the kernels refuse a call, as one sentence, or ``None``. Without ``most_tokens``, the chunked kernels."""
    for name, tensor in (("query", call.query), ("key", call.key), ("value", call.value)):
        if tensor.dim() != 4:
            return f"{name} has {tensor.dim()} dimensions; the kernels take [B, L, H, D]"
    query, key, value = call.query, call.key, call.value
    if value.dtype not in SUPPORTED_DTYPES or not query.dtype == key.dtype == value.dtype:
        return f"dtypes {query.dtype}, {key.dtype}, {value.dtype}: the kernels take one of bfloat16, float16, float32"
    if call.g.dtype != torch.float32:
        return f"g has dtype {call.g.dtype}: a logarithm of decays must be float32"
    if call.beta.dtype not in SUPPORTED_DTYPES:
        return f"beta has dtype {call.beta.dtype}: the kernels take bfloat16, float16 and float32"
    if call.state is not None and call.state.dtype != torch.float32:
        return f"the state has dtype {call.state.dtype}: it must be float32"
    for name in ("query", "key", "g", "beta", "state"):
        tensor = getattr(call, name)
        if tensor is not None and tensor.device != value.device:
            return f"{name} is on {tensor.device}, value on {value.device}"
    if (reason := _why_not_sizes(call)) is not None:
        return reason
    if most_tokens is None and (reason := _why_not_chunked(call)) is not None:
        return reason
    if most_tokens is not None and isinstance(call.length, int) and call.length > most_tokens:
        return f"the kernel takes at most {most_tokens} tokens, got {call.length}"
    return None


def check(call: DeltaCall, most_tokens: int | None = None) -> None:
    """Raises ``ValueError`` with the sentence that :func:`why_not` returns, if any."""
    if (reason := why_not(call, most_tokens)) is not None:
        raise ValueError(reason)
