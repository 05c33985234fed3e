"""Which kernel an attention call gets, or why it gets none. Pure: reads the graph and changes nothing."""

from __future__ import annotations

import dataclasses
import math

import torch

from flashpte.kernels.launch import MAX_HEAD_DIM, SUPPORTED_DTYPES
from flashpte.kernels.split_k import MAX_ROWS
from flashpte.passes.sdpa_node import Ranges, SdpaCall, hint, printable, same_size, size_range, val
from flashpte.passes.vmap_regions import is_batched

DECODE = "flashpte::sdpa_decode"
VERIFY = "flashpte::sdpa_verify"
PREFILL = "flashpte::sdpa_prefill"
DISPATCH = "flashpte::sdpa_dispatch"


@dataclasses.dataclass(frozen=True)
class Route:
    """A decision.

    Attributes:
        op: the operator, ``None`` when the call is declined.
        reason: one plain sentence, whatever the decision.
        scale: factor of the scores.
        dim_order: memory order of the result's dimensions.
        branches: what ``op`` chooses between at run time: for at most :data:`MAX_ROWS` rows, and for more.
    """

    op: str | None
    reason: str
    scale: float = 1.0
    dim_order: tuple[int, ...] = (0, 1, 2, 3)
    branches: tuple[str, ...] = ()


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's dimensions from outermost to innermost in memory.

    A dimension of size 1 has no place of its own: it stays next to the dimension that follows it.
    """
    strides = [hint(s) for s in tensor.stride()]
    sizes = [hint(s) for s in tensor.shape]
    key, keys = 0, [0] * tensor.dim()
    for dim in reversed(range(tensor.dim())):
        key = keys[dim] = strides[dim] if sizes[dim] != 1 else key
    return tuple(sorted(range(tensor.dim()), key=lambda d: (-keys[d], d)))


def _decline_reason(call: SdpaCall) -> str | None:
    if is_batched(call.node):
        return "it is inside of torch.vmap, whose batch dimension the graph does not show"
    query, key, value = val(call.query), val(call.key), val(call.value)
    if val(call.node).dtype != query.dtype:
        return f"the result is {val(call.node).dtype} for {query.dtype} inputs: it runs under autocast"
    if call.dropout_p != 0.0:
        return f"dropout_p is {call.dropout_p}: the kernels are for inference"
    if call.mask is not None and call.is_causal:
        return "a mask together with is_causal is ambiguous"
    if call.scale is not None and not isinstance(call.scale, (int, float)):
        return "scale is computed at run time; the kernels take a constant"
    if call.scale is not None and not math.isfinite(call.scale):
        return f"scale is {call.scale}"
    if not query.dim() == key.dim() == value.dim() == 4:
        return f"query, key, value have {query.dim()}, {key.dim()}, {value.dim()} dimensions; the kernels take 4"
    if query.dtype not in SUPPORTED_DTYPES or not query.dtype == key.dtype == value.dtype:
        return f"dtypes {query.dtype}, {key.dtype}, {value.dtype}: the kernels take one of bfloat16, float16, float32"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor.shape[1], int) or not isinstance(tensor.shape[3], int):
            return f"{name} has a dynamic number of heads or head dim"
        if 0 in tensor.shape:
            return f"{name} is empty"
    if query.shape[3] != key.shape[3]:
        return f"query and key have different head dims, {query.shape[3]} and {key.shape[3]}"
    if max(query.shape[3], value.shape[3]) > MAX_HEAD_DIM:
        return f"head dim {max(query.shape[3], value.shape[3])} is above {MAX_HEAD_DIM}"
    if not (same_size(query.shape[0], key.shape[0]) and same_size(key.shape[0], value.shape[0])):
        return "query, key and value have different batch sizes"
    if key.shape[1] != value.shape[1] or not same_size(key.shape[2], value.shape[2]):
        return "key and value differ in heads or length"
    grouped = call.enable_gqa and query.shape[1] % key.shape[1] == 0
    if query.shape[1] != key.shape[1] and key.shape[1] != 1 and not grouped:
        return f"{query.shape[1]} query heads on {key.shape[1]} key/value heads"
    for name, tensor in (("key", key), ("value", value)):
        if tensor.stride(3) != 1:
            return f"{name} has stride {printable(tensor.stride(3))} in the head dim: every call would copy it"
    return _decline_mask(call, val(call.mask)) if call.mask is not None else None


def _decline_mask(call: SdpaCall, mask: torch.Tensor) -> str | None:
    query, key = val(call.query), val(call.key)
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        return f"mask dtype {mask.dtype}"
    if mask.dtype == torch.float64:
        return "mask dtype torch.float64: the kernels compute in float32"
    if mask.dim() > 4:
        return f"the mask has {mask.dim()} dimensions"
    target = (*query.shape[:3], key.shape[2])
    for size, wanted in zip(reversed(mask.shape), reversed(target), strict=False):
        if not same_size(size, 1) and not same_size(size, wanted):
            return f"mask size {printable(size)} does not match {printable(wanted)}"
    return None


def route(call: SdpaCall, ranges: Ranges | None = None) -> Route:
    """Decides about one attention call.

    L_q decides the kernel: 1 decode, 2 to 16 verify, more prefill; a dynamic L_q by its range. Where the range spans
    regimes, L_q chooses between verify (which is right for 1 row, too) and prefill at run time.

    Args:
        call: the call.
        ranges: the program's range constraints, where they are known.
    """
    declined = _decline_reason(call)
    if declined is not None:
        return Route(None, declined)
    query = val(call.query)
    scale = float(call.scale) if call.scale is not None else query.shape[3] ** -0.5
    lower, upper = size_range(query.shape[2], ranges)
    span = str(lower) if lower == upper else f"{lower}..{'' if upper is None else upper}"
    op = PREFILL
    branches: tuple[str, ...] = ()
    if upper == 1:
        op, reason = DECODE, "L_q is 1: split the keys over the GPU, combine by log-sum-exp"
    elif upper is not None and upper <= MAX_ROWS:
        op, reason = VERIFY, f"L_q is {span}: the rows of a head group share each key tile, keys are split"
    elif lower > MAX_ROWS:
        reason = f"L_q is {span}: tiled, skipping masked key tiles"
    else:
        op, branches = DISPATCH, (VERIFY, PREFILL)
        reason = f"L_q is {span}: at run time up to {MAX_ROWS} rows take sdpa_verify, more sdpa_prefill"
    return Route(op, reason, scale, memory_order(val(call.node)), branches)
