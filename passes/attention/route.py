"""Chooses the operator for an attention call, or says why none fits. Reads the graph and changes nothing.

The operator's launcher chooses the kernel when the program is traced for an arch. On sm_90, most 16-bit calls with more
than 16 packed rows (L_q x H_q / H_kv) run on the Hopper kernel instead of the split-K or tiled kernel (see
:mod:`flashpte.kernels`).
"""

from __future__ import annotations

import dataclasses
import math

import torch

from flashpte.kernels.contract import MAX_ROWS, why_not_mask, why_not_scores, why_not_tensors
from flashpte.passes.attention.call import SdpaCall
from flashpte.passes.graph.values import Ranges, hint, may_be_same, printable, same_size, size_range, val
from flashpte.passes.graph.vmap import is_batched

Size = int | torch.SymInt

DECODE = "flashpte::sdpa_decode"
VERIFY = "flashpte::sdpa_verify"
PREFILL = "flashpte::sdpa_prefill"
DISPATCH = "flashpte::sdpa_dispatch"


@dataclasses.dataclass(frozen=True)
class Route:
    """The decision on one call.

    Attributes:
        op: the operator; ``None`` if the call is declined.
        reason: one plain sentence, for either decision.
        scale: factor of the scores.
        dim_order: memory order of the result's dimensions.
        branches: the operators that ``op`` chooses between at run time: up to :data:`MAX_ROWS` rows, and above.
        equal: pairs of sizes that attention requires to be equal but that the program does not prove equal.
    """

    op: str | None
    reason: str
    scale: float = 1.0
    dim_order: tuple[int, ...] = (0, 1, 2, 3)
    branches: tuple[str, ...] = ()
    equal: tuple[tuple[Size, Size], ...] = ()


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's dimensions from outermost to innermost in memory.

    A dimension of size 1 has no place of its own. It stays next to the dimension that follows it.
    """
    strides = [hint(s) for s in tensor.stride()]
    sizes = [hint(s) for s in tensor.shape]
    key, keys = 0, [0] * tensor.dim()
    for dim in reversed(range(tensor.dim())):
        key = keys[dim] = strides[dim] if sizes[dim] != 1 else key
    return tuple(sorted(range(tensor.dim()), key=lambda d: (-keys[d], d)))


def result_order(call: SdpaCall, order: tuple[int, ...]) -> tuple[int, ...] | None:
    """The memory order of the four dimensions, given the order of the node's own; ``None`` if no order of four fits."""
    shape = val(call.node).shape
    kept = [dim for dim in order if not same_size(shape[dim], 1)]
    places: list[float] = []
    for group in reversed(call.dims):
        own = [dim for dim in group if dim in kept]
        if own:
            first = kept.index(own[0])
            if kept[first : first + len(own)] != own:
                return None
            places.append(first)
        else:
            # A dimension of size 1 stays next to the one that follows it.
            places.append(places[-1] - 0.01 if places else len(kept))
    places.reverse()
    return tuple(sorted(range(4), key=lambda dim: places[dim]))


class _Sizes:
    """Compares sizes under the assumption that attention fails at run time where they must be equal but differ."""

    def __init__(self, ranges: Ranges | None) -> None:
        self._ranges = ranges
        self.required: dict[tuple[str, str], tuple[Size, Size]] = {}

    def equal(self, a: Size, b: Size, broadcasts: bool = False) -> bool:
        """Whether two sizes must be equal for attention to run. ``broadcasts``: attention also accepts a size of 1."""
        if same_size(a, b):
            return True
        if not may_be_same(a, b, self._ranges):
            return False
        if broadcasts and min(size_range(size, self._ranges)[0] for size in (a, b)) < 2:
            return False
        self.required[str(printable(a)), str(printable(b))] = (a, b)
        return True


def _decline_reason(call: SdpaCall, sizes: _Sizes) -> str | None:
    if is_batched(call.node):
        return "it is inside torch.vmap, whose batch dimension the graph does not show"
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
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not all(isinstance(size, int) for size in (*tensor.shape[1:2], *tensor.shape[3:4])):
            return f"{name} has a dynamic number of heads or head dim"
        if 0 in tensor.shape:
            return f"{name} is empty"
    reason = why_not_tensors(query, key, value, sizes.equal)
    if reason is not None:
        return reason
    if query.shape[1] != key.shape[1] and key.shape[1] != 1 and not call.enable_gqa:
        return f"{query.shape[1]} query heads on {key.shape[1]} key/value heads"
    for name, tensor in (("key", key), ("value", value)):
        if tensor.stride(3) != 1:
            return f"{name} has stride {printable(tensor.stride(3))} in the head dim: every call would copy it"
    if result_order(call, memory_order(val(call.node))) is None:
        return "no memory order of 4 dimensions gives the result's layout"
    sinks = None if call.sinks is None else val(call.sinks)
    if (reason := why_not_scores(call.softcap, sinks, query, sizes.equal)) is not None:
        return reason
    if call.mask is None:
        return None
    return why_not_mask(val(call.mask), (*query.shape[:3], key.shape[2]), sizes.equal)


def route(call: SdpaCall, ranges: Ranges | None = None) -> Route:
    """Decides on one attention call.

    L_q, or the range of a dynamic L_q, decides the operator: 1 is decode, 2 to 16 is verify, more is prefill. If the
    range crosses 16, L_q chooses between verify (which is also correct for 1 row) and prefill at run time.

    Args:
        call: the call.
        ranges: the program's range constraints, if known.
    """
    sizes = _Sizes(ranges)
    declined = _decline_reason(call, sizes)
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
    order = result_order(call, memory_order(val(call.node)))
    assert order is not None
    return Route(op, reason, scale, order, branches, tuple(sizes.required.values()))
