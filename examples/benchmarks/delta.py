"""The gated delta rule on one GPU in the sizes of Qwen3.5-35B-A3B, beside flash-linear-attention if it is installed.

    python examples/benchmarks/delta.py --results run
    python examples/benchmarks/delta.py --from-json examples/benchmarks/results/h200

Times are microseconds per call: medians of CUDA-graph replays over inputs that rotate through more memory than L2.
"floor" is the larger of two times: that of reading each input and writing each result once at the measured read
bandwidth, and, for prefill, that of the products of chunks of 64 tokens at the measured matrix rate. Each result is
compared with float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from harness.linear_suite import run_suite
from harness.results import OURS
from harness.schema import Row, flat_row
from harness.timing import graph_times

HEADS_K, HEADS, DIM = 16, 32, 128
CASES = {"decode": 1, "verify": 4, "verify of 16": 16, "prefill 256": 256, "prefill 1024": 1024, "prefill 4096": 4096}


def floor_us(length: int, ceiling: dict[str, float]) -> float:
    """The floor of a call of so many tokens in bfloat16."""
    state = 2 * 4 * HEADS * DIM * DIM
    rows = length * (2 * (2 * HEADS_K + 2 * HEADS) * DIM + (4 + 2) * HEADS)
    # Of a chunk and head: K K^T, Q K^T, and the products with the 64 x 64 blocks; three with the state.
    chunks = -(-length // 64) * HEADS
    flop = chunks * 2 * (64 * 64 * 4 * DIM + 64 * DIM * DIM * 3) if length > 16 else 0
    return max((state + rows) / ceiling["read_bytes_per_us"], flop / ceiling["bf16_flop_per_us"])


def peer(length: int) -> Callable | None:
    """flash-linear-attention's kernel with the arguments of ours, or ``None``."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    except ImportError:
        return None
    function = fused_recurrent_gated_delta_rule if length <= 16 else chunk_gated_delta_rule

    def call(query, key, value, g, beta, state, scale, l2norm):
        return function(
            query, key, value, g=g, beta=beta, scale=scale, initial_state=state, output_final_state=True,
            use_qk_l2norm_in_kernel=l2norm,
        )  # fmt: skip

    return call


def inputs(length: int) -> tuple:
    """Arguments of the operators, queries, keys and values as views of one tensor."""
    import torch

    mixed = torch.randn(1, length, (2 * HEADS_K + HEADS) * DIM, device="cuda").bfloat16()
    widths = [HEADS_K * DIM, HEADS_K * DIM, HEADS * DIM]
    tensors = [part.unflatten(-1, (-1, DIM)) for part in mixed.split(widths, -1)]
    g = -0.2 * torch.rand(1, length, HEADS, device="cuda")
    beta = torch.rand(1, length, HEADS, device="cuda").bfloat16()
    return (*tensors, g, beta, torch.randn(1, HEADS, DIM, DIM, device="cuda"), DIM**-0.5, True)


def measure(name: str, length: int, ceiling: dict[str, float]) -> list[Row]:
    """A row for each runner."""
    import torch

    from flashpte.kernels import delta_recurrent, delta_reference
    from flashpte.kernels.delta.call import DeltaCall
    from flashpte.kernels.delta.scan import launch_chunked

    runners = {OURS: delta_recurrent if length <= 16 else lambda *call: launch_chunked(DeltaCall(*call))}
    if (theirs := peer(length)) is not None:
        runners["fla"] = theirs
    given = [inputs(length) for _ in range(32 if length <= 1024 else 4)]
    wanted = delta_reference(*given[0], compute_dtype=torch.float64)
    errors, rows, calls = {}, [], {}
    same = dict(case=name, k=DIM, n=HEADS * DIM, m=length, floor_us=floor_us(length, ceiling))
    for runner, call in runners.items():
        try:
            found = call(*given[0])
        except Exception as error:
            rows.append(flat_row(**same, runner=runner, failed=repr(error)[:200]))
            continue
        pairs = zip(found, wanted, strict=True)
        errors[runner] = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
        if not errors[runner] < 1e-2:
            rows.append(flat_row(**same, runner=runner, failed=f"wrong result, error {errors[runner]:.3g}"))
            continue
        calls[runner] = [lambda call=call, one=one: call(*one) for one in given]
    for runner, us in graph_times(calls, budget_us=4e3).items():
        result = {"graph_us": us, "error": errors[runner]} if isinstance(us, float) else {"failed": str(us)[:200]}
        rows.append(flat_row(**same, runner=runner, **result))
    return rows


def case(name: str, length: int, ceiling: dict[str, float]) -> list[Row]:
    """:func:`measure` without gradients."""
    import torch

    with torch.no_grad():
        return measure(name, length, ceiling)


def main() -> None:
    run_suite("delta", __doc__, [(name, partial(case, name, length)) for name, length in CASES.items()])


if __name__ == "__main__":
    main()
