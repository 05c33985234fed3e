"""Estimates of the memory traffic that a rewrite saves, for the report."""

from __future__ import annotations

import math

import torch

from flashpte.passes.attention.call import SdpaCall
from flashpte.passes.graph.values import Ranges, hint, size_range, val


def largest(size: int | torch.SymInt, ranges: Ranges | None) -> int:
    """The largest value of a size that the program admits, or the example's value if the size is unbounded."""
    upper = size_range(size, ranges)[1]
    return hint(size) if upper is None else upper


def mask_bytes(call: SdpaCall, ranges: Ranges | None) -> int:
    """Bytes of the call's mask as a dense tensor, without broadcast dimensions; 0 without a mask."""
    if call.mask is None:
        return 0
    mask = val(call.mask)
    stored = [
        largest(size, ranges) for size, stride in zip(mask.shape, mask.stride(), strict=True) if hint(stride) != 0
    ]
    return math.prod(stored) * mask.dtype.itemsize


def repeated_bytes(written: SdpaCall, call: SdpaCall, ranges: Ranges | None) -> int:
    """Bytes of keys and values that were repeated per query head, written once and read once; 0 if nothing was."""
    if call is written:
        return 0
    repeated = [math.prod(largest(s, ranges) for s in val(node).shape) for node in (written.key, written.value)]
    return 2 * sum(repeated) * val(written.key).dtype.itemsize
