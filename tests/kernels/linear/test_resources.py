"""Registers and shared memory of the chosen tiles, read from cubins: nothing spills."""

from __future__ import annotations

import itertools

import pytest
import torch
from compile_only import compiling_for

from flashpte.kernels import tuning
from flashpte.kernels.linear.call import Destination, LinearCall
from flashpte.kernels.linear.dispatch import launch_linear
from flashpte.kernels.linear.format import PackedFormat
from flashpte.kernels.linear.few_rows_hopper import launch_few_rows_hopper, serves
from flashpte.kernels.linear.tuning import choose_few_rows_hopper

N, K = 256, 5376  # few rows of the weight, so that several programs share its columns
WEIGHTS = {
    "4 bits": (4, 32, None),
    "4 bits, zeros": (4, 32, "zeros"),
    "4 bits, offsets": (4, 32, "offsets"),
    "4 bits, groups of 128": (4, 128, None),
    "4 bits, groups of 128, zeros": (4, 128, "zeros"),
    "8 bits, zeros": (8, 32, "zeros"),
    "8 bits, offsets": (8, 32, "offsets"),
    "8 bits, per channel": (8, K, None),
}
ROWS = (1, 12, 40, 512)


def empty_call(rows: int, weight: str, dtype: torch.dtype) -> LinearCall:
    bits, group, moved = WEIGHTS[weight]
    fmt = PackedFormat(bits, group, N, K, moved == "zeros", has_offsets=moved == "offsets")
    scales = torch.empty(fmt.scales_shape, dtype=fmt.scale_dtype)
    packed = torch.empty(fmt.weight_shape, dtype=fmt.weight_dtype)
    bias = torch.empty(N, dtype=dtype)
    x, zeros, offsets = (
        torch.empty(rows, K, dtype=dtype),
        *(scales if moved == name else None for name in ("zeros", "offsets")),
    )
    return LinearCall(x, packed, scales, zeros, bias, fmt, offsets)


@pytest.mark.parametrize(
    ("arch", "rows", "weight", "dtype"),
    [
        *itertools.product(("sm_80", "sm_86", "sm_90", "sm_120"), ROWS, WEIGHTS, ["bfloat16"]),
        *itertools.product(("sm_90",), ROWS, WEIGHTS, ["float16"]),
    ],
)
def test_nothing_spills_and_shared_memory_suffices(arch, rows, weight, dtype):
    with compiling_for(arch) as kernels:
        launch_linear(empty_call(rows, weight, getattr(torch, dtype)))
    expected = ["many_rows"] if rows > 16 else ["few_rows", "sum_splits"]
    assert [kernel.name for kernel in kernels] == [f"_linear_{name}_kernel" for name in expected]
    for kernel in kernels:
        assert kernel.spilled == 0
        assert kernel.shared_memory <= tuning.limits(arch).shared_memory_per_block


@pytest.mark.parametrize(("rows", "out_features"), [(1, N), (8, N), (16, N), (8, 65536), (16, 65536)])
@pytest.mark.parametrize("group", [32, 128])
def test_tiles_of_the_kernel_for_hopper(rows, out_features, group):
    fmt = PackedFormat(4, group, out_features, K)
    weight = torch.empty(fmt.weight_shape, dtype=fmt.weight_dtype)
    scales = torch.empty(fmt.scales_shape, dtype=fmt.scale_dtype)
    call = LinearCall(torch.empty(rows, K, dtype=torch.bfloat16), weight, scales, None, None, fmt)
    config = choose_few_rows_hopper(call.shape(), tuning.limits("sm_90"))
    assert config is not None
    assert serves(call, config)
    with compiling_for("sm_90") as kernels:
        launch_few_rows_hopper(call, config, Destination(call.empty_output(), 1))
    assert kernels[0].name == "_linear_few_rows_hopper_kernel"
    assert all(kernel.spilled == 0 for kernel in kernels)


@pytest.mark.parametrize("rows", [1, 40])
def test_float32_compiles(rows):
    with compiling_for("sm_90") as kernels:
        launch_linear(empty_call(rows, "4 bits, zeros", torch.float32))
    assert all(k.shared_memory <= tuning.limits("sm_86").shared_memory_per_block for k in kernels)
