"""Device functions that read packed weights (:mod:`flashpte.kernels.linear.format`).

Shape legend: ``N`` rows of the weight of one program, ``M`` rows of x. A plane is 32 columns of a tile of 128.
"""

import triton
import triton.language as tl


@triton.jit
def offsets_of_rows(row, column_tiles, scale_tiles, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """Where rows ``row [N]`` begin, in elements: their words, and their scales. Both int64 ``[N]``.

    ``column_tiles`` are the tiles of a row, and ``scale_tiles`` those that have scales of their own.
    """
    WIDTH: tl.constexpr = 32 if BITS == 4 else 128
    tile = (row // 16).to(tl.int64)
    words = tile * column_tiles * (16 * WIDTH) + row % 16 * WIDTH
    scales = tile * scale_tiles * (16 * GROUPS) + (row % 8 * 2 + row // 8 % 2) * GROUPS
    return words, scales


@triton.jit
def centered_codes(words, PLANE: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Codes minus ``2 ** (BITS - 1)``, exact in ``dtype``.

    With 4 bits, the nibbles ``PLANE`` of int16 words. With 8 bits, the int8 words themselves. 16-bit dtypes of 4 bits
    need no conversion from integers: the nibble becomes the lowest bits of a number whose last bit counts 1.
    """
    if BITS == 8:
        codes = words.to(dtype)
    else:
        nibbles = (words >> (4 * PLANE)) & 15
        if dtype == tl.bfloat16:
            codes = (nibbles | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0  # 128 + q
        elif dtype == tl.float16:
            codes = (nibbles | 0x6400).to(tl.float16, bitcast=True) - 1032.0  # 1024 + q
        else:
            codes = nibbles.to(dtype) - 8.0
    return codes
