"""Linear layers with bfloat16 weights and few rows of x on one GPU, beside cuBLAS, with floors from the same run.

    python examples/benchmarks/dense.py --results run
    python examples/benchmarks/dense.py --from-json examples/benchmarks/results/h200

Times are microseconds per call: medians of CUDA-graph replays over weights that rotate through more memory than L2.
Each result is compared with a float64 product before it is timed. "floor" is the time of the weight at the measured
read bandwidth. ExecuTorch's programs have no cuBLAS; it is the bar.
"""

from __future__ import annotations

import argparse
import math
import sys
import time

from harness.linear_table import table
from harness.options import add_result_flags, read_suite
from harness.results import OURS, here
from harness.schema import Row, flat_row, new_file, write
from harness.timing import ceilings, graph_times, require_gpu

PRODUCTS = {
    "smollm2 qkv": (576, 960),
    "smollm2 o": (576, 576),
    "smollm2 gate up": (576, 3072),
    "smollm2 down": (1536, 576),
    "smollm2 head": (576, 49152),
    "gemma qkv": (5376, 16384),
    "gemma o": (8192, 5376),
    "gemma gate up": (5376, 43008),
    "gemma down": (21504, 5376),
}
ROWS = (1, 2, 4, 8, 16)


def measure(name: str, k: int, n: int, m: int, read_bytes_per_us: float) -> list[Row]:
    """One row for each of the two."""
    import torch

    from flashpte.kernels.dense import few_rows_linear

    copies = max(2, min(64, math.ceil(250e6 / (2 * n * k))))
    weights = [(torch.randn(n, k, device="cuda") * k**-0.5).bfloat16() for _ in range(copies)]
    x = torch.randn(m, k, device="cuda").bfloat16()
    exact = x.double() @ weights[0].double().t()
    runners = {OURS: few_rows_linear, "cublas bf16": torch.nn.functional.linear}
    same = dict(case=f"{name} {k}->{n}", k=k, n=n, m=m, floor_us=2 * n * k / read_bytes_per_us)
    errors = {r: float((call(x, weights[0]).double() - exact).norm() / exact.norm()) for r, call in runners.items()}
    if not errors[OURS] < 2 * errors["cublas bf16"] + 1e-4:
        return [flat_row(**same, runner=OURS, failed=f"wrong result, error {errors[OURS]:.3g}")]
    calls = {r: [lambda weight=weight, call=call: call(x, weight) for weight in weights] for r, call in runners.items()}
    times = graph_times(calls, budget_us=4e3)
    return [
        flat_row(**same, runner=runner, graph_us=found, error=errors[runner])
        if isinstance(found, float)
        else flat_row(**same, runner=runner, failed=str(found)[:200])
        for runner, found in times.items()
    ]


def run(args: argparse.Namespace) -> dict:
    """Measures; what is measured is written after each product."""
    import torch

    torch.manual_seed(0)
    start, ceiling, rows = time.monotonic(), ceilings(), []
    for name, (k, n) in PRODUCTS.items():
        for m in ROWS:
            rows += measure(name, k, n, m, ceiling["read_bytes_per_us"])
        seconds = round(time.monotonic() - start, 1)
        print(f"[{seconds:6.1f} s] {name}", file=sys.stderr, flush=True)
        data = new_file("dense", rows=rows, ceilings=ceiling, seconds=seconds, **here())
        if args.results is not None:
            write(data, args.results / "dense.json")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_result_flags(parser)
    args = parser.parse_args()
    if args.from_json is not None:
        data = read_suite(args.from_json, "dense")
    else:
        require_gpu()
        data = run(args)
    print("\n".join(table(data["rows"], args.summary)))


if __name__ == "__main__":
    main()
