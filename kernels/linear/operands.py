"""Products of packed words of codes with few rows of x, in registers: PTX, written once for each kind of tile.

A lane has columns ``8 l`` to ``8 l + 7`` of each plane of rows ``g`` and ``g + 8`` of a tile: 16 bytes of a row with 4
bits, and 8 bytes of each plane with 8. Once unpacked, they are its own registers of the operands of eight
``mma.m16n8k16``, two for each plane. The order of columns within an operand is then not the natural one, but x is read
in the same order. So unpacked codes never pass through shared memory.

A tile's arithmetic is one piece of inline PTX (:func:`_tile_code`), applied to tensors that hold one value per lane.
Everything around it renames registers.

Whole zero points of 4 bits are subtracted from the codes. Offsets and other zero points need the sum of a group's
columns of x, which all rows of the weight share::

    sum((q s + o) x) = s sum(q x) + o sum(x),    sum((q - z) s x) = s (sum(q x) - z sum(x))

A product of ones with x gives that sum to every lane that needs it (:func:`sums_of_x`), once for all tiles of a warp.

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
    """The two values of a word of ``dtype`` (bf16, f16 or s16), as float32."""
    if dtype == "bf16":
        return [f"shl.b32 {low}, {word}, 16;", f"and.b32 {high}, {word}, 0xFFFF0000;"]
    convert = "cvt.f32.f16" if dtype == "f16" else "cvt.rn.f32.s16"
    return [f"mov.b32 {{h0, h1}}, {word};", f"{convert} {low}, h0;", f"{convert} {high}, h1;"]


@gluon.constexpr_function
def _groups_as_float(dtype: str, into: str, words: list[str], groups: int) -> list[str]:
    """Registers ``into``: a value of each group as float32. Group j of row g is number j, of row g + 8 it is 4 + j."""
    if dtype == "f32":
        return [f"mov.b32 {into}{4 * (i // groups) + i % groups}, {word};" for i, word in enumerate(words)]
    if groups == 1:
        return _as_float(dtype, f"{into}0", f"{into}4", words[0])
    text = []
    for half in range(2):
        for i in range(groups // 2):
            first = 4 * half + 2 * i
            text += _as_float(dtype, f"{into}{first}", f"{into}{first + 1}", words[half * groups // 2 + i])
    return text


@gluon.constexpr_function
def _unpack4(dtype: str, a: str, word: str, plane: int, zero: str) -> list[str]:
    """``a``: the nibbles ``plane`` of a word of two columns, minus ``zero``, if any, a register of :func:`_magic`."""
    shifted = [f"shr.u32 u, {word}, {4 * plane};"] if plane else []
    nibbles = f"lop3.b32 {a}, {'u' if plane else word}, 0x000F000F, {_magic(dtype):#x}, 0xEA;"
    return [*shifted, nibbles, *([f"sub.rn.{dtype}x2 {a}, {a}, {zero};"] if zero else [])]


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
def _more_than_codes(dtype: str, bits: int) -> int:
    """What enters the products of weights with offsets, minus the code.

    Where a constant is added, it costs nothing to leave it in, because the sum of x takes it out again. Bits of
    bfloat16 hold 128 + q exactly. In float16, 1,024 + q would cost 7 of the 24 bits that sums have.
    """
    if bits == 8:
        return -128
    return 128 if dtype == "bf16" else 0


@gluon.constexpr_function
def _moved_start(kind: str, groups: int, more: int) -> list[str]:
    """Registers m: what the sum of a group of x is multiplied by, where ``q + more`` enters the products.

    ``q s + o`` is ``(q + more) s + (o - more s)``, and ``q - z`` is ``(q + more) - (more + z)``.
    """
    text = []
    for i in (4 * half + group for half in range(2) for group in range(groups)):
        if kind == "zeros":
            text.append(f"sub.rn.f32 m{i}, {_float(-more)}, m{i};")
        elif more:
            text.append(f"fma.rn.f32 m{i}, s{i}, {_float(-more)}, m{i};")
    return text


@gluon.constexpr_function
def _float(number: int) -> str:
    """A constant of 0, 128 or -128 in PTX."""
    return {0: "0f00000000", 128: "0f43000000", -128: "0fC3000000"}[number]


@gluon.constexpr_function
def _tile_code(numbers: tuple[str, str, str, str], groups: int, eighths: int, bits: int) -> tuple[str, str]:
    """PTX and constraints of a tile's products.

    Outputs: ``4 * eighths`` sums, by eighth of x's rows and register. Inputs: the sums so far; ``2 * bits`` words of
    codes (row ``g``, then row ``g + 8``, with 8 bits by plane); words of x by plane, eighth and word; words of scales;
    words of zero points or offsets; where they need them, sums of x by group, eighth and column.

    Args:
        numbers: result of :func:`numbers_of`.
    """
    dtype, scales, moved, kind = numbers
    outs = 4 * eighths
    at = outs
    sums = [f"${at + i}" for i in range(outs)]
    at += outs
    words = [[f"${at + bits * half + i}" for i in range(bits)] for half in range(2)]
    at += 2 * bits
    x = [[[f"${at + (p * eighths + e) * 4 + i}" for i in range(4)] for e in range(eighths)] for p in range(4)]
    at += 16 * eighths
    scale_words = [f"${at + i}" for i in range(groups * words_of(scales))]
    at += len(scale_words)
    moved_words = [f"${at + i}" for i in range(groups * words_of(moved) if kind else 0)]
    at += len(moved_words)
    by_sums = kind in ("offsets", "zeros")
    x_sums = [f"${at + i}" for i in range(2 * groups * eighths if by_sums else 0)]
    pair = _magic(dtype)
    more = _more_than_codes(dtype, bits)
    # What is subtracted from codes.
    center = 0x64806480 if bits == 8 else pair if by_sums else pair + 8 * 0x10001
    text = [
        "{",
        ".reg .b32 t, u; .reg .b16 h0, h1; .reg .f32 o;",
        f".reg .b32 a<4>; .reg .f32 d<{outs}>; .reg .f32 s<8>; .reg .b32 z<8>; .reg .f32 y<{outs}>;",
        f".reg .b32 c; mov.b32 c, {center:#x}; mov.f32 o, 0f00000000;",
    ]
    text += _groups_as_float(scales, "s", scale_words, groups)
    if kind == "whole":
        # Registers z are numbered as s, and hold two equal zero points each.
        for number in range(2 * groups):
            half, group = divmod(number, groups)
            word = moved_words[0] if groups == 1 else moved_words[half * groups // 2 + group // 2]
            high = half if groups == 1 else group % 2
            text.append(f"prmt.b32 z{4 * half + group}, {word}, 0, {0x3232 if high else 0x1010:#x};")
            text.append(f"or.b32 z{4 * half + group}, z{4 * half + group}, {pair:#x};")
    elif by_sums:
        text += [".reg .f32 m<8>;", *_groups_as_float(moved, "m", moved_words, groups)]
        text += _moved_start(kind, groups, more)
    per_group = 4 // groups
    for plane in range(4):
        group = plane // per_group
        for c in range(2):
            for r in range(4):  # row g, row g + 8, row g of the next columns, row g + 8 of the next columns
                if bits == 8:
                    text += _unpack8(dtype, f"a{r}", words[r % 2][2 * plane + c], r >= 2)
                else:
                    zero = f"z{4 * (r % 2) + group}" if kind == "whole" else "" if by_sums and more else "c"
                    text += _unpack4(dtype, f"a{r}", words[r % 2][2 * c + r // 2], plane, zero)
            for e in range(eighths):
                d = [f"d{4 * e + r}" for r in range(4)]
                start = ["o"] * 4 if c == 0 and plane % per_group == 0 else d
                b = [x[plane][e][2 * c], x[plane][e][2 * c + 1]]
                text.append(_product(dtype, d, [f"a{r}" for r in range(4)], b, start))
        if plane % per_group == per_group - 1:
            for i in range(outs):
                number = (4 if i % 4 >= 2 else 0) + group
                into = f"${i}" if plane == 3 else f"y{i}"
                so_far = sums[i] if group == 0 else f"y{i}"
                x_sum = x_sums[(group * eighths + i // 4) * 2 + i % 2] if by_sums else ""
                if kind == "zeros":
                    text.append(f"fma.rn.f32 d{i}, m{number}, {x_sum}, d{i};")
                if kind == "offsets":
                    text.append(f"fma.rn.f32 y{i}, m{number}, {x_sum}, {so_far};")
                    so_far = f"y{i}"
                text.append(f"fma.rn.f32 {into}, s{number}, d{i}, {so_far};")
    ins = ["r"] * (2 * bits + 16 * eighths + len(scale_words) + len(moved_words)) + ["f"] * len(x_sums)
    return "\n".join([*text, "}"]), ",".join(["=&f"] * outs + ["f"] * outs + ins)


@gluon.constexpr_function
def _x_sums_code(dtype: str, groups: int, eighths: int) -> tuple[str, str]:
    """PTX and constraints of the sums of x: by group, eighth, and the two columns of a lane's sums."""
    outs = 2 * groups * eighths
    x = [[[f"${outs + (p * eighths + e) * 4 + i}" for i in range(4)] for e in range(eighths)] for p in range(4)]
    text = [
        "{ .reg .b32 a; .reg .f32 o; .reg .f32 d<4>;",
        f"mov.b32 a, {0x3F803F80 if dtype == 'bf16' else 0x3C003C00:#x}; mov.f32 o, 0f00000000;",
    ]
    for number in range(groups * eighths):
        group, e = divmod(number, eighths)
        start = ["o"] * 4
        for plane in range(group * 4 // groups, (group + 1) * 4 // groups):
            for c in range(2):
                b = [x[plane][e][2 * c], x[plane][e][2 * c + 1]]
                text.append(_product(dtype, ["d0", "d1", "d2", "d3"], ["a"] * 4, b, start))
                start = ["d0", "d1", "d2", "d3"]
        text += [f"mov.f32 ${2 * number}, d0;", f"mov.f32 ${2 * number + 1}, d1;"]
    return "\n".join([*text, "}"]), ",".join(["=&f"] * outs + ["r"] * (16 * eighths))


@gluon.constexpr_function
def _name(dtype) -> str:
    names = {gl.bfloat16: "bf16", gl.float16: "f16", gl.float32: "f32", gl.int16: "s16"}
    return next(name for known, name in names.items() if known == dtype)


@gluon.constexpr_function
def words_of(name: str) -> int:
    """Words of the values of rows g and g + 8 that belong to one group, where a dtype has this name in PTX."""
    return 2 if name == "f32" else 1


@gluon.constexpr_function
def numbers_of(x, scales, moved, zeros: bool, offsets: bool, bits: int) -> tuple[str, str, str, str]:
    """How :func:`multiply_tile` reads numbers: names of the dtypes of x, of scales and of what moves codes, and how.

    It is ``whole`` (zero points that are subtracted from codes of 4 bits), ``zeros`` (other zero points), ``offsets``,
    or empty for symmetric codes.
    """
    kind = "offsets" if offsets else "zeros" if zeros else ""
    if zeros and bits == 4 and _name(moved) == "s16":
        kind = "whole"
    return _name(x), _name(scales), _name(moved), kind


@gluon.constexpr_function
def _floats(count):
    return (gl.float32,) * count


@gluon.constexpr_function
def _tile_asm(numbers, groups, eighths, bits):
    return _tile_code(numbers, groups, eighths, bits)


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
def sums_of_x(x, GROUPS: gl.constexpr, NUMBERS: gl.constexpr):
    """Sums of each group's columns of x, for :func:`multiply_tile`; an empty tuple where it does not need them."""
    if NUMBERS[3] == "offsets" or NUMBERS[3] == "zeros":
        EIGHTHS: gl.constexpr = len(x) // 16
        ASM: gl.constexpr = _x_sums_code(NUMBERS[0], GROUPS, EIGHTHS)
        COUNT: gl.constexpr = 2 * GROUPS * EIGHTHS
        return gl.inline_asm_elementwise(ASM[0], ASM[1], x, dtype=_floats(COUNT).value, is_pure=True, pack=1)
    else:
        return ()


@gluon.jit
def multiply_tile(sums, words, x, scales, moved, x_sums, GROUPS: gl.constexpr, NUMBERS: gl.constexpr):
    """``sums +=`` the product of a tile of 128 columns with x, for each of KW warps.

    The sum of a group is scaled in float32.

    Args:
        sums: float32, as :func:`zero_sums` makes them.
        words: result of :func:`words_of_lanes`.
        x: result of :func:`x_of_lanes`.
        scales: result of :func:`groups_of_lanes`: words of two scales each, or of one in float32.
        moved: zero points or offsets, like ``scales``; an empty tuple if codes are symmetric.
        x_sums: result of :func:`sums_of_x`.
        GROUPS: groups of a row in one tile.
        NUMBERS: result of :func:`numbers_of`.
    """
    EIGHTHS: gl.constexpr = len(sums) // 4
    ASM: gl.constexpr = _tile_asm(NUMBERS, GROUPS, EIGHTHS, len(words) // 2)
    args = sums + words + x + scales + moved + x_sums
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
