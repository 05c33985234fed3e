"""Products of packed words of codes with few rows of x, in registers: PTX, written once for each kind of tile.

A lane has columns ``8 l`` to ``8 l + 7`` of each plane of rows ``g`` and ``g + 8`` of a tile: 16 bytes of a row with 4
bits, and 8 bytes of each plane with 8. Once unpacked, they are its own registers of the operands of eight
``mma.m16n8k16``, two for each plane. The order of columns within an operand is then not the natural one, but x is read
in the same order. So unpacked codes never pass through shared memory.

A tile's arithmetic is one piece of inline PTX (:func:`_tile_code`), applied to tensors that hold one value per lane.
Everything around it renames registers.

Shape legend: ``KW`` column warps, ``T`` tiles of 16 rows of the weight, ``M`` rows of x (8 or 16). Lane ``4 g + l`` has
rows ``g`` and ``g + 8`` of a tile.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _magic(dtype: str) -> int:
    """Two numbers whose last bit counts 1: bfloat16 ``0x4300 | q`` is 128 + q, float16 ``0x6400 | q`` is 1,024 + q."""
    return (0x4300 if dtype == "bf16" else 0x6400) * 0x10001


@gluon.constexpr_function
def _quad(numbers: list[str]) -> str:
    return "{" + ", ".join(numbers) + "}"


@gluon.constexpr_function
def _product(dtype: str, d: list[str], a: list[str], b: list[str], c: list[str]) -> str:
    """One ``d = a @ b + c`` of 16 rows of the weight, 16 columns and 8 rows of x."""
    return f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {_quad(d)}, {_quad(a)}, {_quad(b)}, {_quad(c)};"


@gluon.constexpr_function
def _as_float(dtype: str, low: str, high: str, word: str) -> list[str]:
    """The two values of a word of scales, as float32."""
    if dtype == "bf16":
        return [f"shl.b32 {low}, {word}, 16;", f"and.b32 {high}, {word}, 0xFFFF0000;"]
    return [f"mov.b32 {{h0, h1}}, {word};", f"cvt.f32.f16 {low}, h0;", f"cvt.f32.f16 {high}, h1;"]


@gluon.constexpr_function
def _unpack4(dtype: str, a: str, word: str, plane: int, zero: str) -> list[str]:
    """``a``: the nibbles ``plane`` of a word of two columns, minus the zero point, a register of :func:`_magic`."""
    shifted = [f"shr.u32 u, {word}, {4 * plane};"] if plane else []
    nibbles = f"lop3.b32 {a}, {'u' if plane else word}, 0x000F000F, {_magic(dtype):#x}, 0xEA;"
    return [*shifted, nibbles, f"sub.rn.{dtype}x2 {a}, {a}, {zero};"]


@gluon.constexpr_function
def _unpack8(dtype: str, a: str, word: str, high: bool) -> list[str]:
    """``a``: two signed bytes of a word of four columns, the last two if ``high``.

    bfloat16 holds 7 bits after its first one. A byte ``b`` is ``b & 127`` minus 128 if its highest bit is set. So it is
    ``0x4300 | b & 127``, which is 128 + (b & 127), minus ``0x4300 | b & 128``, which is 128 or 256. In float16,
    ``0x6400 | b ^ 128`` is 1,152 + b.
    """
    first = "0x43434343" if dtype == "bf16" else "0x64646464"
    pair = f"prmt.b32 {a}, {word}, {first}, {0x4342 if high else 0x4140:#x};"
    if dtype == "bf16":
        return [
            pair,
            f"and.b32 u, {a}, 0xFF80FF80;",
            f"and.b32 {a}, {a}, 0xFF7FFF7F;",
            f"sub.rn.bf16x2 {a}, {a}, u;",
        ]
    return [pair, f"xor.b32 {a}, {a}, 0x00800080;", f"sub.rn.f16x2 {a}, {a}, c;"]


@gluon.constexpr_function
def _tile_code(dtype: str, scales: str, groups: int, eighths: int, zeros: bool, bits: int) -> tuple[str, str]:
    """PTX and constraints of a tile's products.

    Outputs: ``4 * eighths`` sums, by eighth of x's rows and register. Inputs: the sums so far; ``2 * bits`` words of
    codes (row ``g``, then row ``g + 8``, with 8 bits by plane); words of x by plane, eighth and word; words of scales;
    words of zero points.
    """
    outs = 4 * eighths
    at = outs
    sums = [f"${at + i}" for i in range(outs)]
    at += outs
    words = [[f"${at + bits * half + i}" for i in range(bits)] for half in range(2)]
    at += 2 * bits
    x = [[[f"${at + (p * eighths + e) * 4 + i}" for i in range(4)] for e in range(eighths)] for p in range(4)]
    at += 16 * eighths
    count = groups  # words of the scales of rows g and g + 8
    scale_words = [f"${at + i}" for i in range(count)]
    at += count
    zero_words = [f"${at + i}" for i in range(count if zeros else 0)]
    pair = _magic(dtype)
    center = 0x64806480 if bits == 8 else pair + 8 * 0x10001
    text = [
        "{",
        ".reg .b32 t, u; .reg .b16 h0, h1; .reg .f32 o;",
        f".reg .b32 a<4>; .reg .f32 d<{outs}>; .reg .f32 s<8>; .reg .b32 z<8>; .reg .f32 y<{outs}>;",
        f".reg .b32 c; mov.b32 c, {center:#x}; mov.f32 o, 0f00000000;",
    ]
    # Registers s and z: group j of row g is j, of row g + 8 it is 4 + j.
    if groups == 1:
        text += _as_float(scales, "s0", "s4", scale_words[0])
    else:
        for half in range(2):
            for i in range(count // 2):
                text += _as_float(
                    scales, f"s{4 * half + 2 * i}", f"s{4 * half + 2 * i + 1}", scale_words[half * count // 2 + i]
                )
    if zeros:
        for number in range(2 * groups):
            half, group = divmod(number, groups)
            word = zero_words[0] if groups == 1 else zero_words[half * count // 2 + group // 2]
            high = half if groups == 1 else group % 2
            text.append(f"prmt.b32 z{4 * half + group}, {word}, 0, {0x3232 if high else 0x1010:#x};")
            text.append(f"or.b32 z{4 * half + group}, z{4 * half + group}, {pair:#x};")
    per_group = 4 // groups
    for plane in range(4):
        group = plane // per_group
        for c in range(2):
            for r in range(4):  # row g, row g + 8, row g of the next columns, row g + 8 of the next columns
                if bits == 8:
                    text += _unpack8(dtype, f"a{r}", words[r % 2][2 * plane + c], r >= 2)
                else:
                    zero = f"z{4 * (r % 2) + group}" if zeros else "c"
                    text += _unpack4(dtype, f"a{r}", words[r % 2][2 * c + r // 2], plane, zero)
            for e in range(eighths):
                d = [f"d{4 * e + r}" for r in range(4)]
                start = ["o"] * 4 if c == 0 and plane % per_group == 0 else d
                b = [x[plane][e][2 * c], x[plane][e][2 * c + 1]]
                text.append(_product(dtype, d, [f"a{r}" for r in range(4)], b, start))
        if plane % per_group == per_group - 1:
            for i in range(outs):
                scale = f"s{(4 if i % 4 >= 2 else 0) + group}"
                into = f"${i}" if plane == 3 else f"y{i}"
                so_far = sums[i] if group == 0 else f"y{i}"
                text.append(f"fma.rn.f32 {into}, {scale}, d{i}, {so_far};")
    kinds = ["=&f"] * outs + ["f"] * outs + ["r"] * (2 * bits + 16 * eighths + count + len(zero_words))
    return "\n".join([*text, "}"]), ",".join(kinds)


@gluon.constexpr_function
def _name(dtype) -> str:
    return "bf16" if dtype == gl.bfloat16 else "f16"


@gluon.constexpr_function
def _floats(count):
    return (gl.float32,) * count


@gluon.constexpr_function
def _tile_asm(dtype, scales, groups, eighths, zeros, bits):
    return _tile_code(_name(dtype), _name(scales), groups, eighths, zeros, bits)


@gluon.constexpr_function
def copied_words(bits, column_warps, row_warps):
    """The layout of packed words ``[KW, T, half, g, word]`` for copies of 16 bytes."""
    each, lanes = ([1, 1, 2, 1, 4], [1, 1, 1, 8, 4]) if bits == 4 else ([1, 1, 2, 2, 4], [1, 1, 1, 4, 8])
    return gl.BlockedLayout(each, lanes, [column_warps, row_warps, 1, 1, 1], [4, 3, 2, 1, 0])


@gluon.constexpr_function
def held_words(bits, column_warps, row_warps):
    """The layout of packed words ``[KW, T, half, g, word]`` in which each lane holds its own."""
    each = [1, 1, 2, 1, 4 if bits == 4 else 2]
    return gl.BlockedLayout(each, [1, 1, 1, 8, 4], [column_warps, row_warps, 1, 1, 1], [4, 3, 2, 1, 0])


@gluon.constexpr_function
def words_in_memory(bits):
    """The shared memory of packed words ``[KW, T, half, g, word]``.

    A row of 8 bits fills all banks, and a lane reads 8 bytes of it at a time. So the planes of 4 rows, which are read
    together, are in different banks.
    """
    vector, phases = (1, 1) if bits == 4 else (8, 4)
    return gl.SwizzledSharedLayout(vector, 1, phases, [4, 3, 2, 1, 0])


@gluon.constexpr_function
def lane_layout(column_warps, row_warps):
    """The layout of tensors ``[KW, T, 8, 4]`` with one value per lane and tile."""
    return gl.BlockedLayout([1, 1, 1, 1], [1, 1, 8, 4], [column_warps, row_warps, 1, 1], [3, 2, 1, 0])


@gluon.jit
def _parts(values, LANES: gl.constexpr):
    """The values ``[KW, T, 8, L, count]`` of each lane as ``count`` tensors ``[KW, T, 8, L]``, in order."""
    COUNT: gl.constexpr = values.shape[4]
    KW: gl.constexpr = values.shape[0]
    T: gl.constexpr = values.shape[1]
    L: gl.constexpr = values.shape[3]
    if COUNT == 1:
        return (gl.convert_layout(gl.reshape(values, [KW, T, 8, L]), LANES),)
    else:
        pairs = gl.reshape(values, [KW, T, 8, L, 2, COUNT // 2])
        low, high = gl.split(gl.permute(pairs, [0, 1, 2, 3, 5, 4]))
        return _parts(low, LANES) + _parts(high, LANES)


@gluon.jit
def words_of_lanes(words, LANES: gl.constexpr):
    """Packed words ``[KW, T, half, g, word]`` as 8 tensors, by half and word.

    With 8 bits, there are 16 tensors, by half, plane and word.
    """
    KW: gl.constexpr = words.shape[0]
    T: gl.constexpr = words.shape[1]
    if words.shape[4] == 16:
        words = gl.permute(gl.reshape(words, [KW, T, 2, 8, 4, 4]), [0, 1, 3, 4, 2, 5])
        return _parts(gl.reshape(words, [KW, T, 8, 4, 8]), LANES)
    else:
        words = gl.permute(gl.reshape(words, [KW, T, 2, 8, 4, 4, 2]), [0, 1, 3, 5, 2, 4, 6])
        return _parts(gl.reshape(words, [KW, T, 8, 4, 16]), LANES)


@gluon.jit
def x_of_lanes(x, LANES: gl.constexpr):
    """Pairs of columns ``[KW, 1, m, 16 plane + pair]`` as tensors ``[KW, 1, 8, 4]``, by plane, eighth and word."""
    KW: gl.constexpr = x.shape[0]
    EIGHTHS: gl.constexpr = x.shape[2] // 8
    x = gl.permute(gl.reshape(x, [KW, 1, EIGHTHS, 8, 4, 4, 4]), [0, 1, 3, 5, 4, 2, 6])
    return _parts(gl.reshape(x, [KW, 1, 8, 4, 16 * EIGHTHS]), LANES)


@gluon.jit
def groups_of_lanes(values, LANES: gl.constexpr):
    """Words of scales or zero points ``[KW, T, g, count]`` as ``count`` tensors ``[KW, T, 8, 1]``."""
    KW: gl.constexpr = values.shape[0]
    T: gl.constexpr = values.shape[1]
    return _parts(gl.reshape(values, [KW, T, 8, 1, values.shape[3]]), LANES)


@gluon.jit
def zero_sums(KW: gl.constexpr, T: gl.constexpr, EIGHTHS: gl.constexpr, LANES: gl.constexpr):
    """Sums of no products: ``4 * EIGHTHS`` tensors ``[KW, T, 8, 4]``."""
    zero = gl.zeros([KW, T, 8, 4], gl.float32, LANES)
    if EIGHTHS == 1:
        return zero, zero, zero, zero
    else:
        return zero, zero, zero, zero, zero, zero, zero, zero


@gluon.jit
def multiply_tile(sums, words, x, scales, zeros, DTYPE: gl.constexpr, SCALES: gl.constexpr):
    """``sums += scale * (q - zero) x`` over a tile of 128 columns for each of KW warps.

    The sum of a group is scaled in float32.

    Args:
        sums: float32, as :func:`zero_sums` makes them.
        words: result of :func:`words_of_lanes`.
        x: result of :func:`x_of_lanes`.
        scales: result of :func:`groups_of_lanes`: words of two scales each.
        zeros: whole zero points in 16 bits, like ``scales``; an empty tuple if codes are symmetric.
        DTYPE: of x, bfloat16 or float16.
        SCALES: dtype of the scales, bfloat16 or float16.
    """
    EIGHTHS: gl.constexpr = len(sums) // 4
    GROUPS: gl.constexpr = len(scales)
    ASM: gl.constexpr = _tile_asm(DTYPE, SCALES, GROUPS, EIGHTHS, len(zeros) > 0, len(words) // 2)
    args = sums + words + x + scales + zeros
    return gl.inline_asm_elementwise(ASM[0], ASM[1], args, dtype=_floats(4 * EIGHTHS).value, is_pure=True, pack=1)


@gluon.jit
def rows_of_sums(sums):
    """Sums as ``[KW, 16 T, M]``."""
    KW: gl.constexpr = sums[0].shape[0]
    T: gl.constexpr = sums[0].shape[1]
    # [KW, T, g, l, column, half], and with 16 rows of x the eighth last.
    y = gl.join(gl.join(sums[0], sums[1]), gl.join(sums[2], sums[3]))
    if len(sums) == 4:
        return gl.reshape(gl.permute(y, [0, 1, 5, 2, 3, 4]), [KW, 16 * T, 8])
    else:
        y = gl.join(y, gl.join(gl.join(sums[4], sums[5]), gl.join(sums[6], sums[7])))
        return gl.reshape(gl.permute(y, [0, 1, 5, 2, 6, 3, 4]), [KW, 16 * T, 16])
