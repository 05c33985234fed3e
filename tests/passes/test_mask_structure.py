"""Masks with a proven structure disappear from the program; masks that only look alike do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import assert_same_attention, calls, check_maps, exported, fresh_module, mask_tensors, qkv
from torch.export import Dim

from flashpte.passes import replace_sdpa

KEYS, WINDOW = 200, 30
NEG_INF = float("-inf")
slots = torch.arange(KEYS)


def causal(pos, extra):
    return slots <= pos[:, None]


def causal_flipped_sides(pos, extra):
    return pos.unsqueeze(1) >= torch.arange(KEYS).unsqueeze(0)


def causal_not_greater(pos, extra):
    return ~(torch.arange(KEYS)[None] > pos[:, None])


def causal_strict(pos, extra):
    return torch.arange(KEYS) < pos[:, None] + 1


def window(pos, extra):
    keys = torch.arange(KEYS)
    return (keys <= pos[:, None]) & (keys > pos[:, None] - WINDOW)


def window_by_difference(pos, extra):
    delta = pos[:, None] - torch.arange(KEYS)
    return (delta >= 0) & (delta < WINDOW)


def ring(pos, extra):
    keys = torch.arange(KEYS)
    last = pos.max()
    held = last - torch.remainder(last - keys, KEYS)
    age = pos[:, None] - held
    return (held >= 0) & (age >= 0) & (age < WINDOW)


def prefix(pos, extra):
    keys = torch.arange(KEYS)
    return (keys <= pos[:, None]) | (keys < 17)


def gapped_keys(pos, extra):
    return torch.arange(KEYS) * 3 - 50 <= pos[:, None]


def shifted_keys(pos, extra):
    return torch.arange(10, KEYS + 10) <= pos[:, None]


def sliced_keys(pos, extra):
    return (torch.arange(KEYS + 30) <= pos[:, None])[:, 7 : 7 + KEYS]


def permuted_keys(pos, extra):
    return extra <= pos[:, None]


def documents(pos, extra):
    keys = torch.arange(KEYS)
    return (keys <= pos[:, None]) & (extra // 25 == (pos // 25)[:, None])


def padded(pos, extra):
    return (torch.arange(KEYS) <= pos[:, None]) & (extra > 20)[None] & (extra != 77)


def rows_switched_off(pos, extra):
    return (torch.arange(KEYS) <= pos[:, None]) & (pos % 3 != 0)[:, None]


def transposed(pos, extra):
    return (torch.arange(KEYS)[:, None] <= pos[None]).transpose(0, 1)


def indexed_triangle(pos, extra):
    return torch.ones(400, KEYS, dtype=torch.bool).tril(3)[pos.clamp(0, 399)]


def four_dimensional(pos, extra):
    return (torch.arange(KEYS).view(1, 1, 1, KEYS) <= pos.view(1, 1, -1, 1)).expand(1, 4, -1, -1)


def int32_positions(pos, extra):
    return torch.arange(KEYS, dtype=torch.int32) <= pos.to(torch.int32)[:, None]


def float_where(pos, extra):
    return torch.where(torch.arange(KEYS) <= pos[:, None], 0.0, NEG_INF)


def float_fill(pos, extra):
    return torch.zeros(pos.shape[0], KEYS).masked_fill(torch.arange(KEYS) > pos[:, None], NEG_INF)


def float_triangle(pos, extra):
    return torch.full((400, KEYS), NEG_INF).triu(1)[pos.clamp(0, 399)]


def float_sum(pos, extra):
    far = torch.where(torch.arange(KEYS) > pos[:, None] - WINDOW, 0.0, NEG_INF)
    return far + torch.zeros(1, KEYS).masked_fill(torch.arange(KEYS) > pos[:, None], NEG_INF)


def finite_minimum(pos, extra):
    return torch.where(torch.arange(KEYS) <= pos[:, None], 0.0, torch.finfo(torch.float32).min)


PROVEN = {
    causal: "causal",
    causal_flipped_sides: "causal",
    causal_not_greater: "causal",
    causal_strict: "causal",
    window: "window",
    window_by_difference: "window",
    ring: "window",
    prefix: "causal",
    gapped_keys: "causal",
    shifted_keys: "causal",
    sliced_keys: "causal",
    permuted_keys: "causal",
    documents: "causal+documents",
    padded: "causal+lower bound+padding",
    rows_switched_off: "causal+rows",
    transposed: "causal",
    indexed_triangle: "causal",
    four_dimensional: "causal",
    int32_positions: "causal",
    float_where: "causal",
    float_fill: "causal",
    float_triangle: "causal",
    float_sum: "window",
    finite_minimum: "causal",
}


class Masked(torch.nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, q, k, v, pos, extra):
        mask = self.make(pos, extra)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def position_sets(q_len: int):
    """Consecutive, gapped, permuted, repeated, negative and far positions."""
    generator = torch.Generator().manual_seed(5)
    yield torch.arange(q_len)
    yield torch.arange(q_len) + KEYS - q_len
    yield torch.arange(q_len) * 7 % KEYS
    yield torch.randint(KEYS, (q_len,), generator=generator)
    yield torch.full((q_len,), 40)
    yield torch.randint(-50, 3 * KEYS, (q_len,), generator=generator)


def rewritten(make, q_len: int, dynamic: bool = False, decompose: bool = False):
    rows = Dim("rows", min=17, max=300)
    shapes = ({2: rows}, None, None, {0: rows}, None) if dynamic else None
    args = (*qkv(q_len, KEYS, heads_kv=2), torch.arange(q_len), torch.randperm(KEYS))
    program = exported(Masked(make), args, shapes)
    if decompose:
        program = program.run_decompositions(
            {
                op: decomposition
                for op, decomposition in torch.export.default_decompositions().items()
                if "scaled_dot_product_attention" not in str(op)
            }
        )
    new, report = replace_sdpa(program)
    assert len(report.replaced) == 1
    return program, new, report.nodes[0]


def equal_results(program, new, q_len: int) -> None:
    for seed, pos in enumerate(position_sets(q_len)):
        extra = torch.randperm(KEYS, generator=torch.Generator().manual_seed(seed))
        args = (*qkv(q_len, KEYS, heads_kv=2, seed=seed), pos, extra)
        expected, out = fresh_module(program)(*args), fresh_module(new)(*args)
        assert_same_attention(out, expected)
        assert check_maps(new, args) == 1


@pytest.mark.parametrize("make", PROVEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("q_len", "dynamic", "decompose"), [(1, False, False), (5, False, True), (5, False, False), (40, True, True)]
)
def test_proven_masks_are_computed_from_positions(make, q_len, dynamic, decompose):
    program, new, entry = rewritten(make, q_len, dynamic, decompose)
    (node,) = calls(new, "sdpa_")
    assert node.args[3] is None
    assert node.args[9] is not None
    assert len(calls(new, "interval_map")) == 1
    assert not calls(new, "tile_map")
    assert entry.mask == PROVEN[make] or q_len == 1
    if q_len > 1:
        rows = node.args[0].meta["val"].shape[2]
        assert not mask_tensors(new, rows, KEYS), "the mask is still computed"
    equal_results(program, new, 17 if dynamic else q_len)
    if dynamic:
        equal_results(program, new, 77)


def one_bit_flipped(pos, extra):
    mask = torch.arange(KEYS) <= pos[:, None]
    return mask ^ (extra == 3)[None]


def one_bit_written(pos, extra):
    mask = torch.arange(KEYS) <= pos[:, None]
    mask[0, 5] = False
    return mask


def not_equal(pos, extra):
    return torch.arange(KEYS) != pos[:, None]


def two_sided_or(pos, extra):
    keys = torch.arange(KEYS)
    return (keys <= pos[:, None] - 20) | (keys > pos[:, None] + 20)


def or_of_different_numbers(pos, extra):
    return (torch.arange(KEYS) <= pos[:, None]) | (extra <= pos[:, None])


def outer_product(pos, extra):
    return torch.arange(KEYS) * pos[:, None] <= 1000


def float_positions(pos, extra):
    return torch.arange(KEYS) <= pos[:, None] * 0.5


def bias(pos, extra):
    distance = (pos[:, None] - torch.arange(KEYS)).float()
    return torch.where(torch.arange(KEYS) <= pos[:, None], -0.1 * distance, NEG_INF)


def by_head(pos, extra):
    return torch.arange(KEYS) <= (pos[:, None] - 9 * torch.arange(4)[:, None, None])


def four_numbers(pos, extra):
    rows = pos[:, None]
    return (slots <= rows) & (extra <= rows + 90) & (extra // 2 <= rows + 80) & (extra // 3 <= rows + 50)


def remainders(pos, extra):
    return (torch.arange(KEYS) + pos[:, None]) % 3 == 0


UNPROVEN = [
    one_bit_flipped,
    one_bit_written,
    not_equal,
    two_sided_or,
    or_of_different_numbers,
    outer_product,
    float_positions,
    bias,
    by_head,
    four_numbers,
    remainders,
]


@pytest.mark.parametrize("make", UNPROVEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("q_len", "dynamic"), [(5, False), (40, True)])
def test_other_masks_are_mapped(make, q_len, dynamic):
    program, new, entry = rewritten(make, q_len, dynamic)
    (node,) = calls(new, "sdpa_")
    assert node.args[3] is not None
    assert node.args[9] is None
    assert len(calls(new, "tile_map")) == 1
    assert entry.mask in ("bool", "float")
    equal_results(program, new, 77 if dynamic else q_len)


class ConstantMask(torch.nn.Module):
    """A mask kept as a buffer: a proof checks every bit of it."""

    def __init__(self, flip: bool):
        super().__init__()
        mask = torch.ones(KEYS, KEYS, dtype=torch.bool).tril()
        mask[40, 3] ^= flip
        self.register_buffer("mask", mask)

    def forward(self, q, k, v, pos):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[None, None, pos])


def test_a_flipped_bit_gives_the_flipped_result():
    args = (*qkv(5, KEYS), torch.arange(38, 43))
    results = []
    for flip in (False, True):
        module = ConstantMask(flip)
        new, report = replace_sdpa(exported(module, args))
        assert report.nodes[0].mask_form == ("tensor" if flip else "positions")
        out = new.module()(*args)
        assert_same_attention(out, module(*args))
        assert check_maps(new, args) == 1
        results.append(out)
    assert not torch.equal(results[0][:, :, 2], results[1][:, :, 2])
    assert torch.equal(results[0][:, :, 3], results[1][:, :, 3])


class PositionsWritten(torch.nn.Module):
    """Positions that change in place after the mask is computed from them, or between two attentions."""

    def __init__(self, when: str):
        super().__init__()
        self.when = when
        self.register_buffer("pos", torch.arange(5) + 20)

    def forward(self, q, k, v):
        mask = torch.arange(KEYS) <= self.pos[:, None]
        if self.when == "before":
            self.pos.add_(50)
        first = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if self.when == "between":
            self.pos.add_(50)
        return first + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize(("when", "proven"), [("before", 0), ("between", 2), ("never", 2)])
@pytest.mark.parametrize("decompose", [False, True])
def test_positions_written_in_place(when, proven, decompose):
    args = qkv(5, KEYS)
    program = exported(PositionsWritten(when), args)
    if decompose:
        program, proven = program.run_decompositions({}), 2
    new, _ = replace_sdpa(program)
    out, expected = fresh_module(new)(*args), fresh_module(program)(*args)
    assert_same_attention(out, expected)
    assert check_maps(new, args) == 2
    assert sum(node.args[9] is not None for node in calls(new, "sdpa_")) == proven


def test_a_batch_with_its_own_positions_and_padding():
    class Batch(torch.nn.Module):
        def forward(self, q, k, v, positions, valid):
            mask = (torch.arange(KEYS) <= positions[:, :, None]) & valid[:, None].bool()
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])

    valid = torch.ones(3, KEYS, dtype=torch.int64)
    valid[0, :50] = 0
    valid[2, 60:] = 0
    positions = torch.stack([torch.arange(5) + start for start in (3, 70, 190)])
    args = (*qkv(5, KEYS, batch=3), positions, valid)
    new, report = replace_sdpa(exported(Batch(), args))
    assert report.nodes[0].mask == "causal+padding"
    assert not calls(new, "tile_map")
    assert_same_attention(new.module()(*args), Batch()(*args))
    assert check_maps(new, args) == 1
