"""Packed weights: layout, padding, round trips, and what packing refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashpte.kernels.linear.format import Groupwise, PackedFormat, pack, pack_codes, pack_groups, unpack, unpack_codes


def random_weight(fmt: PackedFormat, seed: int = 0) -> Groupwise:
    generator = torch.Generator().manual_seed(seed)
    shape = (fmt.out_features, fmt.groups)
    codes = torch.randint(1 << fmt.bits, (fmt.out_features, fmt.in_features), generator=generator, dtype=torch.uint8)
    scales = torch.randn(shape, generator=generator).to(fmt.scale_dtype)
    moved = torch.randn(shape, generator=generator).to(fmt.scale_dtype)
    return Groupwise(codes, scales, moved if fmt.has_zeros else None, moved if fmt.has_offsets else None)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 128, None]),
    rows=st.integers(1, 70),
    columns=st.integers(1, 400),
    moved=st.sampled_from([None, "zeros", "offsets"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_unpacking_gives_back_what_was_packed(bits, group, rows, columns, moved, dtype):
    if group is None:
        bits, group = 8, columns
    fmt = PackedFormat(bits, group, rows, columns, moved == "zeros", dtype, moved == "offsets")
    natural = random_weight(fmt, rows + columns)
    packed = pack(natural, fmt)
    assert packed.weight.shape == fmt.weight_shape
    assert packed.weight.dtype == fmt.weight_dtype
    assert packed.scales.shape == fmt.scales_shape
    assert all(tensor is None or tensor.is_contiguous() for tensor in packed)
    for before, after in zip(natural, unpack(packed, fmt), strict=True):
        assert (before is None) == (after is None)
        assert before is None or torch.equal(before, after)


def test_the_layout_is_what_the_kernels_read():
    fmt = PackedFormat(4, 32, 48, 256)
    natural = random_weight(fmt)
    weight, scales, *_ = pack(natural, fmt)
    for n, k in ((0, 0), (17, 33), (47, 255), (9, 127), (25, 128 + 96)):
        word = int(weight[n // 16, k // 128, n % 16, k % 32])
        assert (word >> 4 * (k % 128 // 32)) & 15 == int(natural.codes[n, k])
        assert scales[n // 16, k // 128, n % 8, n // 8 % 2, k % 128 // 32] == natural.scales[n, k // 32]
    wide = PackedFormat(8, 256, 48, 256)
    natural = random_weight(wide)
    weight, scales, *_ = pack(natural, wide)
    for n, k in ((0, 0), (17, 33), (47, 255)):
        assert int(weight[n // 16, k // 128, n % 16, k % 128]) == int(natural.codes[n, k]) - 128
        assert scales[n // 16, 0, n % 8, n // 8 % 2, 0] == natural.scales[n, 0]


@pytest.mark.parametrize("bits", [4, 8])
def test_padding_stands_for_zero(bits):
    fmt = PackedFormat(bits, 64, 50, 200)
    padded = PackedFormat(bits, 64, 64, 256)
    weight, scales, *_ = pack(random_weight(fmt), fmt)
    codes = unpack_codes(weight, padded)
    assert (codes[50:] == 1 << (bits - 1)).all()
    assert (codes[:, 200:] == 1 << (bits - 1)).all()
    whole = unpack((weight, scales, None), padded).scales
    assert (whole[50:] == 0).all()
    assert fmt.groups == 4
    assert torch.equal(pack_groups(whole, padded), scales)


def test_packing_rows_apart_gives_the_same_tiles():
    """So a weight can be packed as it is read, some rows at a time."""
    fmt, part = PackedFormat(4, 32, 64, 256), PackedFormat(4, 32, 32, 256)
    natural = random_weight(fmt)
    whole = pack(natural, fmt)
    parts = [pack(Groupwise(natural.codes[at], natural.scales[at], None), part) for at in (slice(32), slice(32, 64))]
    assert torch.equal(whole.weight, torch.cat([p.weight for p in parts]))
    assert torch.equal(whole.scales, torch.cat([p.scales for p in parts]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(bits=3), "weights of 3 bits: the kernels take 4 or 8"),
        (dict(group=16), "groups of 16 columns: the kernels take 32, 64 or 128 with 4 bits"),
        (dict(group=256), "groups of 256 columns"),
        (dict(bits=8, group=255), r"or 256 \(one scale for each row\)"),
        (dict(out_features=0), "a weight of 0 x 256 is empty"),
        (dict(scale_dtype=torch.float64), "scales of torch.float64"),
        (dict(has_zeros=True, has_offsets=True), "zero points or offsets, not both"),
    ],
)
def test_formats_that_do_not_exist(changes, message):
    with pytest.raises(ValueError, match=message):
        PackedFormat(**(dict(bits=4, group=32, out_features=48, in_features=256) | changes))


def test_tensors_that_do_not_fit():
    fmt = PackedFormat(4, 32, 48, 256)
    codes, scales, *_ = random_weight(fmt)
    with pytest.raises(ValueError, match=r"codes must be torch.uint8 \[48, 256\], got torch.int64"):
        pack_codes(codes.long(), fmt)
    with pytest.raises(ValueError, match=r"got torch.uint8 \[47, 256\]"):
        pack_codes(codes[1:], fmt)
    with pytest.raises(ValueError, match="at most 15, got 16"):
        pack_codes(torch.full_like(codes, 16), fmt)
    with pytest.raises(ValueError, match=r"must be torch.bfloat16 \[48, 8\], got torch.float32"):
        pack_groups(scales.float(), fmt)
    with pytest.raises(ValueError, match="the packed weight must be"):
        unpack_codes(torch.zeros(3, 2, 16, 33, dtype=torch.int16), fmt)
    with pytest.raises(ValueError, match="the format has no zero points, the weight differs"):
        pack(Groupwise(codes, scales, scales), fmt)
    with pytest.raises(ValueError, match="the format has no offsets, the weight differs"):
        pack(Groupwise(codes, scales, None, scales), fmt)
    with pytest.raises(ValueError, match="the format has offsets, the weight differs"):
        pack(Groupwise(codes, scales), dataclasses.replace(fmt, has_offsets=True))
