"""The least time that a method's calls need: for bytes at the GPU's read bandwidth, and for arithmetic at its rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from flashpte.export.files.dtypes import read_dtype
from flashpte.export.runtime.timing import median_us
from flashpte.kernels.facts import Family


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a GPU was measured to reach: reads in bytes per microsecond, matrix products in FLOP per microsecond."""

    read_bytes_per_us: float
    flop_per_us: float


def measure_ceilings() -> Ceilings:
    """Measures this GPU: the sum of 2 GiB of float32 numbers, and a bfloat16 product of 8,192 by 8,192 matrices."""
    data = torch.ones(1 << 29, device="cuda")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    read = data.numel() * data.itemsize / median_us(lambda: data.sum(), warmup=3, timed=5)
    return Ceilings(read, 2 * 8192**3 / median_us(lambda: a @ b, warmup=3, timed=5))


def floors(
    manifest: Mapping[str, Any], method: str, context: int, chunks: Iterable[int], ceilings: Ceilings
) -> dict[Family, float]:
    """The least microseconds that consecutive calls of a method need, by kernel family.

    Attention reads the live keys and values once and computes the visible scores; products read their weights once.
    Each layer needs the longer of the time for its bytes and the time for its arithmetic. Other kernels read and write
    activations, which stay in the cache, and have no floor.

    Args:
        manifest: of a model; without ``work`` and ``routing`` (older files, other programs) nothing is returned.
        method: the method's name.
        context: tokens in the KV caches before the first call.
        chunks: tokens of each call.
        ceilings: see :func:`measure_ceilings`.
    """
    work, routing = manifest.get("work", {}).get(method), manifest.get("routing", {}).get(method)
    if work is None or routing is None:
        return {}
    window = manifest.get("model", {}).get("sliding_window")
    found: dict[Family, float] = {"attention": 0.0, "matmul": 0.0}
    for rows in chunks:
        for node in routing["nodes"]:
            found["attention"] += _longer(*_attention(node, context, rows, window), ceilings)
        flop = work["flop_per_call"] + rows * work["flop_per_token"]
        found["matmul"] += _longer(work["weight_bytes"], flop, ceilings)
        context += rows
    return found


def _attention(node: Mapping[str, Any], context: int, rows: int, window: int | None) -> tuple[int, int]:
    """Bytes of keys and values, and FLOP, of one attention: its shapes as the routing report gives them."""
    batch, heads, _, head_dim = node["query"]
    batch = batch if isinstance(batch, int) else 1  # a model's methods take one sequence
    _, heads_kv, length, _ = node["key"]
    reach = window if window is not None and "window" in (node.get("mask") or "") else context + rows
    live = min(context + rows, reach + rows - 1, length)
    visible = sum(min(context + row + 1, reach, length) for row in range(rows))
    columns = head_dim + node["value"][3]
    return batch * heads_kv * columns * live * read_dtype(node["dtype"]).itemsize, 2 * batch * heads * columns * visible


def _longer(bytes_read: float, flop: float, ceilings: Ceilings) -> float:
    return max(bytes_read / ceilings.read_bytes_per_us, flop / ceilings.flop_per_us)
