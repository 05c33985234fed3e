"""Random combinations of the masks that models write: whatever the pass proves, the results are the program's."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from programs import assert_same_attention, check_maps, exported, qkv

from flashpte.passes import replace_sdpa

KEYS, ROWS, MASKS = 90, 7, 24
NEG_INF, MIN = float("-inf"), torch.finfo(torch.float32).min
arange, where = torch.arange, torch.where


class Author:
    """Writes a mask ``[ROWS, KEYS]`` as a function of a module, row positions and key numbers."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def bool_mask(self, depth: int):
        leaf = self.random.choice(LEAVES)
        if depth == 0:
            return self.leaf(leaf)
        a, b = self.bool_mask(depth - 1), self.bool_mask(self.random.randrange(depth))
        cut = self.random.randrange(1, KEYS)
        joined = [
            lambda m, p, e: a(m, p, e) & b(m, p, e),
            lambda m, p, e: a(m, p, e) & b(m, p, e),
            lambda m, p, e: a(m, p, e) | b(m, p, e),
            lambda m, p, e: ~a(m, p, e),
            lambda m, p, e: a(m, p, e) == True,  # noqa: E712
            lambda m, p, e: a(m, p, e).int() != 0,
            lambda m, p, e: torch.logical_and(a(m, p, e), b(m, p, e)),
            lambda m, p, e: where(a(m, p, e), b(m, p, e), False),
            lambda m, p, e: where(a(m, p, e), True, b(m, p, e)),
            lambda m, p, e: a(m, p, e).masked_fill(b(m, p, e), False),
            lambda m, p, e: torch.cat([a(m, p, e)[:, :cut], b(m, p, e)[:, cut:]], 1),
            lambda m, p, e: torch.cat([a(m, p, e)[:3], b(m, p, e)[3:]]),
            lambda m, p, e: torch.stack([a(m, p, e), b(m, p, e)])[0],
            lambda m, p, e: torch.cat([b(m, p, e), a(m, p, e)], 1).narrow(1, cut, KEYS),
        ]
        return self.random.choice(joined)

    def leaf(self, leaf):
        n, w = self.random.randrange(-5, KEYS), self.random.randrange(1, 40)
        return lambda m, p, e: leaf(m, p, e, n, w).expand(ROWS, KEYS)

    def mask(self):
        made = self.bool_mask(self.random.randrange(1, 4))
        fill = self.random.choice([NEG_INF, MIN, MIN, -1e9])
        forms = [
            made,
            made,
            lambda m, p, e: where(made(m, p, e), 0.0, fill),
            lambda m, p, e: torch.zeros(ROWS, KEYS).masked_fill(~made(m, p, e), fill),
            lambda m, p, e: (1.0 - made(m, p, e).float()) * MIN,
        ]
        return self.random.choice(forms)


LEAVES = [
    lambda m, p, e, n, w: arange(KEYS) <= p[:, None],
    lambda m, p, e, n, w: arange(KEYS) > p[:, None] - w,
    lambda m, p, e, n, w: (p[:, None] - arange(KEYS)).abs() <= w,
    lambda m, p, e, n, w: (arange(KEYS) < n)[None],
    lambda m, p, e, n, w: (arange(KEYS) >= n)[None],
    lambda m, p, e, n, w: (e > n)[None],
    lambda m, p, e, n, w: (e % 5 != 1)[None],
    lambda m, p, e, n, w: (p % 3 != 0)[:, None],
    lambda m, p, e, n, w: (p > n)[:, None],
    lambda m, p, e, n, w: m.tril[p % KEYS],
    lambda m, p, e, n, w: m.band.index_select(0, p % KEYS),
    lambda m, p, e, n, w: e // w == (p // w)[:, None],
    lambda m, p, e, n, w: e[None] <= p[:, None] + n,
]


class Masked(torch.nn.Module):
    def __init__(self, makes):
        super().__init__()
        self.makes = makes
        ones = torch.ones(KEYS, KEYS, dtype=torch.bool)
        self.register_buffer("tril", ones.tril(), persistent=False)
        self.register_buffer("band", ones.tril(3) & ones.triu(-11))

    def forward(self, q, k, v, pos, extra):
        masks = [make(self, pos, extra) for make in self.makes]
        return [F.scaled_dot_product_attention(q, k, v, attn_mask=mask) for mask in masks]


@pytest.mark.parametrize("seed", range(2))
def test_random_masks(seed):
    author = Author(seed)
    args = (*qkv(ROWS, KEYS), arange(ROWS), torch.randperm(KEYS))
    program = exported(Masked([author.mask() for _ in range(MASKS)]), args)
    if seed % 2:
        program = program.run_decompositions({})
    new, report = replace_sdpa(program)
    forms = [entry.mask_form for entry in report.nodes]
    assert forms.count("positions") >= MASKS // 4, "hardly any is proven: nothing is tested"
    generator = torch.Generator().manual_seed(seed)
    sets = [arange(ROWS) * 13, torch.randint(-40, 2 * KEYS, (ROWS,), generator=generator), torch.full((ROWS,), 50)]
    modules = [p.module() for p in (program, new)]
    for pos in sets:
        given = (*args[:3], pos, torch.randperm(KEYS, generator=generator))
        both = [module(*given) for module in modules]
        for i, (expected, out) in enumerate(zip(*both, strict=True)):
            message = f"mask {i}, {report.nodes[i]}"
            assert_same_attention(out, expected, msg=lambda m, s=message: f"{s}: {m}")
    assert check_maps(new, given) == MASKS
