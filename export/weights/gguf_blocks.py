"""Reads the blocks of GGUF's quantized types as codes, scales and offsets, without changing what they stand for.

A tensor ``[N, K]`` is stored row by row in blocks of 32 or, for K-quants, 256 columns. The layouts are those of
llama.cpp (``ggml-common.h``), which ``gguf.dequantize`` also reads:

========  ==============================================  ==========================================
type      a weight                                        read as
========  ==============================================  ==========================================
Q4_0      ``d (q - 8)``, 32 columns share ``d``           4 bits, float16 scales
Q4_1      ``d q + m``                                     4 bits, float16 scales and offsets
Q5_0      ``d (q - 16)``                                  8 bits, float16 scales
Q5_1      ``d q + m``                                     8 bits, float16 scales and offsets
Q8_0      ``d q``, ``q`` signed                           8 bits, float16 scales
Q4_K      ``(d s) q - d' m``, 32 columns share s and m    4 bits, float32 scales and offsets
Q5_K      the same with 5 bits                            8 bits, float32 scales and offsets
========  ==============================================  ==========================================

``d s`` is a float16 number times 6 bits. It has up to 17 significant bits, so float16 scales would not be exact.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from flashpte.kernels.linear.format import Groupwise

Blocks = np.ndarray  # uint8 [N, blocks of a row, bytes of a block]


def _halves(blocks: Blocks, at: int) -> torch.Tensor:
    """The float16 number at byte ``at`` of each block: ``[N, B]``."""
    return torch.from_numpy(np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0])


def _nibbles(quants: np.ndarray) -> np.ndarray:
    """The low nibbles of the last axis, then the high ones."""
    return np.concatenate((quants & 15, quants >> 4), -1)


def _fifth_bits(high: np.ndarray) -> np.ndarray:
    """Bit ``k`` of four bytes, as 0 or 16, for the 32 columns ``k`` of a block."""
    return np.unpackbits(high, axis=-1, bitorder="little") << 4


def _rows(codes: np.ndarray) -> torch.Tensor:
    """Codes ``[N, ...]`` as uint8 ``[N, K]``."""
    return torch.from_numpy(codes.reshape(codes.shape[0], -1))


def _q4_0(blocks: Blocks) -> Groupwise:
    return Groupwise(_rows(_nibbles(blocks[..., 2:])), _halves(blocks, 0))


def _q4_1(blocks: Blocks) -> Groupwise:
    return Groupwise(_rows(_nibbles(blocks[..., 4:])), _halves(blocks, 0), offsets=_halves(blocks, 2))


def _q5_0(blocks: Blocks) -> Groupwise:
    codes = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return Groupwise(_rows(codes + np.uint8(128 - 16)), _halves(blocks, 0))


def _q5_1(blocks: Blocks) -> Groupwise:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return Groupwise(_rows(codes), _halves(blocks, 0), offsets=_halves(blocks, 2))


def _q8_0(blocks: Blocks) -> Groupwise:
    return Groupwise(_rows(blocks[..., 2:] ^ 128), _halves(blocks, 0))


def _q4_k(blocks: Blocks) -> Groupwise:
    # Four times 32 bytes, each with the low nibbles of one group and the high nibbles of the next.
    codes = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32))
    return Groupwise(_rows(codes), *_k_scales(blocks))


def _q5_k(blocks: Blocks) -> Groupwise:
    low = _nibbles(blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32)).reshape(*blocks.shape[:2], 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    high = blocks[..., None, 16:48] >> shifts & 1  # [N, B, 8, 32], bit g is that of group g
    return Groupwise(_rows(low | high << 4), *_k_scales(blocks))


def _k_scales(blocks: Blocks) -> tuple[torch.Tensor, None, torch.Tensor]:
    """Float32 scales and offsets ``[N, groups of 32]`` of K-quants, with no zero points between them.

    Eight scales and eight minima of 6 bits are in 12 bytes: their low bits, the scales first, in bytes 0 to 7 for the
    first four, and in the nibbles of bytes 8 to 11 for the others, whose two highest bits are on top of bytes 0 to 7.
    """
    packed = blocks[..., 4:16]
    low, nibbles = packed[..., :8], packed[..., 8:]
    others = np.concatenate((nibbles & 15, nibbles >> 4), -1) | low >> 6 << 4
    scales, minima = (np.concatenate((low[..., at] & 63, others[..., at]), -1) for at in (slice(4), slice(4, 8)))

    def times(number: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
        return (number.float()[..., None] * torch.from_numpy(factors).float()).flatten(1)

    return times(_halves(blocks, 0), scales), None, -times(_halves(blocks, 2), minima)


_READERS: dict[str, tuple[str, Callable[[Blocks], Groupwise]]] = {
    "Q4_0": ("int4-g32-f16", _q4_0),
    "Q4_1": ("int4-g32-o-f16", _q4_1),
    "Q5_0": ("int8-g32-f16", _q5_0),
    "Q5_1": ("int8-g32-o-f16", _q5_1),
    "Q8_0": ("int8-g32-f16", _q8_0),
    "Q4_K": ("int4-g32-o-f32", _q4_k),
    "Q5_K": ("int8-g32-o-f32", _q5_k),
}

EXACT = {name: format for name, (format, _) in _READERS.items()}
"""The format of each type whose blocks can be read exactly, by the type's name."""


def read_blocks(data: np.ndarray, type_name: str, block_bytes: int) -> Groupwise:
    """Reads a tensor of one of the types in :data:`EXACT`.

    Args:
        data: uint8 ``[N, bytes of a row]``.
        type_name: the type.
        block_bytes: bytes of a block.
    """
    return _READERS[type_name][1](data.reshape(data.shape[0], -1, block_bytes))
