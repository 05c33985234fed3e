"""Device functions in Gluon that turn packed words of 4-bit codes into the first operand of ``wgmma``, in registers.

Words come from shared memory in the layout of that operand, so a plane of 32 columns is in its natural order. Weights
are ``(q - zero) * scale`` in the dtype of x.

Shape legend: ``R`` rows of the weight of one warp group.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _two_planes(dtype: str, zeros: bool, high: bool) -> str:
    """PTX: pairs of words ``$2`` become pairs of weights of two planes. Scales are ``$3`` and ``$4``.

    The zero points are ``$5`` and ``$6``, plus the number that the codes are added to.
    """
    magic = (0x4300 if dtype == "bf16" else 0x6400) * 0x10001
    text = ["{ .reg .b32 t, u, z;", f"mov.b32 z, {magic + 8 * 0x10001:#x};"]
    for i in range(2):
        plane = i + (2 if high else 0)
        zero = f"${5 + i}" if zeros else "z"
        text.append(f"shr.u32 u, $2, {4 * plane};")
        text.append(f"lop3.b32 t, u, 0x000F000F, {magic:#x}, 0xEA;")
        text.append(f"sub.rn.{dtype}x2 t, t, {zero};")
        text.append(f"mul.rn.{dtype}x2 ${i}, t, ${3 + i};")
    return "\n".join([*text, "}"])


@gluon.constexpr_function
def _two_planes_asm(dtype, zeros, high):
    return _two_planes("bf16" if dtype == gl.bfloat16 else "f16", zeros, high)


@gluon.jit
def _beside(p, q):
    """``[R, 64]`` of two ``[R, 32]``, in registers."""
    both = gl.reshape(gl.permute(gl.join(p, q), [0, 2, 1]), [p.shape[0], 64])
    return gl.convert_layout(both, p.type.layout)


@gluon.jit
def dequantize(words, scales, zeros, HIGH: gl.constexpr):
    """First operand ``[R, 64]`` from words ``[R, 32]``: their two lower or two higher planes.

    Args:
        scales: four ``[R, 1]``, by plane.
        zeros: zero points for :func:`_two_planes`, like ``scales``; an empty tuple if codes are symmetric.
    """
    DTYPE: gl.constexpr = scales[0].dtype
    ASM: gl.constexpr = _two_planes_asm(DTYPE, len(zeros) > 0, HIGH)
    FIRST: gl.constexpr = 2 if HIGH else 0
    if len(zeros) == 0:
        p, q = gl.inline_asm_elementwise(
            ASM,
            "=&r,=&r,r,r,r",
            [words, scales[FIRST], scales[FIRST + 1]],
            dtype=(DTYPE.value, DTYPE.value),
            is_pure=True,
            pack=2,
        )
    else:
        p, q = gl.inline_asm_elementwise(
            ASM,
            "=&r,=&r,r,r,r,r,r",
            [words, scales[FIRST], scales[FIRST + 1], zeros[FIRST], zeros[FIRST + 1]],
            dtype=(DTYPE.value, DTYPE.value),
            is_pure=True,
            pack=2,
        )
    return _beside(p, q)


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
