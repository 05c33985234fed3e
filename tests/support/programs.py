"""Small exported modules around attention, which the pass tests rewrite."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch.export import Dim, ExportedProgram, export

from flashpte.kernels.tuning import tiled_map_block


class Attention(torch.nn.Module):
    """``forward(q, k, v, mask)`` calls SDPA with fixed options and returns the result as models do."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v, mask=None):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
        batch, heads, length, dim = out.shape
        return out.transpose(1, 2).reshape(batch, length, heads * dim)


class CachedLayers(torch.nn.Module):
    """``layers`` attention layers over caches ``[1, H_kv, L, D]``; each layer expands the same mask."""

    def __init__(self, layers: int = 3, length: int = 64, heads: int = 4, heads_kv: int = 2, dim: int = 16):
        super().__init__()
        self.layers, self.heads, self.heads_kv, self.dim, self.length = layers, heads, heads_kv, dim, length
        generator = torch.Generator().manual_seed(0)
        for name in ("k", "v"):
            for i in range(layers):
                self.register_buffer(f"{name}{i}", torch.randn(1, heads_kv, length, dim, generator=generator))

    def forward(self, x, pos):
        length = x.shape[1]
        mask = (torch.arange(self.length)[None] <= pos[:, None])[None, None]
        for i in range(self.layers):
            k_cache, v_cache = getattr(self, f"k{i}"), getattr(self, f"v{i}")
            q = x.view(1, length, self.heads, self.dim).transpose(1, 2)
            new = q[:, : self.heads_kv]
            k_cache.index_copy_(2, pos, new)
            v_cache.index_copy_(2, pos, new * 2)
            expanded = mask.expand(1, self.heads, -1, -1)
            out = F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=expanded, enable_gqa=True)
            # This view works only on [B, L_q, H, D] memory.
            x = out.transpose(1, 2).view(1, length, self.heads * self.dim)
        return x


def qkv(
    q_len: int = 1, kv_len: int = 64, heads: int = 4, heads_kv: int = 4, dim: int = 16, batch: int = 1, seed: int = 0
):
    """Random float32 ``(query, key, value)``."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, q_len, dim, generator=generator)
    key, value = (torch.randn(batch, heads_kv, kv_len, dim, generator=generator) for _ in range(2))
    return query, key, value


def exported(module: torch.nn.Module, args: tuple, dynamic_shapes=None) -> ExportedProgram:
    """Exports a module for inference."""
    with torch.no_grad():
        return export(module.eval(), args, dynamic_shapes=dynamic_shapes)


@functools.lru_cache(maxsize=4)
def _module_of(program: ExportedProgram) -> tuple[torch.fx.GraphModule, list[torch.Tensor]]:
    module = copy.deepcopy(program.module())
    return module, [buffer.clone() for buffer in module.buffers()]


def fresh_module(program: ExportedProgram) -> torch.fx.GraphModule:
    """A program's module with the program's own buffers. The next call with the same program returns it again, reset.

    ``program.module()`` makes and compiles a new graph each time, which takes longer than running a small one.
    """
    module, buffers = _module_of(program)
    with torch.no_grad():
        for buffer, value in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(value)
    return module


def cached_program(q_len: int, dynamic: tuple[int, int] | None = None, **options) -> tuple[ExportedProgram, tuple]:
    """An exported :class:`CachedLayers` and example inputs; ``dynamic`` is the range of a dynamic L_q."""
    module = CachedLayers(**options)
    width = module.heads * module.dim
    args = (torch.randn(1, q_len, width, generator=torch.Generator().manual_seed(1)), torch.arange(q_len))
    shapes = None
    if dynamic:
        length = Dim("length", min=dynamic[0], max=dynamic[1])
        shapes = ({1: length}, {0: length})
    return exported(module, args, shapes), args


def mask_tensors(program: ExportedProgram, rows, keys: int) -> list[torch.fx.Node]:
    """Nodes of a program whose result has the size of a mask: ``rows`` by ``keys`` in its last two dimensions."""
    found = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() >= 2 and value.dtype != torch.float32:
            found += [node] if [str(s) for s in value.shape[-2:]] == [str(rows), str(keys)] else []
    return found


def calls(program: ExportedProgram, name: str) -> list[torch.fx.Node]:
    """Nodes that call an operator whose name contains ``name``."""
    return [n for n in program.graph.nodes if n.op == "call_function" and name in str(n.target)]


class _MapChecker(torch.fx.Interpreter):
    """Runs a rewritten program and compares the tile map of every attention with the map of its current mask."""

    def __init__(self, module: torch.fx.GraphModule):
        super().__init__(module)
        self.checked = 0

    def call_function(self, target, args, kwargs):
        name = str(target)
        if "flashpte.sdpa_" in name and args[4] is not None:
            query, _, value = args[:3]
            tiled = (*tiled_map_block(query.shape[3], value.shape[3]), None)
            split = (16, 64, 1)
            self._check_map(args, args[4:6], split if "decode" in name or "verify" in name else tiled)
            if "dispatch" in name and len(args) > 11:
                self._check_map(args, args[11:13], split)
        return super().call_function(target, args, kwargs)

    def _check_map(self, args, made, tile):
        query, key, _, mask = args[:4]
        if mask is None:
            expected = torch.ops.flashpte.interval_map(args[9], args[10], key.shape[2], *tile)
        else:
            group = query.shape[1] // key.shape[1] if tile[2] == 1 else 1
            sizes = (query.shape[2], key.shape[2], *tile[:2], group, tile[2])
            expected = torch.ops.flashpte.tile_map(mask, *sizes)
        for tensor, wanted in zip(made, expected, strict=True):
            assert torch.equal(tensor, wanted)
        self.checked += 1


def check_maps(program: ExportedProgram, args: tuple) -> int:
    """Asserts that every attention of a rewritten program gets the map of its mask; returns the number of maps.

    On a CPU the operators ignore the maps, so results would not show a wrong one.
    """
    checker = _MapChecker(fresh_module(program))
    with torch.no_grad():
        checker.run(*args)
    return checker.checked


def assert_same_attention(actual, expected, **given):
    """Asserts that two float32 results of the same attention differ by rounding alone.

    They add the same products in other orders, and each processor has an order of its own. So the bound is not a few
    ulps of an entry, but a part of the largest one: 1e-5, which one key more or less passes a hundredfold.

    Args:
        actual, expected: tensors of one shape, or tuples of them; NaN is never equal.
        given: other arguments of :func:`torch.testing.assert_close`, which may have other tolerances.
    """
    if isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same_attention(one, other, **given)
        return
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, **{"atol": 1e-5 * largest, "rtol": 1e-5, **given})
