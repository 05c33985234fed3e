"""Views before a Triton operator reach it as strides; no buffer of their size is allocated."""

import pytest
import torch
from wrappers import allocated, wrapper_source

from flashpte.passes import replace_sdpa

HEADS, KEYS, HEAD_DIM = 3, 512, 64


def row_sums(x, mask):
    return torch.ops.flashpte_test.row_sums(x, mask)


class Cached(torch.nn.Module):
    """A cache [1, L, H, D]; each call writes one row."""

    def __init__(self):
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, KEYS, HEADS, HEAD_DIM, dtype=torch.bfloat16))

    def rows(self, new, position):
        self.cache.index_copy_(1, position, new)
        return self.cache


class Transposed(Cached):
    def forward(self, new, position):
        rows = self.rows(new, position)
        return row_sums(rows.transpose(1, 2), torch.ones(1, HEADS, 1, KEYS, dtype=torch.bool))


class Sliced(Cached):
    def forward(self, new, position):
        rows = self.rows(new, position)[:, 64 : KEYS - 64]
        return row_sums(rows.permute(0, 2, 1, 3), torch.ones(1, HEADS, 1, KEYS - 128, dtype=torch.bool))


class ExpandedMask(Cached):
    def forward(self, new, position):
        rows = self.rows(new, position)
        mask = (torch.arange(KEYS) <= position).unsqueeze(0).unsqueeze(0).unsqueeze(0)  # [1, 1, 1, L]
        return row_sums(rows.transpose(1, 2), mask.expand(1, HEADS, 1, KEYS))


def export(model):
    example = (torch.randn(1, 1, HEADS, HEAD_DIM, dtype=torch.bfloat16), torch.tensor([5]))
    return torch.export.export(model.eval(), example)


@pytest.mark.lowering
@pytest.mark.parametrize("model", [Transposed, Sliced], ids=["transposed", "sliced"])
def test_cache_is_not_copied(model, tmp_path):
    rows = KEYS - 128 if model is Sliced else KEYS
    assert (rows * HEADS * HEAD_DIM, "bfloat16") not in allocated(wrapper_source(export(model()), tmp_path))


@pytest.mark.lowering
def test_expanded_mask_is_not_copied(tmp_path):
    buffers = allocated(wrapper_source(export(ExpandedMask()), tmp_path))
    assert (KEYS * HEADS, "bool") not in buffers
    assert (KEYS * HEADS * HEAD_DIM, "bfloat16") not in buffers
    assert (KEYS, "bool") in buffers  # the mask itself must exist, but not expanded


@pytest.mark.lowering
def test_without_the_pass_the_cache_is_copied(tmp_path):
    source = wrapper_source(export(Transposed()), tmp_path, restore_views=False)
    assert (KEYS * HEADS * HEAD_DIM, "bfloat16") in allocated(source)


class Decode(torch.nn.Module):
    """Attention over caches [1, L, H, D] with a mask expanded over heads, as exported models write it."""

    def __init__(self, window):
        super().__init__()
        self.window = window
        for name in ("k", "v"):
            self.register_buffer(name, torch.zeros(1, KEYS, HEADS, HEAD_DIM, dtype=torch.bfloat16))

    def forward(self, q, k, v, position):
        self.k.index_copy_(1, position, k)
        self.v.index_copy_(1, position, v)
        keys, values = self.k[:, : self.window].transpose(1, 2), self.v[:, : self.window].transpose(1, 2)
        mask = (torch.arange(self.window) <= position)[None, None, None].expand(1, 2 * HEADS, 1, self.window)
        q = q.transpose(1, 2)
        attended = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        return attended.transpose(1, 2).reshape(1, 1, -1)


@pytest.mark.lowering
@pytest.mark.parametrize("window", [KEYS, 300], ids=["whole", "sliced"])
def test_our_attention_copies_neither_cache_nor_mask(window, tmp_path):
    row = torch.randn(1, 1, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    program = torch.export.export(Decode(window).eval(), (torch.cat([row, row], 2), row, row, torch.tensor([5])))
    program, report = replace_sdpa(program)
    assert report.declined == ()
    buffers = allocated(wrapper_source(program, tmp_path))
    assert (window * HEADS * HEAD_DIM, "bfloat16") not in buffers
    assert (window * 2 * HEADS, "bool") not in buffers
