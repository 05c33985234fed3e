"""One method of dynamic length over KV caches, as exported models write it: short and long calls in one program."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.export import Dim, ExportedProgram, export

HEADS, HEADS_KV, HEAD_DIM, KEYS = 4, 2, 64, 768
WIDTH = HEADS * HEAD_DIM
LONGEST = 512


class DynamicAttention(torch.nn.Module):
    """``forward(x [1, T, WIDTH], input_pos [T])``: layers over caches ``[1, KEYS, H_kv, D]`` with two masks.

    Even layers have a causal mask, which is proven. The mask of odd layers has holes and stays a tensor. Eager PyTorch
    and Inductor lay out the rotated queries in different ways.
    """

    def __init__(self, layers: int = 2, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = layers
        for i in range(layers):
            weight = torch.randn((HEADS + 2 * HEADS_KV) * HEAD_DIM, WIDTH, generator=generator) / WIDTH**0.5
            self.register_parameter(f"qkv{i}", torch.nn.Parameter(weight.to(dtype), requires_grad=False))
            for name in ("k", "v"):
                self.register_buffer(f"{name}{i}", torch.zeros(1, KEYS, HEADS_KV, HEAD_DIM, dtype=dtype))

    def forward(self, x, input_pos):
        length = x.shape[1]
        causal = (torch.arange(KEYS)[None] <= input_pos[:, None])[None, None]
        holes = (torch.arange(KEYS)[None] + input_pos[:, None]) % 61 == 5
        masks = (causal, causal & ~holes)
        angle = (input_pos.float() / KEYS)[None, None, :, None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for i in range(self.layers):
            k_cache, v_cache = getattr(self, f"k{i}"), getattr(self, f"v{i}")
            qkv = F.linear(x, getattr(self, f"qkv{i}")).view(1, length, -1, HEAD_DIM)
            q, k, v = qkv.split([HEADS, HEADS_KV, HEADS_KV], 2)
            k_cache.index_copy_(1, input_pos, k)
            v_cache.index_copy_(1, input_pos, v)
            q = q.transpose(1, 2)
            q = torch.cat([-q[..., HEAD_DIM // 2 :], q[..., : HEAD_DIM // 2]], -1) * sin + q * cos
            keys, values = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
            expanded = masks[i % 2].expand(1, HEADS, -1, -1)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=expanded, enable_gqa=True)
            x = out.transpose(1, 2).reshape(1, length, WIDTH)
        return x


def dynamic_program(**options) -> ExportedProgram:
    """A :class:`DynamicAttention` exported for 1 to :data:`LONGEST` rows."""
    length = Dim("length", min=1, max=LONGEST)
    dtype = options.get("dtype", torch.bfloat16)
    example = (torch.randn(1, 8, WIDTH, dtype=dtype), torch.arange(8))
    return export(DynamicAttention(**options).eval(), example, dynamic_shapes=({1: length}, {0: length}))
