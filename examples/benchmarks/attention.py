"""Attention kernels on one GPU, beside PyTorch's default and ExecuTorch's operators, with floors from the same run.

    python examples/benchmarks/attention.py [--suite decode verify prefill] [--json FILE]

Times are microseconds per call, medians of CUDA-graph replays over inputs that rotate through more memory than L2.
Every kernel is checked against a float32 reference before it is timed. "floor" is the time of the bytes (decode and
verify: keys and values of the context at the measured read bandwidth) or of the arithmetic (prefill: visible scores at
the measured matrix rate). A tile map is made once for all layers of a mask, so it is timed on its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

import flashpte.kernels as kernels
from flashpte.kernels import tuning

DIM_ORDER = [0, 2, 1, 3]
L2_BYTES = 300e6


@dataclasses.dataclass(frozen=True)
class Shape:
    """Head counts and dims of one model's attention."""

    heads_q: int
    heads_kv: int
    head_dim: int
    scale: float


SHAPES = {
    # Scores of about unit variance, as trained models have them (Gemma normalises queries and keys and has scale 1).
    "gemma-full": Shape(32, 4, 512, 512**-0.5),
    "gemma-sliding": Shape(32, 16, 256, 256**-0.5),
    "qwen3.5": Shape(16, 2, 256, 256**-0.5),
    "llama-8b": Shape(32, 8, 128, 128**-0.5),
}

# shape, buffer length, context (None: all of it), rows
DECODE = [
    ("gemma-full", 4096, None),
    ("gemma-full", 131072, None),
    ("gemma-full", 131072, 4096),
    ("gemma-sliding", 2048, None),
    ("qwen3.5", 4096, None),
    ("qwen3.5", 32768, None),
    ("llama-8b", 4096, None),
    ("llama-8b", 32768, None),
]
PREFILL = [  # shape, length, window
    ("gemma-full", 2048, None),
    ("gemma-full", 8192, None),
    ("gemma-sliding", 2048, 1024),
    ("gemma-sliding", 8192, 1024),
    ("qwen3.5", 8192, None),
    ("llama-8b", 2048, None),
    ("llama-8b", 8192, None),
]


def time_us(calls: list[Callable[[], object]]) -> float:
    """Median time of one call, from replays of a CUDA graph that holds all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for i in range(9):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """Read bandwidth in bytes per microsecond and bf16 matrix rate in FLOP per microsecond, measured."""
    data = torch.randn(1 << 29, device="cuda")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    read = data.numel() * 4 / time_us([lambda: data.sum()])
    return {"read_bytes_per_us": read, "bf16_flop_per_us": 2 * 8192**3 / time_us([lambda: a @ b])}


def reference(q, k, v, mask, scale):
    """Float32 attention."""
    return kernels.attention_reference(q.float(), k, v, mask, False, scale)


def checked(call: Callable[[], torch.Tensor], expected: torch.Tensor) -> bool:
    """Whether a call's result is attention: relative error below 1%."""
    out = call().float()
    return bool((out - expected).norm() / expected.norm() < 1e-2)


def executorch_ops():
    """ExecuTorch's operators, if it is installed, by the number of query rows they are made for."""
    try:
        from executorch.backends.cuda.triton import kernels as et
    except ImportError:
        return None

    def by_rows(rows: int):
        return et.sdpa_decode_splitk if rows == 1 else et.sdpa_small_query_splitk if rows <= 4 else et.sdpa

    return by_rows


def random(*shape: int) -> torch.Tensor:
    """Normal bf16 numbers on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def bench_rows(name: str, length: int, context: int | None, rows: int, limits: dict[str, float], et) -> dict:
    """One decode or verify case; the mask is causal over the context, as an exported model makes it."""
    shape = SHAPES[name]
    group = shape.heads_q // shape.heads_kv
    live = context or length
    # What is read rotates through more memory than L2.
    live_bytes = 2 * shape.heads_kv * live * shape.head_dim * 2
    caches = [
        tuple(random(1, shape.heads_kv, length, shape.head_dim) for _ in range(2))
        for _ in range(max(1, min(16, int(L2_BYTES / live_bytes))))
    ]
    q = random(1, shape.heads_q, rows, shape.head_dim)
    positions = torch.arange(rows, device="cuda") + live - rows
    mask = (torch.arange(length, device="cuda") <= positions[:, None])[None, None]
    op = kernels.sdpa_decode if rows == 1 else kernels.sdpa_verify
    make_map = torch.ops.flashpte.tile_map

    def new_map():
        return make_map(mask, rows, length, 16, tuning.SPLIT_K_MAP_BLOCK_N, group, 1)

    tiles, counts = new_map()
    options = (False, shape.scale, DIM_ORDER)
    # As the pass emits it for a mask it has proven: bounds of the keys' indices instead of the mask.
    bounds = torch.stack([torch.full_like(positions, torch.iinfo(torch.int64).min), positions])[:, None]
    computed = torch.ops.flashpte.interval_map(bounds, None, length, 16, tuning.SPLIT_K_MAP_BLOCK_N, 1)
    candidates: dict[str, Callable] = {
        "flashpte": lambda k, v: op(q, k, v, None, *computed, *options, bounds),
        "flashpte, mask as tensor": lambda k, v: op(q, k, v, mask, tiles, counts, *options),
        "torch default": lambda k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=shape.scale, enable_gqa=True
        ),
    }
    if length > 32768:
        del candidates["torch default"]  # tens of milliseconds a call
    if et is not None:
        chosen = et(rows)
        candidates["executorch"] = lambda k, v: chosen(q, k, v, mask, 0.0, False, shape.scale, True)
    row = {
        "case": f"{name} L={length}" + (f" context={context}" if context else "") + f" M={rows}",
        "floor": 2 * shape.heads_kv * live * shape.head_dim * 2 / limits["read_bytes_per_us"],
        "map": time_us([new_map] * 4),
    }
    expected = reference(q, *caches[0], mask, shape.scale)
    for label, call in candidates.items():
        right = checked(lambda call=call: call(*caches[0]), expected)
        row[label] = time_us([lambda k=k, v=v, call=call: call(k, v) for k, v in caches]) if right else "wrong"
    return row


def bench_prefill(name: str, length: int, window: int | None, limits: dict[str, float], et) -> dict:
    """One prefill case: causal, optionally with a sliding window, given as a dense bool mask."""
    shape = SHAPES[name]
    q = random(1, shape.heads_q, length, shape.head_dim)
    k, v = (random(1, shape.heads_kv, length, shape.head_dim) for _ in range(2))
    i = torch.arange(length, device="cuda")
    mask = i[None] <= i[:, None]
    if window:
        mask &= i[:, None] - i[None] < window
    flop = 4 * mask.sum().item() * shape.heads_q * shape.head_dim
    mask = mask[None, None]
    block_m, block_n = tuning.tiled_map_block(shape.head_dim, shape.head_dim)

    def new_map():
        return torch.ops.flashpte.tile_map(mask, length, length, block_m, block_n, 1)

    tiles, counts = new_map()
    options = (False, shape.scale, DIM_ORDER)
    lower = torch.full_like(i, torch.iinfo(torch.int64).min) if window is None else i - window + 1
    bounds = torch.stack([lower, i])[:, None]
    computed = torch.ops.flashpte.interval_map(bounds, None, length, block_m, block_n)
    candidates: dict[str, Callable] = {
        "flashpte": lambda: kernels.sdpa_prefill(q, k, v, None, *computed, *options, bounds),
        "flashpte, mask as tensor": lambda: kernels.sdpa_prefill(q, k, v, mask, tiles, counts, *options),
        "torch default": lambda: F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=shape.scale, enable_gqa=True
        ),
    }
    if window is None:
        candidates["flashpte is_causal"] = lambda: kernels.sdpa_prefill(
            q, k, v, None, None, None, True, shape.scale, DIM_ORDER
        )
    if et is not None:
        candidates["executorch"] = lambda: et(length)(q, k, v, mask, 0.0, False, shape.scale, True)
    row = {
        "case": f"{name} L={length}" + (f" window={window}" if window else " causal"),
        "floor": flop / limits["bf16_flop_per_us"],
        "map": time_us([new_map] * 4),
    }
    expected = reference(q, k, v, mask, shape.scale) if length <= 2048 else None
    for label, call in candidates.items():
        # The reference of a long prefill does not fit beside it; our own result, checked when short, stands in.
        right = checked(call, expected if expected is not None else candidates["flashpte"]().float())
        row[label] = time_us([call]) if right else "wrong"
    row["flashpte TFLOP/s"] = flop / row["flashpte"] / 1e6
    return row


def print_table(title: str, rows: list[dict]) -> None:
    """A table of one suite."""
    columns = ["case", *dict.fromkeys(key for row in rows for key in row if key != "case")]
    print(f"\n{title}\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = [
            (f"{c:.2f}" if c < 10 else f"{c:.1f}") if isinstance(c := row.get(key, "-"), float) else str(c)
            for key in columns
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    suites = ("decode", "verify", "prefill")
    parser.add_argument("--suite", nargs="+", choices=suites, default=suites)
    parser.add_argument("--no-executorch", action="store_true", help="leave its operators out: they tune for minutes")
    parser.add_argument("--json", help="also write raw numbers to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    et = None if arguments.no_executorch else executorch_ops()
    limits = ceilings()
    results: dict = {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ceilings": limits,
    }
    print(f"{results['gpu']}, torch {torch.__version__}: read {limits['read_bytes_per_us'] / 1e6:.2f} TB/s, "
          f"bf16 {limits['bf16_flop_per_us'] / 1e6:.0f} TFLOP/s")  # fmt: skip
    for suite in arguments.suite:
        if suite == "prefill":
            rows = [bench_prefill(*case, limits, et) for case in PREFILL]
        else:
            rows = [
                bench_rows(*case, m, limits, et) for case in DECODE for m in ((1,) if suite == "decode" else (4, 8, 16))
            ]
        results[suite] = rows
        print_table(suite, rows)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
