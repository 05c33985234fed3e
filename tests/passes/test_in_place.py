"""Programs straight from torch.export may write in place between two reads, so a node's name is not a value."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import assert_same_attention, calls, check_maps, exported, fresh_module, qkv

from flashpte.passes import replace_sdpa

attend = F.scaled_dot_product_attention


class MaskWrittenThroughAView(torch.nn.Module):
    maps = 2

    def forward(self, q, k, v):
        mask = torch.zeros(1, 1, 5, 640, dtype=torch.bool)
        mask[..., :3] = True
        first = attend(q, k, v, attn_mask=mask)
        mask[..., 300:] = True
        return first + attend(q, k, v, attn_mask=mask)


class MaskBufferBehindAnExpand(torch.nn.Module):
    maps = 2

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.arange(640).lt(9).expand(1, 1, 5, 640).clone())

    def forward(self, q, k, v):
        mask = self.mask.expand(1, 4, -1, -1)
        first = attend(q, k, v, attn_mask=mask)
        self.mask[..., 600:] = True
        return first + attend(q, k, v, attn_mask=mask)


class CacheWrittenBetween(torch.nn.Module):
    """The cache changes but the mask does not, so there is one map."""

    maps = 1

    def __init__(self):
        super().__init__()
        self.register_buffer("cache", torch.randn(1, 4, 640, 16, generator=torch.Generator().manual_seed(3)))

    def forward(self, q, k, v):
        mask = (torch.arange(640) < 77).expand(5, 640)
        first = attend(q, self.cache, v, attn_mask=mask)
        self.cache[:, :, 5:9] = k[:, :, :4]
        return first + attend(q, self.cache, v, attn_mask=mask)


@pytest.mark.parametrize("module", [MaskWrittenThroughAView, MaskBufferBehindAnExpand, CacheWrittenBetween])
@pytest.mark.parametrize("decompose", [False, True])
def test_maps_follow_their_mask(module, decompose):
    args = qkv(5, 640)
    program = exported(module(), args)
    if decompose:
        program = program.run_decompositions({})
    new, report = replace_sdpa(program)
    assert len(report.replaced) == 2
    assert len(calls(new, "_map.")) == module.maps
    assert check_maps(new, args) == 2
    out, expected = fresh_module(new)(*args), fresh_module(program)(*args)
    assert_same_attention(out, expected)


def repeat_kv(t):
    return t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(1, 4, *t.shape[2:])


class CacheWrittenAfterTheRepeat(torch.nn.Module):
    grouped = False

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        for name in ("k", "v"):
            self.register_buffer(name, torch.randn(1, 2, 64, 16, generator=generator))

    def forward(self, q, new):
        k, v = repeat_kv(self.k), repeat_kv(self.v)
        self.k.index_copy_(2, torch.arange(5), new)
        self.v.index_copy_(2, torch.arange(5), new)
        return attend(q, k, v)


class CacheWrittenBeforeTheRepeat(CacheWrittenAfterTheRepeat):
    grouped = True

    def forward(self, q, new):
        self.k.index_copy_(2, torch.arange(5), new)
        self.v.index_copy_(2, torch.arange(5), new)
        return attend(q, repeat_kv(self.k), repeat_kv(self.v))


class RepeatWritten(CacheWrittenAfterTheRepeat):
    def forward(self, q, new):
        k, v = self.k.repeat_interleave(2, 1), self.v.repeat_interleave(2, 1)
        v[:, 1].zero_()
        return attend(q, k, v) + new.sum()


@pytest.mark.parametrize("module", [CacheWrittenAfterTheRepeat, CacheWrittenBeforeTheRepeat, RepeatWritten])
def test_grouped_heads_are_recovered_only_from_a_live_copy(module):
    args = (torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16))
    program = exported(module(), args)
    new, report = replace_sdpa(program)
    assert report.nodes[0].key[1] == (2 if module.grouped else 4)
    out, expected = fresh_module(new)(*args), fresh_module(program)(*args)
    assert_same_attention(out, expected)
