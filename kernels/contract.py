"""The single contract for the attention that the kernels take: one sentence that says why they refuse, or ``None``.

The router declines a node with this sentence. Every implementation of an operator (CPU, fake, CUDA) raises
``ValueError`` with it before it launches anything. Kernels trust the sizes that they get, and read out of bounds if
those do not fit.

Sizes may be symbolic. Two sizes are refused if they are known to differ. Sizes that may be equal are accepted, and no
guard is added. (A call on data has no symbolic sizes, so everything is compared.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flashpte.kernels import tuning
from flashpte.kernels.call import AttentionCall, GivenMap
from flashpte.kernels.launch import cdiv

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM, MAX_V_HEAD_DIM = 576, 512
MAX_ROWS = 16
"""The most query rows that ``sdpa_verify`` and the split-K launcher take."""

Size = int | torch.SymInt
Equal = Callable[[Size, Size, bool], bool]
"""Whether two sizes may be equal. The third argument says whether a size of 1 may stand in for the other."""


def may_be_equal(a: Size, b: Size, broadcasts: bool = False) -> bool:
    """Whether two sizes are not known to differ, or, with ``broadcasts``, one of them may be 1. Adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if broadcasts and not all(statically_known_true(size != 1) for size in (a, b)):
        return True
    return not statically_known_true(a != b)


def printable(size: Size) -> str:
    """A size in the form that messages use."""
    return str(size) if isinstance(size, int) else str(size.node.expr)


def why_not_tensors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, equal: Equal = may_be_equal
) -> str | None:
    """What is wrong with query, key and value, or ``None``."""
    tensors = (query, key, value)
    if not query.dim() == key.dim() == value.dim() == 4:
        return f"query, key, value have {query.dim()}, {key.dim()}, {value.dim()} dimensions; the kernels take 4"
    if query.dtype not in SUPPORTED_DTYPES or not query.dtype == key.dtype == value.dtype:
        return f"dtypes {query.dtype}, {key.dtype}, {value.dtype}: the kernels take one of bfloat16, float16, float32"
    if not query.device == key.device == value.device:
        return f"query, key and value are on {query.device}, {key.device} and {value.device}"
    if query.shape[3] != key.shape[3]:
        return f"query and key have different head dims, {query.shape[3]} and {key.shape[3]}"
    for name, dim, most in (("", query.shape[3], MAX_HEAD_DIM), ("value ", value.shape[3], MAX_V_HEAD_DIM)):
        if dim > most:
            return f"{name}head dim {dim} is above {most}: a program's tiles of it exceed shared memory or registers"
    batches = [tensor.shape[0] for tensor in tensors]
    if not (equal(batches[0], batches[1], True) and equal(batches[1], batches[2], True)):
        return f"query, key and value have different batch sizes, {', '.join(map(printable, batches))}"
    if key.shape[1] != value.shape[1]:
        return f"key has {key.shape[1]} heads, value {value.shape[1]}"
    if not equal(key.shape[2], value.shape[2], False):
        return f"key has length {printable(key.shape[2])}, value {printable(value.shape[2])}"
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        return f"{query.shape[1]} query heads on {key.shape[1]} key/value heads"
    return None


def why_not_mask(mask: torch.Tensor, target: Sequence[Size], equal: Equal = may_be_equal) -> str | None:
    """What is wrong with a mask that must broadcast to ``target`` ``[B, H_q, L_q, L_kv]``, or ``None``."""
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        return f"mask dtype {mask.dtype}: it must be bool or float"
    if mask.dtype == torch.float64:
        return "mask dtype torch.float64: the kernels compute in float32"
    if mask.dim() > 4:
        return f"the mask has {mask.dim()} dimensions"
    for size, wanted in zip(reversed(mask.shape), reversed(target), strict=False):
        if not (isinstance(size, int) and size == 1) and not equal(size, wanted, True):
            return f"mask size {printable(size)} does not match {printable(wanted)}"
    return None


def why_not_scores(
    softcap: float, sinks: torch.Tensor | None, query: torch.Tensor, equal: Equal = may_be_equal
) -> str | None:
    """What is wrong with a softcap or with sinks for a query ``[B, H_q, L_q, D]``, or ``None``."""
    if not (math.isfinite(softcap) and softcap >= 0):
        return f"softcap is {softcap}; it must be positive, or 0 for none"
    if sinks is None:
        return None
    if sinks.dtype not in SUPPORTED_DTYPES:
        return f"sinks are {sinks.dtype}: the kernels take bfloat16, float16 and float32"
    if sinks.dim() != 1 or not equal(sinks.shape[0], query.shape[1], False):
        sizes = ", ".join(map(str, map(printable, sinks.shape)))
        return f"sinks [{sizes}] are not one number for each of {printable(query.shape[1])} query heads"
    if sinks.device != query.device:
        return f"the sinks are on {sinks.device}, the query on {query.device}"
    return None


def _why_not_map(given: GivenMap, call: AttentionCall) -> str | None:
    query, key, value = call.query, call.key, call.value
    tiles, counts, block_n = given
    if tiles is None or counts is None:
        return None if tiles is counts else "tiles and tile_counts belong together, one of them is missing"
    heads, rows = key.shape[1], 1
    if block_n is None:
        block_m, block_n = tuning.tiled_map_block(query.shape[3], value.shape[3])
        heads, rows = query.shape[1], cdiv(query.shape[2], block_m)
    for name, tensor in (("tiles", tiles), ("tile_counts", counts)):
        if tensor.dtype != torch.int32 or tensor.dim() != 4:
            return f"{name} must be int32 of 4 dimensions, got {tensor.dtype} of {tensor.dim()}"
        if tensor.device != query.device:
            return f"{name} are on {tensor.device}, the query is on {query.device}"
    sizes = f"[{', '.join(map(printable, tiles.shape))}]"
    if not may_be_equal(counts.shape[3], 4) or not all(map(may_be_equal, counts.shape[:3], tiles.shape[:3])):
        return f"tile_counts [{', '.join(map(printable, counts.shape))}] do not fit tiles {sizes}"
    for size, wanted in ((tiles.shape[0], query.shape[0]), (tiles.shape[1], heads)):
        if not (isinstance(size, int) and size == 1) and not may_be_equal(size, wanted, True):
            return f"tiles {sizes} are not of 1 or {printable(wanted)}, but of {printable(size)}"
    if statically_known_true(tiles.shape[2] < rows):
        return f"tiles {sizes} have fewer than {printable(rows)} rows of tiles"
    if not may_be_equal(tiles.shape[3], cdiv(key.shape[2], block_n)):
        return f"tiles {sizes} are not of {printable(cdiv(key.shape[2], block_n))} tiles of {block_n} keys"
    if all(isinstance(size, int) for size in tiles.shape) and not (tiles.is_contiguous() and counts.is_contiguous()):
        return "tiles and tile_counts must be contiguous"
    return None


def _why_not_rows(query: torch.Tensor, most: int) -> str | None:
    rows = query.shape[2] if query.dim() == 4 else 0
    return f"the kernel takes at most {most} query rows, got {rows}" if isinstance(rows, int) and rows > most else None


def check_rows(query: torch.Tensor, most: int) -> None:
    """Raises ``ValueError`` for more query rows than an operator takes."""
    if (reason := _why_not_rows(query, most)) is not None:
        raise ValueError(reason)


def why_not(call: AttentionCall, maps: Sequence[GivenMap] = (), most_rows: int | None = None) -> str | None:
    """Why an operator refuses a call with these maps, or ``None``."""
    query, key, value, mask, intervals = call.query, call.key, call.value, call.mask, call.intervals
    reason = why_not_tensors(query, key, value)
    if reason is not None:
        return reason
    if (reason := why_not_scores(call.softcap, call.sinks, query)) is not None:
        return reason
    q_len, kv_len = query.shape[2], key.shape[2]
    if most_rows is not None and (reason := _why_not_rows(query, most_rows)):
        return reason
    if mask is not None and intervals is not None:
        return "a mask together with key_bounds is ambiguous"
    if call.is_causal and not (mask is None and intervals is None):
        return "a mask together with is_causal is ambiguous"
    if intervals is not None:
        intervals.check(query.shape[0], q_len, kv_len)
    if mask is not None:
        if mask.dim() != 4:
            return f"the mask must have 4 dimensions (size 1 where it is broadcast), got {mask.dim()}"
        reason = why_not_mask(mask, (*query.shape[:3], kv_len))
        if reason is not None:
            return reason
    parts = (mask,) if intervals is None else (intervals.bounds, intervals.values)
    for part in parts:
        if part is not None and part.device != query.device:
            return f"the mask is on {part.device}, the query on {query.device}"
    if sorted(call.dim_order) != [0, 1, 2, 3]:
        return f"dim_order must be a permutation of 0..3, got {list(call.dim_order)}"
    reasons = (_why_not_map(given, call) for given in maps)
    return next((reason for reason in reasons if reason is not None), None)


def check_attention(call: AttentionCall, maps: Sequence[GivenMap] = (), most_rows: int | None = None) -> None:
    """Raises ``ValueError`` with the sentence that :func:`why_not` returns for the same arguments, if any."""
    reason = why_not(call, maps, most_rows)
    if reason is not None:
        raise ValueError(reason)
