"""The replace pass in your own export script: your module, your masks, one call.

    python examples/own_model_to_pte.py OUTPUT_DIR

Needs no GPU. The module below does not depend on flashpte: it calls scaled_dot_product_attention with a dense mask over
its whole cache, as exported models do.
"""

import sys

import torch
import torch.nn.functional as F

from flashpte.export.lowering import lower
from flashpte.passes import format_table, replace_sdpa

CACHE_LEN, HEADS, HEADS_KV, HEAD_DIM = 1024, 8, 2, 64
WIDTH = HEADS * HEAD_DIM


class TinyAttention(torch.nn.Module):
    """One attention layer with a KV cache [1, H_kv, CACHE_LEN, D]."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, (HEADS + 2 * HEADS_KV) * HEAD_DIM, bias=False)
        self.out = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(1, HEADS_KV, CACHE_LEN, HEAD_DIM))

    def forward(self, x, input_pos):
        """Takes x [1, T, WIDTH], input_pos int64 [T], returns [1, T, WIDTH]."""
        length = x.shape[1]
        heads = self.qkv(x).view(1, length, HEADS + 2 * HEADS_KV, HEAD_DIM).transpose(1, 2)
        self.k_cache.index_copy_(2, input_pos, heads[:, HEADS : HEADS + HEADS_KV])
        self.v_cache.index_copy_(2, input_pos, heads[:, HEADS + HEADS_KV :])
        mask = (torch.arange(CACHE_LEN) <= input_pos[:, None])[None, None]
        y = F.scaled_dot_product_attention(
            heads[:, :HEADS], self.k_cache, self.v_cache, attn_mask=mask, enable_gqa=True
        )
        return self.out(y.transpose(1, 2).reshape(1, length, WIDTH))


def main(output_dir: str) -> None:
    torch.manual_seed(0)
    model = TinyAttention().to(torch.bfloat16).eval().requires_grad_(False)
    tokens = torch.export.Dim("tokens", min=2, max=CACHE_LEN)

    def example(length):
        return torch.randn(1, length, WIDTH, dtype=torch.bfloat16), torch.arange(length)

    programs = {
        "decode": torch.export.export(model, example(1)),
        "prefill": torch.export.export(model, example(8), dynamic_shapes=({1: tokens}, {0: tokens})),
    }

    reports = {}
    for name, program in programs.items():
        programs[name], reports[name] = replace_sdpa(program)
    print(format_table(reports))

    # Lower both methods in one call, so that they share one KV cache in the .pte.
    lowered = lower(programs, output_dir=output_dir, arch="sm_90")
    print(f"{', '.join(lowered.methods)} for {lowered.arch} in {output_dir}")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["own-model-output"])
