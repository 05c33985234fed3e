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


def measure_ceilings(dtype: torch.dtype) -> Ceilings:
    """Measures this GPU: the sum of 0.5 GiB of float32 numbers, and a product of 8,192 by 8,192 matrices of a dtype."""
    data = torch.ones(1 << 27, device="cuda")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    read = data.numel() * data.itemsize / median_us(lambda: data.sum(), warmup=3, timed=5)
    return Ceilings(read, 2 * 8192**3 / median_us(lambda: a @ b, warmup=3, timed=5))


def floors(
    manifest: Mapping[str, Any], method: str, context: int, chunks: Iterable[int], ceilings: Ceilings
) -> dict[Family, float]:
    """The least microseconds that consecutive calls of a method need, by kernel family.

    Attention reads the live keys and values once and computes the visible scores; products read their weights once.
    Each layer needs the longer of the time for its bytes and the time for its arithmetic. Other kernels read and write
    activations, which stay in the cache, and have no floor. Nor has attention if part of it was left alone.

    Args:
        manifest: the model's. Nothing is returned without ``work`` and ``routing`` (older files, plain math).
        method: the method's name.
        context: tokens in the KV caches before the first call.
        chunks: tokens of each call.
        ceilings: see :func:`measure_ceilings`.
    """
    if not has_floors(manifest, method):
        return {}
    work, nodes = manifest["work"][method], manifest["routing"][method]["nodes"]
    window = manifest.get("model", {}).get("sliding_window")
    # Attention that was left alone may have other shapes than a model's, or repeated keys.
    known = [node for node in nodes if node["op"] is not None and _sizes(node) is not None]
    attention = known if len(known) == len(nodes) else []
    found: dict[Family, float] = {"attention": 0.0, "matmul": 0.0}
    for rows in chunks:
        for node in attention:
            found["attention"] += _longer(*_attention(node, context, rows, window), ceilings)
        flop = work["flop_per_call"] + rows * work["flop_per_token"]
        found["matmul"] += _longer(work["weight_bytes"], flop, ceilings)
        context += rows
    return {family: time for family, time in found.items() if time}


def has_floors(manifest: Mapping[str, Any], method: str) -> bool:
    """Whether a manifest says what a method reads and computes."""
    return all(method in manifest.get(name, {}) for name in ("work", "routing"))


def _sizes(node: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Query heads, key/value heads, keys, and columns of a key and a value together; ``None`` if one is not known."""
    if not all(len(node[name]) == 4 for name in ("query", "key", "value")):
        return None
    sizes = (node["query"][1], *node["key"][1:], node["value"][3])
    heads, heads_kv, length, head_dim, v_head_dim = sizes
    return (heads, heads_kv, length, head_dim + v_head_dim) if all(isinstance(size, int) for size in sizes) else None


def _attention(node: Mapping[str, Any], context: int, rows: int, window: int | None) -> tuple[int, int]:
    """Bytes of keys and values, and FLOP, of one attention of one sequence."""
    sizes = _sizes(node)
    assert sizes is not None
    heads, heads_kv, length, columns = sizes
    reach = window if window is not None and "window" in (node.get("mask") or "") else context + rows
    live = min(context + rows, reach + rows - 1, length)
    visible = sum(min(context + row + 1, reach, length) for row in range(rows))
    return heads_kv * columns * live * read_dtype(node["dtype"]).itemsize, 2 * heads * columns * visible


def _longer(bytes_read: float, flop: float, ceilings: Ceilings) -> float:
    return max(bytes_read / ceilings.read_bytes_per_us, flop / ceilings.flop_per_us)
