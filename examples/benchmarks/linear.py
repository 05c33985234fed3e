"""Linear layers with packed weights on one GPU, beside every peer that runs there, with floors from the same run.

    python examples/benchmarks/linear.py --results run --plot run --vllm vllm/_C.abi3.so
    python examples/benchmarks/linear.py --from-json examples/benchmarks/results/h200 --summary

Times are microseconds per call: medians of CUDA-graph replays over weights that rotate through more memory than L2.
Each result is compared with a float32 product of the dequantized weight before it is timed. "floor" is the time of the
packed weight and its scales at the measured read bandwidth, or that of the arithmetic at the measured matrix rate,
whichever is more.

Peers are cuBLAS with bfloat16 weights, PyTorch's tinygemm, Humming where it is installed, and Marlin and Machete with
--vllm (the library ``_C`` of a vLLM wheel that was built for this PyTorch).
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from pathlib import Path

from harness.linear_peers import LARGEST_ERROR, RUNNERS, VLLM_VARIABLE, Problem
from harness.linear_table import table
from harness.options import add_result_flags, read_suite
from harness.results import OURS, here
from harness.schema import Row, flat_row, new_file, write
from harness.timing import ceilings, graph_times, require_gpu

GEMMA = {"qkv": (5376, 16384), "o": (8192, 5376), "gate up": (5376, 43008), "down": (21504, 5376)}
FEW, MANY = (1, 4, 8, 16), (64, 256, 512, 2048)


# Bits, largest code and dtype of scales and offsets of GGUF types with offsets.
GGUF = {"Q4_1": (4, 15, "float16"), "Q4_K": (4, 15, "float32"), "Q5_K": (8, 31, "float32")}


def cases(suites: list[str]) -> list[tuple[str, int, int, int, tuple[int, ...]]]:
    """Name, K, N, group and numbers of rows. A name that ends in a type of ``GGUF`` has offsets."""
    found = []
    if "few" in suites:
        found += [(name, k, n, group, FEW) for group in (32, 64, 128) for name, (k, n) in GEMMA.items()]
        found += [("head", 5376, 262144, 32, (1, 8))]
    if "many" in suites:
        found += [(name, *GEMMA[name], group, MANY) for group in (32, 128) for name in ("qkv", "down")]
    if "small" in suites:
        found += [("smollm2 up", 576, 1536, 32, FEW), ("llama-8b o", 4096, 4096, 32, FEW)]
        found += [("llama-8b qkv", 4096, 6144, 32, FEW), ("llama-8b gate up", 4096, 28672, 32, FEW)]
    if "offsets" in suites:
        products = {**GEMMA, "llama-8b o": (4096, 4096), "llama-8b gate up": (4096, 28672)}
        found += [(f"{name} {kind}", k, n, 32, FEW) for kind in GGUF for name, (k, n) in products.items()]
        found += [(f"{name} {kind}", *GEMMA[name], 32, MANY) for kind in GGUF for name in ("qkv", "down")]
    if "random" in suites:
        rng = random.Random(0)
        for i in range(12):
            k, n = 128 * rng.randint(4, 120), 64 * rng.randint(16, 400)
            found.append((f"random {i}", k, n, rng.choice((32, 64, 128)), (rng.randint(1, 8), rng.randint(9, 16))))
    return found


def weight(name: str, n: int, k: int, group: int) -> dict:
    """Random codes, scales and, where the name ends in a type of ``GGUF``, offsets, as arguments of a problem."""
    import torch

    bits, most, dtype = GGUF.get(name.split()[-1], (4, 15, "bfloat16"))
    codes = torch.randint(most + 1, (n, k), dtype=torch.uint8, device="cuda")
    scales = ((torch.rand(n, k // group, device="cuda") + 0.5) * 0.01).to(getattr(torch, dtype))
    found = dict(codes=codes, scales=scales, group=group, bits=bits)
    if name.split()[-1] in GGUF:
        # About half of a group's range is below zero.
        found["offsets"] = (-torch.rand(n, k // group, device="cuda") * most * scales).to(scales.dtype)
    return found


def measure(case: tuple, ceiling: dict[str, float], runners: dict, tell) -> list[Row]:
    """One row for each number of rows of x and each runner."""
    import torch

    name, k, n, group, counts = case
    given = weight(name, n, k, group)
    scales = given["scales"]
    numbers = (2 if "offsets" in given else 1) * scales.numel() * scales.itemsize
    packed_bytes = n * k * given["bits"] // 8 + numbers
    copies = max(2, min(16, math.ceil(250e6 / packed_bytes)))
    rows: list[Row] = []
    for m in counts:
        x = torch.randn(m, k, device="cuda").bfloat16()
        problem = Problem(x, **given)
        expected = x.float() @ problem.dense.t()
        floor = max(
            packed_bytes / ceiling["read_bytes_per_us"],
            2 * m * n * k / ceiling["bf16_flop_per_us"],
        )
        same = dict(case=f"{name} {k}->{n}", k=k, n=n, m=m, group=group, floor_us=floor)
        calls, errors = {}, {}
        for runner, make in runners.items():
            try:
                copy = make(problem)
                calls[runner] = [copy() for _ in range(2 if runner == "cublas bf16" else copies)]
                result = calls[runner][0]().float()
                errors[runner] = float((result - expected).norm() / expected.norm())
                if not errors[runner] < LARGEST_ERROR.get(runner, 0.01):
                    raise ArithmeticError(f"wrong result, error {errors[runner]:.3g}")
            except Exception as error:
                calls.pop(runner, None)
                rows.append(flat_row(**same, runner=runner, failed=f"{type(error).__name__}: {error}"[:200]))
        times = graph_times(calls, budget_us=4e3)
        for runner, found in times.items():
            if isinstance(found, Exception):
                rows.append(flat_row(**same, runner=runner, failed=str(found)[:200]))
            else:
                rows.append(flat_row(**same, runner=runner, graph_us=found, error=errors[runner]))
        del calls, copy
        torch.cuda.empty_cache()
        shown = ", ".join(f"{r} {t:.1f}" for r, t in times.items() if isinstance(t, float))
        tell(f"{same['case']} group {group} M={m}: floor {floor:.1f}, {shown}")
    return rows


def draw(rows: list[Row], header: dict, path: Path) -> None:
    """Speed over the floor's, by product: ours as bars, peers as marks."""
    from matplotlib.figure import Figure

    products = list(dict.fromkeys((row["case"], row["group"], row["m"]) for row in rows))
    figure = Figure(figsize=(8.0, 1.8 + 0.22 * len(products)), layout="constrained")
    axis = figure.subplots()
    markers = dict(zip(RUNNERS, ("", "s", "^", "D", "v", "x"), strict=True))
    for runner in reversed(list(RUNNERS)):
        points = [
            (row["floor_us"] / row["graph_us"], products.index((row["case"], row["group"], row["m"])))
            for row in rows
            if row["runner"] == runner and "graph_us" in row
        ]
        if points and runner == OURS:
            axis.barh([y for _, y in points], [x for x, _ in points], color="#c8553d", alpha=0.8, label=runner)
        elif points:
            axis.plot(*zip(*points, strict=True), markers[runner], markersize=5, linestyle="", label=runner)
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(products)), [f"{c}, group {g}, M={m}" for c, g, m in products], fontsize=7)
    axis.set_ylim(len(products) - 0.4, -0.6)
    axis.set_xlabel("speed over the floor's (1 = the measured ceiling), CUDA graphs")
    axis.set_title(f"Linear layers with packed weights, {header['gpu']}, {header['date']}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, loc="outside lower center", ncols=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = ("few", "many", "small", "offsets", "random")
    parser.add_argument("--suite", nargs="+", choices=suites, default=list(suites))
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="only peers whose name starts so (none: no peers)")
    parser.add_argument("--vllm", type=Path, metavar="FILE", help="library _C of vLLM, which has Marlin and Machete")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop then; the result says what is left")
    add_result_flags(parser, plot="draw DIR/linear.png")
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict:
    """Measures; what is measured is written after each product."""
    import torch

    if args.vllm is not None:
        os.environ[VLLM_VARIABLE] = str(args.vllm.resolve())
    torch.manual_seed(0)
    start = time.monotonic()

    def tell(what: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {what}", file=sys.stderr, flush=True)

    wanted = tuple(args.peers) if args.peers is not None else ("",)
    runners = {name: make for name, make in RUNNERS.items() if name == OURS or name.startswith(wanted)}
    ceiling, rows, left_out = ceilings(), [], []
    for case in cases(args.suite):
        if args.time_limit is not None and time.monotonic() - start > args.time_limit:
            left_out.append(f"{case[0]} group {case[3]}")
        else:
            rows += measure(case, ceiling, runners, tell)
        seconds = round(time.monotonic() - start, 1)
        data = new_file("linear", rows=rows, ceilings=ceiling, left_out=left_out, seconds=seconds, **here())
        if args.results is not None:
            write(data, args.results / "linear.json")
    return data


def main() -> None:
    args = parse()
    if args.from_json is not None:
        data = read_suite(args.from_json, "linear")
    else:
        require_gpu()
        data = run(args)
    print("\n".join(table(data["rows"], args.summary)))
    if args.plot is not None:
        draw(data["rows"], data, args.plot / "linear.png")


if __name__ == "__main__":
    main()
