"""Equal masks that each layer computes anew share bounds and a map; masks that only look equal do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import assert_same_attention, calls, check_maps, exported, fresh_module, qkv
from torch.export import Dim

from flashpte.passes import replace_sdpa

KEYS, LAYERS = 200, 3


def causal(x, pos, layer):
    return torch.arange(KEYS)[None] <= pos[:, None]


def causal_by_length(x, pos, layer):
    """Each layer takes the length from its own input."""
    return (torch.arange(KEYS)[None] <= torch.arange(x.shape[2])[:, None])[None, None].expand(1, 4, -1, -1)


def causal_written_in_two_ways(x, pos, layer):
    return causal(x, pos, layer) if layer == 1 else pos.unsqueeze(1) >= torch.arange(KEYS)


def remainders(x, pos, layer):
    return (torch.arange(KEYS) + pos[:, None]) % 3 == 0


def with_constant_tensor(x, pos, layer):
    return torch.where(remainders(x, pos, layer), torch.zeros(()), torch.full((), -2.0))


def other_window(x, pos, layer):
    return causal(x, pos, layer) & (torch.arange(KEYS) > pos[:, None] - 20 - layer)


def other_remainder(x, pos, layer):
    return (torch.arange(KEYS) + pos[:, None]) % 3 == layer


def random(x, pos, layer):
    return (torch.rand(KEYS) < 2.0) & remainders(x, pos, layer)


def from_what_changes(x, pos, layer):
    return (x[0, 0, :, :1] > 0) & remainders(x, pos, layer)


def row_written_in_one(x, pos, layer):
    mask = remainders(x, pos, layer)
    if layer == 1:
        mask[3, :50] = True
    return mask


def positions_written_between(x, pos, layer):
    return torch.arange(KEYS)[None] <= pos.add_(layer * 10)[:, None]


def remainders_of_written_positions(x, pos, layer):
    return remainders(x, pos.add_(layer), layer)


class Layers(torch.nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, q, k, v, pos):
        pos = pos.clone()
        for layer in range(LAYERS):
            q = F.scaled_dot_product_attention(q, k, v, attn_mask=self.make(q, pos, layer))
        return q


EQUAL = [causal, causal_by_length, causal_written_in_two_ways, remainders, with_constant_tensor]
DIFFERENT = {
    other_window: 3,
    other_remainder: 3,
    random: 3,
    from_what_changes: 3,
    row_written_in_one: 2,
    positions_written_between: 3,
    remainders_of_written_positions: 3,
}


def run(make, dynamic: bool, decompose: bool) -> int:
    rows = Dim("rows", min=17, max=300)
    args = (*qkv(20, KEYS), torch.arange(20) * 7)
    program = exported(Layers(make), args, ({2: rows}, None, None, {0: rows}) if dynamic else None)
    if decompose:
        program = program.run_decompositions({})
    new, report = replace_sdpa(program)
    assert len(report.replaced) == LAYERS
    expected, out = fresh_module(program)(*args), fresh_module(new)(*args)
    assert_same_attention(out, expected)
    assert check_maps(new, args) == LAYERS
    return len(calls(new, "_map."))


@pytest.mark.parametrize("make", EQUAL, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("dynamic", "decompose"), [(False, False), (True, True), (True, False)])
def test_equal_masks_share_a_map(make, dynamic, decompose):
    assert run(make, dynamic, decompose) == 1


@pytest.mark.parametrize("make", DIFFERENT, ids=lambda f: f.__name__)
@pytest.mark.parametrize("decompose", [False, True])
def test_masks_that_only_look_equal_do_not(make, decompose):
    maps = run(make, False, decompose)
    # run_decompositions turns a write into different nodes in different versions; the values are the same.
    assert maps == DIFFERENT[make] or (decompose and maps <= LAYERS)
