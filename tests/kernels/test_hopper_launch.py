"""Kernels and grids that the Hopper kernel's launchers launch, for tensors without memory."""

from __future__ import annotations

import pytest
import torch
from triton.runtime import _allocation

from flashpte.kernels import combine, split_k, tiled, tuning
from flashpte.kernels.call import AttentionCall
from flashpte.kernels.hopper import launch as hopper_launch
from flashpte.kernels.launch import launch_with_scratch


@pytest.fixture
def launches(monkeypatch):
    """Records name and grid of every launch; launches nothing."""
    found: list[tuple[str, tuple[int, ...]]] = []

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: found.append((self.kernel.fn.__name__, grid))

    for module in (combine, hopper_launch, split_k, tiled):
        monkeypatch.setattr(module, "wrap_triton", Recorded)
    return found


def attend(launch, batch, heads, q_len, head_dim=64, width=None, kv_len=4096, causal=False, config=None, group=1):
    def tensor(heads, length):
        wide = torch.empty(batch, heads, length, width or head_dim, dtype=torch.bfloat16, device="meta")
        return wide[..., :head_dim]

    query, key, value = tensor(heads * group, q_len), tensor(heads, kv_len), tensor(heads, kv_len)
    launch(AttentionCall(query, key, value, 0.1, causal), config=config)


def test_a_batch_of_windows_fits_in_the_grid(launches):
    """5,000 windows of 16 heads are 80,000 heads, which exceeds the second dimension of a grid."""
    attend(tiled.launch_tiled, 5000, 16, 196, kv_len=196)
    assert launches == [("_hopper_kernel", (2 * 16 * 5000, 1, 1))]


@pytest.mark.parametrize("causal", [False, True])
def test_an_empty_batch_launches_nothing(launches, causal):
    attend(tiled.launch_tiled, 0, 16, 196, causal=causal)
    assert launches[0][0] == "_hopper_kernel"
    assert all(0 in grid for _, grid in launches)


def test_few_rows_are_split_and_combined_many_are_not(launches):
    attend(tiled.launch_tiled, 2, 4, 200)
    attend(tiled.launch_tiled, 2, 40, 200)
    assert launches == [
        ("_hopper_kernel", (2 * 4 * 2, 1, 8)),
        ("_combine_kernel", (200, 2 * 4, 1)),
        ("_hopper_kernel", (2 * 40 * 2, 1, 1)),
    ]


@pytest.mark.parametrize(
    ("heads", "q_len", "head_dim", "kv_len", "kernel"),
    [
        (2, 8, 128, 4096, "_split_k_kernel"),  # 64 keys for each of 128 programs
        (2, 8, 128, 4224, "_split_k_kernel"),  # 132 programs, one per multiprocessor
        (2, 8, 128, 4225, "_hopper_kernel"),
        (2, 4, 128, 40000, "_split_k_kernel"),  # 16 rows
        (1, 16, 192, 3941, "_split_k_kernel"),
        (1, 17, 192, 3941, "_hopper_kernel"),  # 68 rows
        (1, 8, 256, 1024, "_hopper_kernel"),  # no padding columns
        (1, 8, 192, None, "_hopper_kernel"),
        (12, 30, 192, 119219, "_split_k_kernel"),  # 120 rows, for which the other kernel would read the keys twice
        (12, 30, 192, 4096, "_hopper_kernel"),
        (12, 16, 192, 119219, "_hopper_kernel"),
        (12, 33, 192, 119219, "_hopper_kernel"),
        (12, 30, 256, 119219, "_hopper_kernel"),
    ],
)
def test_verify_of_few_keys_or_of_ragged_rows_is_left_to_triton(heads, q_len, head_dim, kv_len, kernel):
    dims = (head_dim, head_dim)
    shape = tuning.AttentionShape(1, 4 * heads, heads, q_len, kv_len, *dims, torch.bfloat16)
    served = tuning.choose_hopper_split_k(shape, tuning.limits("sm_90")) is not None
    assert served == (kernel == "_hopper_kernel")


@pytest.mark.parametrize(
    ("launch", "q_len", "other"),
    [(tiled.launch_tiled, 200, "_tiled_kernel"), (split_k.launch_split_k, 8, "_split_k_kernel")],
)
def test_rows_that_do_not_end_at_a_multiple_of_16_bytes_are_left_to_triton(launches, launch, q_len, other):
    """A copy of less than 4 bytes does not compile."""
    attend(launch, 1, 2, q_len, head_dim=99, width=112, group=4, kv_len=8192)
    attend(launch, 1, 2, q_len, head_dim=104, width=112, group=4, kv_len=8192)
    assert [name for name, _ in launches if name != "_combine_kernel"] == [other, "_hopper_kernel"]


def test_memory_for_tensor_maps_comes_from_pytorch_and_nobody_elses_allocator_is_replaced():
    found = []
    outside = _allocation._allocator.get()
    launch_with_scratch(lambda: found.append(_allocation._allocator.get()(256, 128, None)), torch.empty(1))
    assert (found[0].shape, found[0].dtype) == ((256,), torch.int8)
    assert _allocation._allocator.get() is outside


def test_keys_of_a_causal_mask_are_not_split(launches):
    config = tuning.HopperConfig(64, 64, 4, share_rows=True, num_splits=8, short_splits=8)
    with pytest.raises(ValueError, match="does not split"):
        attend(split_k.launch_split_k, 1, 2, 8, head_dim=128, causal=True, config=config)
