"""Small programs that exercise what lowering must get right, and one lowering that many tests inspect."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from host_code import compiled_host_code
from torch.library import triton_op, wrap_triton

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]

HEADS, HEAD_DIM, KEYS = 4, 64, 256
HIDDEN = HEADS * HEAD_DIM


@triton.jit
def _row_sums_kernel(x_ptr, mask_ptr, out_ptr, LENGTH, stride_h, stride_l, stride_m, D: tl.constexpr):
    head, row = tl.program_id(0), tl.program_id(1)
    x = tl.load(x_ptr + head * stride_h + row * stride_l + tl.arange(0, D))  # [D]
    keep = tl.load(mask_ptr + head * stride_m + row)
    tl.store(out_ptr + head * LENGTH + row, tl.where(keep, tl.sum(x.to(tl.float32)), 0.0))


@triton_op("flashpte_test::row_sums", mutates_args=())
def row_sums(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sums each row of ``x`` [1, H, L, D] that ``mask`` [1, H, 1, L] keeps, for any strides; returns [1, H, L]."""
    heads, length, head_dim = x.shape[1:]
    out = torch.empty(1, heads, length, dtype=torch.float32, device=x.device)
    strides = (x.stride(1), x.stride(2), mask.stride(1))
    wrap_triton(_row_sums_kernel)[(heads, length)](x, mask, out, length, *strides, D=head_dim)
    return out


@row_sums.register_kernel("cpu")
def _(x, mask):
    return torch.where(mask[:, :, 0], x.float().sum(-1), 0.0)


@row_sums.register_fake
def _(x, mask):
    return x.new_empty((1, x.shape[1], x.shape[2]), dtype=torch.float32)


class Attention(torch.nn.Module):
    """One attention layer with a KV cache [B, L, H, D], in the form of a language model's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        kwargs = {"bias": False, "dtype": torch.bfloat16}
        self.qkv = torch.nn.Linear(HIDDEN, 3 * HIDDEN, **kwargs)
        self.out = torch.nn.Linear(HIDDEN, HIDDEN, **kwargs)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(1, KEYS, HEADS, HEAD_DIM, dtype=torch.bfloat16))
        # An odd buffer: a view with an offset into a larger storage and gaps in its memory.
        self.register_buffer("offsets", torch.arange(2 * HIDDEN + 1, dtype=torch.float32)[1::2])

    def forward(self, x, input_pos):
        q, k, v = self.qkv(x).view(1, -1, 3, HEADS, HEAD_DIM).unbind(2)
        self.k_cache.index_copy_(1, input_pos, k)
        self.v_cache.index_copy_(1, input_pos, v)
        mask = (torch.arange(KEYS) <= input_pos[:, None])[None, None]
        attended = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), self.k_cache.transpose(1, 2), self.v_cache.transpose(1, 2), attn_mask=mask
        )
        hidden = attended.transpose(1, 2).reshape(1, -1, HIDDEN)
        return self.out(hidden).float() + self.offsets


def attention_programs():
    """Methods ``prefill`` (2 to 64 rows) and ``decode`` of one :class:`Attention`."""
    model = Attention().eval()

    def export(rows, dynamic_shapes):
        example = (torch.randn(1, rows, HIDDEN, dtype=torch.bfloat16), torch.arange(rows))
        return torch.export.export(model, example, dynamic_shapes=dynamic_shapes)

    rows = torch.export.Dim("rows", min=2, max=64)
    return {"prefill": export(8, ({1: rows}, {0: rows})), "decode": export(1, None)}


@pytest.fixture(scope="session")
def programs():
    return attention_programs()


@pytest.fixture(scope="session")
def lowered(programs, tmp_path_factory):
    """The two methods in one ``.pte`` for sm_90."""
    from flashpte.export.lowering import lower
    from flashpte.passes import replace_sdpa

    folder = tmp_path_factory.mktemp("lowered")
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text("{}")
    with compiled_host_code():
        return lower(
            {name: replace_sdpa(program)[0] for name, program in programs.items()},
            output_dir=folder / "out",
            arch="sm_90",
            constant_methods={"get_max_seq_len": KEYS, "use_kv_cache": True},
            manifest={"target": "test"},
            extra_files=[tokenizer],
        )


@pytest.fixture(scope="session")
def contents(lowered):
    from flashpte.export.lowering import inspect_pte

    return inspect_pte(lowered.model)


@pytest.fixture
def cxx(tmp_path, monkeypatch):
    """Sets CXX to two words; the first is a program that runs the rest and leaves a mark."""
    from flashpte.export.lowering.cross_compile.toolchain import find_compiler

    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/calls\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"{wrapper} g++")
    find_compiler.cache_clear()
    yield wrapper
    find_compiler.cache_clear()
