"""Device functions in Gluon that turn packed words of codes into the first operand of ``wgmma``, in registers.

Words come from shared memory in the layout of that operand, so a plane of 32 columns is in its natural order. Weights
are in the dtype of x, rounded once. There are four kinds (:func:`kind_of`):

* ``symmetric`` and ``whole``: ``(q - zero) * scale`` on pairs in the dtype of x, where the difference is exact,
* ``offsets``: ``q * scale + offset`` on pairs, one fused operation,
* ``float``: ``q * scale + offset`` in float32, for scales of another dtype and zero points that are not whole.
  Codes enter it as ``128 + q``, and the offset is less by ``128 * scale`` (:func:`float_offsets`). That rounds to
  2^-17 of a scale, far less than a weight's own rounding. So are all weights of 8 bits, whose codes enter as
  ``32,768 + q``, which rounds to 2^-9 of a scale: a byte is the second of a float32's bytes, and needs no shift.

Shape legend: ``R`` rows of the weight of one warp group.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def kind_of(x, scales, moved, zeros: bool, offsets: bool) -> str:
    """The kind of weights, from the dtypes of x, of scales and of zero points or offsets."""
    if scales != x or (zeros and moved != gl.int16):
        return "float"
    return "offsets" if offsets else "whole" if zeros else "symmetric"


@gluon.constexpr_function
def _two_planes(dtype: str, kind: str, high: bool) -> tuple[str, str]:
    """PTX and constraints: pairs of words ``$2`` become pairs of weights of two planes. Scales are ``$3`` and ``$4``.

    The zero points, plus the number that codes are added to, or the offsets are ``$5`` and ``$6``.
    """
    magic = (0x4300 if dtype == "bf16" else 0x6400) * 0x10001
    zero = magic if kind == "offsets" else magic + 8 * 0x10001
    text = ["{ .reg .b32 t, u, z;", f"mov.b32 z, {zero:#x};"]
    for i in range(2):
        plane = i + (2 if high else 0)
        text.append(f"shr.u32 u, $2, {4 * plane};")
        text.append(f"lop3.b32 t, u, 0x000F000F, {magic:#x}, 0xEA;")
        text.append(f"sub.rn.{dtype}x2 t, t, {f'${5 + i}' if kind == 'whole' else 'z'};")
        if kind == "offsets":
            text.append(f"fma.rn.{dtype}x2 ${i}, t, ${3 + i}, ${5 + i};")
        else:
            text.append(f"mul.rn.{dtype}x2 ${i}, t, ${3 + i};")
    return "\n".join([*text, "}"]), "=&r,=&r,r,r,r" + ("" if kind == "symmetric" else ",r,r")


@gluon.constexpr_function
def _two_float_planes(dtype: str, high: bool) -> tuple[str, str]:
    """As :func:`_two_planes`, in float32. Each of the pair has its scale (``$3`` to ``$6``) and offset (``$7`` on)."""
    text = ["{ .reg .b32 t, u; .reg .f32 p, q;"]
    for i in range(2):
        plane = i + (2 if high else 0)
        text.append(f"shr.u32 u, $2, {4 * plane};")
        # In bfloat16, 128 + q.
        text.append("lop3.b32 t, u, 0x000F000F, 0x43004300, 0xEA;")
        text += ["shl.b32 p, t, 16;", "and.b32 q, t, 0xFFFF0000;"]
        text.append(f"fma.rn.f32 p, p, ${3 + 2 * i}, ${7 + 2 * i};")
        text.append(f"fma.rn.f32 q, q, ${4 + 2 * i}, ${8 + 2 * i};")
        text.append(f"cvt.rn.{dtype}x2.f32 ${i}, q, p;")
    return "\n".join([*text, "}"]), "=&r,=&r,r" + ",f" * 8


@gluon.constexpr_function
def _two_planes_asm(dtype, kind, high):
    name = "bf16" if dtype == gl.bfloat16 else "f16"
    return _two_float_planes(name, high) if kind == "float" else _two_planes(name, kind, high)


@gluon.jit
def _beside(p, q):
    """``[R, 64]`` of two ``[R, 32]``, in registers."""
    both = gl.reshape(gl.permute(gl.join(p, q), [0, 2, 1]), [p.shape[0], 64])
    return gl.convert_layout(both, p.type.layout)


@gluon.jit
def dequantize(words, scales, moved, DTYPE: gl.constexpr, KIND: gl.constexpr, HIGH: gl.constexpr):
    """First operand ``[R, 64]`` of ``DTYPE`` from words ``[R, 32]``: their two lower or two higher planes.

    Args:
        scales: four ``[R, 1]``, by plane: in ``DTYPE``, or in float32 with the kind ``float``.
        moved: like ``scales``: zero points for :func:`_two_planes`, offsets, or the result of :func:`float_offsets`; an
            empty tuple if codes are symmetric.
        KIND: result of :func:`kind_of`.
    """
    ASM: gl.constexpr = _two_planes_asm(DTYPE, KIND, HIGH)
    FIRST: gl.constexpr = 2 if HIGH else 0
    if KIND == "symmetric":
        args = [words, scales[FIRST], scales[FIRST + 1]]
    else:
        args = [words, scales[FIRST], scales[FIRST + 1], moved[FIRST], moved[FIRST + 1]]
    p, q = gl.inline_asm_elementwise(ASM[0], ASM[1], args, dtype=(DTYPE.value, DTYPE.value), is_pure=True, pack=2)
    return _beside(p, q)


@gluon.constexpr_function
def _two_bytes(dtype: str) -> str:
    """PTX: word ``$2`` of two signed bytes becomes a pair of weights. Its scale is ``$3``, its offset ``$4``."""
    return "\n".join(
        [
            "{ .reg .b32 w; .reg .f32 p, q;",
            "cvt.u32.u16 w, $2;",
            "xor.b32 w, w, 0x8080;",
            # The float32 0x47000000 | q << 8 is 32,768 + q.
            "prmt.b32 p, w, 0x47, 0x4505;",
            "prmt.b32 q, w, 0x47, 0x4515;",
            "fma.rn.f32 p, p, $3, $4;",
            "fma.rn.f32 q, q, $3, $4;",
            f"cvt.rn.{dtype}x2.f32 w, q, p;",
            "mov.b32 {$0, $1}, w; }",
        ]
    )


@gluon.constexpr_function
def _two_bytes_asm(dtype):
    return _two_bytes("bf16" if dtype == gl.bfloat16 else "f16")


@gluon.jit
def _half(values, HIGH: gl.constexpr):
    """The first or the second half of the columns of ``[R, C]``, in registers."""
    C: gl.constexpr = values.shape[1] // 2
    low, high = gl.split(gl.permute(gl.reshape(values, [values.shape[0], 2, C]), [0, 2, 1]))
    return gl.convert_layout(high if HIGH else low, values.type.layout)


@gluon.jit
def _plane_of_bytes(words, scale, offset, DTYPE: gl.constexpr, A: gl.constexpr):
    """Weights ``[R, 32]`` of one plane, from its words ``[R, 16]``."""
    ASM: gl.constexpr = _two_bytes_asm(DTYPE)
    args = [words, scale, offset]
    types: gl.constexpr = (DTYPE.value, DTYPE.value)
    p, q = gl.inline_asm_elementwise(ASM, "=h,=h,h,f,f", args, dtype=types.value, is_pure=True, pack=1)
    return gl.convert_layout(gl.reshape(gl.join(p, q), [words.shape[0], 32]), A)


@gluon.jit
def dequantize_bytes(words, scales, moved, DTYPE: gl.constexpr, A: gl.constexpr, HIGH: gl.constexpr):
    """As :func:`dequantize`, from words ``[R, 64]`` of two codes of 8 bits, for the layout ``A``."""
    words = _half(words, HIGH)
    FIRST: gl.constexpr = 2 if HIGH else 0
    p = _plane_of_bytes(_half(words, False), scales[FIRST], moved[FIRST], DTYPE, A)
    q = _plane_of_bytes(_half(words, True), scales[FIRST + 1], moved[FIRST + 1], DTYPE, A)
    return _beside(p, q)


@gluon.jit
def _float_offset(scale, moved, ZEROS: gl.constexpr, OFFSETS: gl.constexpr, BITS: gl.constexpr):
    """Of one plane; see :func:`float_offsets`. ``moved`` is used with zero points and offsets."""
    MORE: gl.constexpr = 128.0 if BITS == 4 else 32768.0
    if OFFSETS:
        return moved - MORE * scale
    elif ZEROS:
        return (-MORE - moved) * scale
    else:
        CENTER: gl.constexpr = MORE + 2 ** (BITS - 1)
        return -CENTER * scale


@gluon.jit
def float_offsets(scales, moved, ZEROS: gl.constexpr, OFFSETS: gl.constexpr, BITS: gl.constexpr):
    """What products of a code, plus its constant, with scales are moved by: float32 by plane, as are both arguments."""
    if len(moved) == 0:
        moved = scales
    return (
        _float_offset(scales[0], moved[0], ZEROS, OFFSETS, BITS),
        _float_offset(scales[1], moved[1], ZEROS, OFFSETS, BITS),
        _float_offset(scales[2], moved[2], ZEROS, OFFSETS, BITS),
        _float_offset(scales[3], moved[3], ZEROS, OFFSETS, BITS),
    )


@gluon.jit
def _rows(values, T: gl.constexpr, ROW: gl.constexpr):
    """``[T, g, half]`` as ``[R, 1]``."""
    return gl.convert_layout(gl.reshape(gl.permute(values, [0, 2, 1]), [16 * T]), ROW)[:, None]


@gluon.jit
def floats_of_planes(words, DTYPE: gl.constexpr, ROW: gl.constexpr):
    """As :func:`of_planes`, for values of ``DTYPE``, which become float32."""
    T: gl.constexpr = words.shape[0]
    if gl.float32 == DTYPE:
        values = words.to(gl.float32, bitcast=True)
        if words.shape[2] == 8:
            even, odd = gl.split(gl.reshape(values, [T, 8, 2, 2, 2]))
            v0, v2 = gl.split(even)
            v1, v3 = gl.split(odd)
            return _rows(v0, T, ROW), _rows(v1, T, ROW), _rows(v2, T, ROW), _rows(v3, T, ROW)
        elif words.shape[2] == 4:
            low, high = gl.split(gl.reshape(values, [T, 8, 2, 2]))
            v0 = _rows(low, T, ROW)
            v2 = _rows(high, T, ROW)
            return v0, v0, v2, v2
        else:
            v0 = _rows(values, T, ROW)
            return v0, v0, v0, v0
    else:
        v0, v1, v2, v3 = of_planes(words, DTYPE, False, ROW)
        return v0.to(gl.float32), v1.to(gl.float32), v2.to(gl.float32), v3.to(gl.float32)


@gluon.jit
def of_planes(words, DTYPE: gl.constexpr, ZEROS: gl.constexpr, ROW: gl.constexpr):
    """The value of each plane for each row ``[R, 1]``, from words ``[R / 16, g, count]`` of two values each."""
    T: gl.constexpr = words.shape[0]
    COUNT: gl.constexpr = words.shape[2]
    if ZEROS:
        # The same bits that codes are added to; see _two_planes.
        words = words | (0x43004300 if gl.bfloat16 == DTYPE else 0x64006400)
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(DTYPE.value, DTYPE.value), is_pure=True, pack=1
    )
    if COUNT == 4:
        # [T, g, half, pair]
        v0, v2 = gl.split(gl.permute(gl.reshape(low, [T, 8, 2, 2]), [0, 2, 1, 3]))
        v1, v3 = gl.split(gl.permute(gl.reshape(high, [T, 8, 2, 2]), [0, 2, 1, 3]))
        v0 = gl.convert_layout(gl.reshape(v0, [16 * T]), ROW)[:, None]
        v1 = gl.convert_layout(gl.reshape(v1, [16 * T]), ROW)[:, None]
        v2 = gl.convert_layout(gl.reshape(v2, [16 * T]), ROW)[:, None]
        v3 = gl.convert_layout(gl.reshape(v3, [16 * T]), ROW)[:, None]
        return v0, v1, v2, v3
    elif COUNT == 2:
        v0 = gl.convert_layout(gl.reshape(gl.permute(low, [0, 2, 1]), [16 * T]), ROW)[:, None]
        v2 = gl.convert_layout(gl.reshape(gl.permute(high, [0, 2, 1]), [16 * T]), ROW)[:, None]
        return v0, v0, v2, v2
    else:
        both = gl.permute(gl.reshape(gl.join(low, high), [T, 8, 2]), [0, 2, 1])
        v0 = gl.convert_layout(gl.reshape(both, [16 * T]), ROW)[:, None]
        return v0, v0, v0, v0
