"""What a mask costs on one GPU: buffers longer than the context, dense masks against ``is_causal``, making the map.

    python examples/benchmarks/masks.py [--suite context prefill map] [--results DIR]
    python examples/benchmarks/masks.py --from-json examples/benchmarks/results/h200/masks.json

Times are microseconds per call, as in ``attention.py``; the inputs that a call reads rotate through more memory than
L2. "tensor" is a dense bool mask with its tile map, "positions" a mask that the pass proved and that the kernel
computes from positions. Results of the two forms are compared before they are timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from harness.cases import SHAPES
from harness.inputs import LARGEST_ERROR, ROTATED_BYTES, forms, random
from harness.options import add_result_flags, read_suite
from harness.ours import DIM_ORDER
from harness.results import here
from harness.schema import Row, flat_row, new_file, write
from harness.tables import print_table
from harness.timing import require_gpu, time_us

import flashpte.kernels as kernels
from flashpte.kernels import tuning

CONTEXT, BUFFER = 4096, 131072


def checked(call: Callable[[], torch.Tensor], expected: torch.Tensor) -> bool:
    """Whether a call's result is attention."""
    return bool((call().float() - expected).norm() / expected.norm() <= LARGEST_ERROR)


def filled_cache(shape, length: int) -> list[torch.Tensor]:
    """Keys and values ``[1, H_kv, length, D]``, random up to the context, zero beyond."""
    pair = [torch.zeros(1, shape.heads_kv, length, shape.head_dim, device="cuda", dtype=torch.bfloat16) for _ in "kv"]
    for cache in pair:
        cache[:, :, :CONTEXT].normal_()
    return pair


def context_case(name: str, rows: int) -> dict:
    """The same context in a buffer of its own length and in a long one; only the context is ever read."""
    shape = SHAPES[name]
    op = kernels.sdpa_decode if rows == 1 else kernels.sdpa_verify
    group = shape.heads_q // shape.heads_kv
    count = max(2, int(ROTATED_BYTES / (2 * shape.heads_kv * CONTEXT * shape.head_dim * 2)))
    q = random(1, shape.heads_q, rows, shape.head_dim)
    positions = torch.arange(rows, device="cuda") + CONTEXT - rows
    block_n = tuning.SPLIT_K_MAP_BLOCK_N
    options = (False, shape.scale, DIM_ORDER)
    row: dict = {"case": f"{name} context={CONTEXT} M={rows}"}
    for length in (CONTEXT, BUFFER):
        caches = [filled_cache(shape, length) for _ in range(count)]
        mask, bounds = forms(positions, length)
        dense = (mask, *torch.ops.flashpte.tile_map(mask, rows, length, 16, block_n, group, 1), *options)
        computed = (None, *torch.ops.flashpte.interval_map(bounds, None, length, 16, block_n, 1), *options, bounds)
        expected = kernels.attention_reference(
            q.float(), *(c[:, :, :CONTEXT] for c in caches[0]), mask[..., :CONTEXT], False, shape.scale
        )
        for form, given in {"tensor": dense, "positions": computed}.items():
            calls = [lambda pair=pair, given=given: op(q, *pair, *given) for pair in caches]
            key = f"{form}_us" if length == CONTEXT else f"{form}_long_us"
            row[key] = time_us(calls) if checked(calls[0], expected) else float("nan")
        del caches, calls
    for form in ("tensor", "positions"):
        row[f"{form}_ratio"] = row[f"{form}_long_us"] / row[f"{form}_us"]
    return row | {"limit": 1.15, "met": max(row["tensor_ratio"], row["positions_ratio"]) <= 1.15}


def prefill_case(name: str, length: int, window: int | None) -> dict:
    """A dense mask against the same kernel with ``is_causal``, or with the window in positions."""
    shape = SHAPES[name]
    q = random(1, shape.heads_q, length, shape.head_dim)
    k, v = (random(1, shape.heads_kv, length, shape.head_dim) for _ in range(2))
    mask, bounds = forms(torch.arange(length, device="cuda"), length, window)
    tile = tuning.tiled_map_block(shape.head_dim, shape.head_dim)
    dense_map = torch.ops.flashpte.tile_map(mask, length, length, *tile, 1)
    position_map = torch.ops.flashpte.interval_map(bounds, None, length, *tile)
    options = (False, shape.scale, DIM_ORDER)
    calls = {
        "tensor": lambda: kernels.sdpa_prefill(q, k, v, mask, *dense_map, *options),
        "positions": lambda: kernels.sdpa_prefill(q, k, v, None, *position_map, *options, bounds),
    }
    if window is None:
        calls["is_causal"] = lambda: kernels.sdpa_prefill(q, k, v, None, None, None, True, *options[1:])
    expected = calls["tensor"]().float()
    row: dict = {"case": f"{name} L={length}" + (f" window={window}" if window else " causal")}
    # In turns: a GPU that warms up would favour whoever comes first.
    times: dict[str, list[float]] = {form: [] for form in calls}
    for _ in range(3):
        for form, call in calls.items():
            times[form].append(time_us([call] * 3) if checked(call, expected) else float("nan"))
    row |= {f"{form}_us": sorted(t)[1] for form, t in times.items()}
    base, most = ("positions", 1.10) if window else ("is_causal", 1.08)
    row["ratio"] = row["tensor_us"] / row[f"{base}_us"]
    return row | {"limit": most, "met": row["ratio"] <= most}


def map_case(name: str, rows: int, context: int) -> dict:
    """Making the map of ``rows`` x the whole buffer, once for all layers, against one layer's attention."""
    shape = SHAPES[name]
    q = random(1, shape.heads_q, rows, shape.head_dim)
    k, v = (random(1, shape.heads_kv, BUFFER, shape.head_dim) for _ in range(2))
    mask, bounds = forms(torch.arange(rows, device="cuda") + context - rows, BUFFER)
    tile = tuning.tiled_map_block(shape.head_dim, shape.head_dim)
    makers = {
        "tensor": lambda: torch.ops.flashpte.tile_map(mask, rows, BUFFER, *tile, 1),
        "positions": lambda: torch.ops.flashpte.interval_map(bounds, None, BUFFER, *tile),
    }
    options = (False, shape.scale, DIM_ORDER)
    layer = lambda: kernels.sdpa_prefill(q, k, v, None, *makers["positions"](), *options, bounds)  # noqa: E731
    row: dict = {"case": f"{name} {rows} rows, context={context} of {BUFFER}"}
    for form, make in makers.items():
        row[f"map_{form}_us"] = time_us([make] * 4)
    row["layer_us"] = time_us([layer])
    row["ratio"] = row["map_tensor_us"] / row["layer_us"]
    return row | ({"limit": 0.05, "met": row["ratio"] <= 0.05} if context == BUFFER else {})


CASES = {
    "context": (context_case, [(n, m) for n in ("gemma-full", "qwen3.5", "llama-8b") for m in (1, 4, 8, 16)]),
    "prefill": (
        prefill_case,
        [(n, length, None) for n in ("gemma-full", "qwen3.5", "llama-8b") for length in (2048, 8192)]
        + [("gemma-sliding", length, 1024) for length in (2048, 8192)],
    ),
    "map": (map_case, [(n, 2048, c) for n in ("gemma-full", "llama-8b") for c in (2048, BUFFER)]),
}


def show(rows: list[Row], short: bool) -> None:
    """Prints each part as a table, or how many of its targets are met."""
    for part in dict.fromkeys(row["part"] for row in rows):
        found = [{key: value for key, value in row.items() if key != "part"} for row in rows if row["part"] == part]
        if short:
            judged = [row["met"] for row in found if "met" in row]
            print(f"{part}: {sum(judged)} of {len(judged)} targets met")
        else:
            print_table(part, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    add_result_flags(parser)
    args = parser.parse_args()
    if args.from_json is not None:
        show(read_suite(args.from_json, "masks")["rows"], args.summary)
        return
    require_gpu()
    torch.manual_seed(0)
    rows: list[Row] = []
    for suite in args.suite:
        run, cases = CASES[suite]
        for case in cases:
            rows.append(flat_row(part=suite, **run(*case)))
            if args.results is not None:  # after each: what is measured stays
                write(new_file("masks", rows=rows, **here()), args.results / "masks.json")
    show(rows, args.summary)


if __name__ == "__main__":
    main()
