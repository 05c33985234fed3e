"""Linear layers with bfloat16 weights and few rows of x on one GPU, beside cuBLAS, with floors from the same run.

    python examples/benchmarks/dense.py --results run
    python examples/benchmarks/dense.py --from-json examples/benchmarks/results/h200

Times are microseconds per call: medians of CUDA-graph replays over weights that rotate through more memory than L2.
Each result is compared with a float64 product before it is timed. "floor" is the time of the weight at the measured
read bandwidth. ExecuTorch's programs have no cuBLAS; it is the bar.
"""

from __future__ import annotations

import math
from functools import partial

from harness.linear_suite import run_suite
from harness.results import OURS
from harness.schema import Row, flat_row
from harness.timing import graph_times

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


def product(name: str, k: int, n: int, ceiling: dict[str, float]) -> list[Row]:
    """The rows of a product, for each number of rows of x."""
    return [row for m in ROWS for row in measure(name, k, n, m, ceiling["read_bytes_per_us"])]


def main() -> None:
    run_suite("dense", __doc__, [(name, partial(product, name, *sizes)) for name, sizes in PRODUCTS.items()])


if __name__ == "__main__":
    main()
