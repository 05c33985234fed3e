"""Registers and shared memory of the chosen tiles, read from cubins: nothing spills."""

from __future__ import annotations

import itertools

import pytest
import torch
from compile_only import compiling_for

from flashpte.kernels import tuning
from flashpte.kernels.linear.call import Destination, LinearCall
from flashpte.kernels.linear.dispatch import launch_linear
from flashpte.kernels.linear.few_rows_hopper import launch_few_rows_hopper, serves
from flashpte.kernels.linear.format import PackedFormat
from flashpte.kernels.linear.many_rows_hopper import launch_many_rows_hopper
from flashpte.kernels.linear.tuning import choose_few_rows_hopper, choose_many_rows_hopper

N, K = 256, 5376  # few rows of the weight, so that several programs share its columns
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
WEIGHTS = {
    "4 bits": (4, 32, None, BF16),
    "4 bits, zeros": (4, 32, "zeros", BF16),
    "4 bits, whole zeros": (4, 64, "whole", BF16),
    "4 bits, offsets": (4, 32, "offsets", BF16),
    "Q4_0": (4, 32, None, F16),
    "Q4_1": (4, 32, "offsets", F16),
    "Q4_K": (4, 32, "offsets", F32),
    "4 bits, groups of 128": (4, 128, None, BF16),
    "4 bits, groups of 128, zeros": (4, 128, "zeros", BF16),
    "8 bits, zeros": (8, 32, "zeros", BF16),
    "8 bits, offsets": (8, 32, "offsets", BF16),
    "8 bits, per channel": (8, K, None, BF16),
    "Q5_1": (8, 32, "offsets", F16),
    "Q5_K": (8, 32, "offsets", F32),
    "8 bits, per channel, whole zeros": (8, K, "whole", F16),
}
BF16_WEIGHTS = [name for name, (*_, scale_dtype) in WEIGHTS.items() if scale_dtype == BF16]
"""For archs whose kernels read scales of all dtypes alike."""
ROWS = (1, 12, 40, 512)
FEW_WORDS = 4
"""Most words that ptxas may spill: constants of a tile, or a pointer where 128 registers let one more block run."""


def empty_call(rows: int, weight: str, dtype: torch.dtype) -> LinearCall:
    bits, group, moved, scale_dtype = WEIGHTS[weight]
    has_zeros, whole = moved in ("zeros", "whole"), moved == "whole"
    fmt = PackedFormat(bits, group, N, K, has_zeros, scale_dtype, moved == "offsets", whole)
    scales = torch.empty(fmt.scales_shape, dtype=fmt.scale_dtype)
    packed = torch.empty(fmt.weight_shape, dtype=fmt.weight_dtype)
    bias = torch.empty(N, dtype=dtype)
    zeros = torch.empty(fmt.scales_shape, dtype=fmt.zeros_dtype) if has_zeros else None
    offsets = scales if fmt.has_offsets else None
    return LinearCall(torch.empty(rows, K, dtype=dtype), packed, scales, zeros, bias, fmt, offsets)


def expected_kernels(arch: str, call: LinearCall) -> list[str]:
    """Which kernels a call launches: those for Hopper where they take it, else the plain ones."""
    few = call.x.shape[0] <= 16
    if arch == "sm_90":
        config = choose_few_rows_hopper(call.shape(), tuning.limits(arch))
        assert config is not None
        # Few rows of the weight may get one program per block.
        shared = not few or config.num_programs > 0
        return [f"{'few' if few else 'many'}_rows_hopper", *(["sum_shares"] if shared else [])]
    return ["few_rows", "sum_splits"] if few else ["many_rows"]


@pytest.mark.parametrize(
    ("arch", "rows", "weight", "dtype"),
    [
        *itertools.product(("sm_80", "sm_86", "sm_120"), ROWS, BF16_WEIGHTS, ["bfloat16"]),
        *itertools.product(("sm_90",), ROWS, WEIGHTS, ["bfloat16"]),
        *itertools.product(("sm_90",), ROWS, BF16_WEIGHTS, ["float16"]),
    ],
)
def test_only_a_few_words_spill_and_shared_memory_suffices(arch, rows, weight, dtype):
    call = empty_call(rows, weight, getattr(torch, dtype))
    with compiling_for(arch) as kernels:
        launch_linear(call)
    assert [kernel.name for kernel in kernels] == [f"_linear_{name}_kernel" for name in expected_kernels(arch, call)]
    for kernel in kernels:
        assert kernel.spilled <= FEW_WORDS
        assert kernel.shared_memory <= tuning.limits(arch).shared_memory_per_block


def call_for_hopper(
    rows: int, out_features: int, group: int, moved: str | None, bits: int = 4, scale_dtype: torch.dtype = BF16
) -> LinearCall:
    whole = moved == "whole"
    fmt = PackedFormat(bits, group, out_features, K, whole, scale_dtype, moved == "offsets", whole)
    weight = torch.empty(fmt.weight_shape, dtype=fmt.weight_dtype)
    scales = torch.empty(fmt.scales_shape, dtype=fmt.scale_dtype)
    zeros = torch.empty(fmt.scales_shape, dtype=fmt.zeros_dtype) if whole else None
    offsets = scales if fmt.has_offsets else None
    return LinearCall(torch.empty(rows, K, dtype=BF16), weight, scales, zeros, None, fmt, offsets)


# Widths that get tiles of 16, 32, 64 and 128 rows.
@pytest.mark.parametrize("out_features", [48, 8224, 5376, 16384, 43008])
@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize(
    ("bits", "group", "moved", "scale_dtype"),
    [
        *((4, 32, None, BF16), (4, 64, "whole", BF16), (4, 128, None, BF16), (8, 32, None, BF16), (8, K, None, BF16)),
        *((4, 32, "offsets", F16), (4, 32, "offsets", F32), (8, 32, "offsets", F32)),
    ],
)
def test_tiles_of_few_rows_for_hopper(rows, out_features, bits, group, moved, scale_dtype):
    call = call_for_hopper(rows, out_features, group, moved, bits, scale_dtype)
    config = choose_few_rows_hopper(call.shape(), tuning.limits("sm_90"))
    assert config is not None
    assert serves(call, config)
    with compiling_for("sm_90") as kernels:
        launch_few_rows_hopper(call, config, Destination(call.empty_output(), 1))
    assert kernels[0].name == "_linear_few_rows_hopper_kernel"
    assert all(kernel.spilled <= FEW_WORDS for kernel in kernels)
    # All programs run at once: a second wave would take as long as the first.
    blocks = kernels[0].registers * 32 * config.column_warps * config.row_warps
    assert config.num_programs * blocks <= 65536 * tuning.limits("sm_90").sm_count


@pytest.mark.parametrize("rows", [40, 128, 512])
@pytest.mark.parametrize(
    ("bits", "group", "moved", "scale_dtype"),
    [
        *((4, 32, None, BF16), (4, 64, "whole", BF16), (4, 128, None, BF16)),
        *((4, 32, "offsets", BF16), (4, 32, "offsets", F16), (4, 32, "offsets", F32), (4, 64, "whole", F16)),
        *((8, 32, None, BF16), (8, 32, "offsets", F32), (8, K, None, BF16)),
    ],
)
def test_products_of_many_rows_for_hopper_run_side_by_side(rows, bits, group, moved, scale_dtype):
    call = call_for_hopper(rows, 5376, group, moved, bits, scale_dtype)
    config = choose_many_rows_hopper(call.shape(), tuning.limits("sm_90"))
    assert config is not None
    with compiling_for("sm_90") as kernels:
        launch_many_rows_hopper(call, config, Destination(call.empty_output(), 1))
    assert all(kernel.spilled <= (FEW_WORDS if bits == 8 else 0) for kernel in kernels)
    # Of the products of a step, only the last waits. (ptxas waits for each one where it lacks registers.)
    assert kernels[0].ptx.count("wgmma.wait_group") == 2


@pytest.mark.parametrize("rows", [1, 40])
def test_float32_compiles(rows):
    with compiling_for("sm_90") as kernels:
        launch_linear(empty_call(rows, "4 bits, zeros", torch.float32))
    assert all(k.shared_memory <= tuning.limits("sm_86").shared_memory_per_block for k in kernels)
