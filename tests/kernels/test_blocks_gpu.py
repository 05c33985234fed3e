"""Prefill on a GPU of rows that the Hopper kernel holds as two blocks of columns, compared with float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import Case, Problem, build, check, with_intervals

from flashpte.kernels import sdpa_prefill
from flashpte.kernels.hopper import serves

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

# Head dims of keys and of values. The second block has 16, 32 or 64 columns, or is missing in the keys, in the values
# or in both (72, 88, 136, 168). The last two have small tiles of keys, which have one block.
DIMS = (
    *((dim, dim) for dim in (72, 80, 88, 96, 136, 160, 168, 192)),
    *((192, 128), (128, 192), (96, 64), (64, 80), (72, 136), (80, 512), (320, 96)),
)


def aligned(p: Problem) -> Problem:
    """The same problem with rows that start at multiples of 16 columns, each followed by NaN."""
    tensors = {"query": p.query, "key": p.key, "value": p.value}
    padded = {n: torch.nn.functional.pad(x, (0, -x.shape[-1] % 16), value=float("nan")) for n, x in tensors.items()}
    return dataclasses.replace(p, **{name: padded[name][..., : x.shape[-1]] for name, x in tensors.items()})


def attend(p: Problem, *bounds: torch.Tensor | None) -> torch.Tensor:
    mask, causal = (None, False) if bounds else (p.mask, p.is_causal)
    return sdpa_prefill(p.query, p.key, p.value, mask, None, None, causal, p.scale, [0, 2, 1, 3], *bounds)


@pytest.mark.parametrize(("head_dim", "v_head_dim"), DIMS)
@pytest.mark.parametrize("mask", ["none", "is_causal", "bool_window", "bool_empty_rows", "float_bias"])
def test_prefill_of_rows_in_two_blocks(head_dim, v_head_dim, mask):
    sizes = dict(head_dim=head_dim, v_head_dim=v_head_dim, dtype=torch.bfloat16, mask=mask)
    for q_len, kv_len in ((300, 1000), (1100, 1100), (70, 5000)):
        p = aligned(build(Case(q_len, kv_len, heads_q=4, heads_kv=2, **sizes), "cuda"))
        assert serves(p.call())
        check(p, attend(p))


@pytest.mark.parametrize("head_dim", [72, 80, 96, 160, 192])
@pytest.mark.parametrize("kind", ["causal", "window", "documents"])
def test_intervals_with_rows_in_two_blocks(head_dim, kind):
    case = Case(300, 3000, batch=2, heads_q=4, heads_kv=2, head_dim=head_dim, dtype=torch.float16)
    p, intervals = with_intervals(case, kind, "cuda")
    p = aligned(p)
    check(p, attend(p, intervals.bounds, intervals.values))
