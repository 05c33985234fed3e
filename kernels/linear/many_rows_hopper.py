"""Many rows of x on Hopper, in Gluon: two warp groups dequantize the weight in registers and multiply with ``wgmma``.

The result is that of the plain many-rows kernel (:mod:`flashpte.kernels.linear.plain`), for 4 bits, rows of x that are aligned,
scales in the dtype of x, and codes that are symmetric or have whole zero points. Weights are the first operand, in
registers; ``x^T`` is the second, in shared memory. Each group dequantizes 64 columns while its product of the 64 before
runs. Four more warps copy packed words and x with ``cp.async``.

A program has ``BLOCK_N`` rows of the weight and ``BLOCK_M`` rows of x. For large products the tile should be as square
in bytes as the accumulators allow, because all programs together read x ``N / BLOCK_N`` times from L2 and the packed
weight ``M / BLOCK_M`` times.

Shape legend: ``R`` rows of the weight of one warp group, half of a program's; ``BM`` rows of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashpte.kernels.facts import register
from flashpte.kernels.hopper.produce import async_load
from flashpte.kernels.launch import all_of_triton, cdiv, copies_in_16_bytes, dependent_launch
from flashpte.kernels.linear.call import Destination, LinearCall
from flashpte.kernels.linear.few_rows_hopper import index
from flashpte.kernels.linear.splits import allocate_splits, launch_sum_splits
from flashpte.kernels.linear.tuning import HopperManyRowsConfig
from flashpte.kernels.primitives import let_dependents_start, wait_for_earlier_kernels


@gluon.constexpr_function
def _two_planes(dtype: str, zeros: bool, high: bool) -> str:
    """PTX: pairs of words ``$2`` become pairs of codes of two planes, minus zero points, times scales ``$3`` and ``$4``.

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
def _dequantize(words, scales, zeros, HIGH: gl.constexpr):
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
def _of_planes(words, DTYPE: gl.constexpr, ZEROS: gl.constexpr, ROW: gl.constexpr):
    """The value of each plane for each row ``[R, 1]``, from words ``[R / 16, g, count]`` of two values each."""
    T: gl.constexpr = words.shape[0]
    COUNT: gl.constexpr = words.shape[2]
    if ZEROS:
        # The same bits that codes are added to; see _two_planes.
        words = words | (0x43004300 if DTYPE == gl.bfloat16 else 0x64006400)
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


@gluon.jit
def _store_columns(acc, n_first, m_first, out, sizes, SINGLE_SPLIT: gl.constexpr, BIAS: gl.constexpr):
    """Stores ``acc [R, BM]`` as R columns of the result, 32 rows at a time; neighboring columns to one thread.

    Args:
        out: ``(bias_ptr, y_ptr, partial_ptr)``.
        sizes: ``(M, N)``.
    """
    R: gl.constexpr = acc.shape[0]
    BM: gl.constexpr = acc.shape[1]
    if BM > 32:
        low, high = gl.split(gl.permute(gl.reshape(acc, [R, 2, BM // 2]), [0, 2, 1]))
        _store_columns(low, n_first, m_first, out, sizes, SINGLE_SPLIT, BIAS)
        _store_columns(high, n_first, m_first + BM // 2, out, sizes, SINGLE_SPLIT, BIAS)
    else:
        bias_ptr, y_ptr, partial_ptr = out
        M, N = sizes
        OUT: gl.constexpr = gl.BlockedLayout([8, 1], [R // 8, 256 // R], [1, 4], [0, 1])
        n = n_first + gl.arange(0, R, gl.SliceLayout(1, OUT))
        m = m_first + gl.arange(0, BM, gl.SliceLayout(0, OUT))
        inside = (n < N)[:, None] & (m < M)[None, :]
        at = m.to(gl.int64)[None, :] * N + n[:, None]
        if SINGLE_SPLIT:
            if BIAS:
                BIAS_ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
                rows = n_first + gl.arange(0, R, BIAS_ROW)
                acc += gl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(gl.float32)[:, None]
            value = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), OUT)
            gl.store(y_ptr + at, value, mask=inside)
        else:
            value = gl.convert_layout(acc, OUT)
            gl.store(partial_ptr + gl.program_id(1).to(gl.int64) * M * N + at, value, mask=inside)


@gluon.jit
def _multiply(smem, barriers, groups, place, out, sizes, FORMAT: gl.constexpr, HALF: gl.constexpr):
    """A warp group: half of a program's rows of the weight times its rows of x.

    Args:
        smem: ``(x0, x1, words)``: columns 0 to 63 and 64 to 127 of x, and packed words, all with slots.
        barriers: ``(full, empty)``.
        groups: pointers to words of scales and of zero points of the program's first row and column.
        place: ``(n_first, m_first, steps, units, row_tiles)``.
        out, sizes: as for :func:`_store_columns`.
        FORMAT: ``(GROUPS, ZEROS, SINGLE_SPLIT, BIAS)``.
    """
    x0_smem, x1_smem, w_smem = smem
    full, empty = barriers
    s_base, z_base = groups
    n_first, m_first, steps, units, row_tiles = place
    GROUPS: gl.constexpr = FORMAT[0]
    ZEROS: gl.constexpr = FORMAT[1]
    STAGES: gl.constexpr = w_smem.shape[0]
    R: gl.constexpr = w_smem.shape[1] // 2
    BM: gl.constexpr = x0_smem.shape[1]
    DTYPE: gl.constexpr = x0_smem.dtype
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, A)
    STEP: gl.constexpr = 8 * GROUPS
    # The four lanes of a row have the same scales.
    LS: gl.constexpr = gl.SliceLayout(
        2, gl.BlockedLayout([1, 1, 1, GROUPS], [1, 8, 4, 1], [4, 1, 1, 1], [3, 2, 1, 0])
    )
    n = n_first + HALF * R
    tile = gl.minimum(n // 16 + index(0, 3, R // 16, LS), row_tiles - 1)
    offsets = tile * (units * STEP) + index(1, 3, 8, LS) * GROUPS + index(2, 3, GROUPS, LS)
    s_ptrs = s_base + offsets
    z_ptrs = z_base + offsets
    s_words = gl.load(s_ptrs)
    if ZEROS:
        z_words = gl.load(z_ptrs)
    acc = gl.zeros([R, BM], gl.float32, MMA)
    for step in range(0, steps):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        fence_async_shared()
        words = w_smem.index(slot).slice(HALF * R, R, 0).load(A)
        scales = _of_planes(s_words, DTYPE, False, ROW)
        s_words = gl.load(s_ptrs + (step + 1) * STEP, mask=step + 1 < steps, other=0)
        if ZEROS:
            zeros = _of_planes(z_words, DTYPE, True, ROW)
            z_words = gl.load(z_ptrs + (step + 1) * STEP, mask=step + 1 < steps, other=0)
        else:
            zeros = ()
        low = _dequantize(words, scales, zeros, False)
        acc = warpgroup_mma(low, x0_smem.index(slot).permute([1, 0]), acc, is_async=True)
        high = _dequantize(words, scales, zeros, True)
        acc = warpgroup_mma(high, x1_smem.index(slot).permute([1, 0]), acc, is_async=True)
        # The other warp group's products run while this one waits, and dequantizes its next columns.
        acc, low, high = warpgroup_mma_wait(0, [acc, low, high])
        async_copy.mbarrier_arrive(empty.index(slot), increment_count=False)
    _store_columns(acc, n, m_first, out, sizes, FORMAT[2], FORMAT[3])


@gluon.jit
def _copy(smem, barriers, x_ptr, w_ptr, place, x_sizes, CHECK_K: gl.constexpr):
    """The warps that copy x and packed words.

    Args:
        smem, barriers, place: as for :func:`_multiply`.
        x_ptr: the first column of the split.
        w_ptr: the first word of the weight's first row and the split's first column.
        x_sizes: ``(M, columns left, stride_xm)``.
    """
    x0_smem, x1_smem, w_smem = smem
    full, empty = barriers
    n_first, m_first, steps, units, row_tiles = place
    M, columns, stride_xm = x_sizes
    STAGES: gl.constexpr = w_smem.shape[0]
    BM: gl.constexpr = x0_smem.shape[1]
    BN: gl.constexpr = w_smem.shape[1]
    # A few rows at a time, because the addresses of more would need more registers than a producer has.
    CX: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    CW: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    column = gl.arange(0, 64, gl.SliceLayout(0, CX))
    row = gl.arange(0, 16, gl.SliceLayout(1, CX))
    w_row = gl.arange(0, 32, gl.SliceLayout(1, CW))
    word = gl.arange(0, 32, gl.SliceLayout(0, CW))
    x_ptr += m_first.to(gl.int64) * stride_xm
    x_source = x_ptr + (row * stride_xm)[:, None] + column[None, :]
    w_ptr += (n_first // 16).to(gl.int64) * units * 512
    w_source = w_ptr + (w_row // 16 * (units * 512) + w_row % 16 * 32)[:, None] + word[None, :]
    rows_left = M - m_first
    tiles_left = row_tiles - n_first // 16
    for step in range(0, steps):
        slot = step % STAGES
        mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
        for chunk in gl.static_range(BN // 32):
            ok = w_row // 16 + chunk * 2 < tiles_left
            words = w_smem.index(slot).slice(chunk * 32, 32, 0)
            async_load(words, w_source + chunk * 2 * units * 512, mask=ok[:, None])
        for chunk in gl.static_range(BM // 16):
            ok = (row + chunk * 16 < rows_left)[:, None]
            source = x_source + chunk * 16 * stride_xm
            x0, x1 = x0_smem.index(slot).slice(chunk * 16, 16, 0), x1_smem.index(slot).slice(chunk * 16, 16, 0)
            if CHECK_K:
                async_load(x0, source, mask=ok & (column < columns)[None, :])
                async_load(x1, source + 64, mask=ok & (column + 64 < columns)[None, :])
            else:
                async_load(x0, source, mask=ok)
                async_load(x1, source + 64, mask=ok)
        async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
        x_source += 128
        w_source += 512
        columns -= 128


@gluon.jit
def _linear_many_rows_hopper_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, bias_ptr, y_ptr,
    partial_ptr,  # float32 [splits, M, N]
    M, N, K,
    units,  # K / 128, rounded up
    row_tiles,
    stride_xm,
    # Use tl.constexpr: Inductor copies the parameters into code that knows only Triton's language, not Gluon's.
    GROUPS: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, CHECK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, SINGLE_SPLIT: tl.constexpr,
    CONSUMER_REGISTERS: tl.constexpr, PRODUCER_REGISTERS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """``BLOCK_M`` rows of x times ``BLOCK_N`` rows of the weight, over one split of the columns."""
    STEP: gl.constexpr = 8 * GROUPS
    # Programs with the same rows of the weight are neighbors, so that they share them in L2.
    m_tiles = (M + BLOCK_M - 1) // BLOCK_M
    m_first = gl.program_id(0) % m_tiles * BLOCK_M
    n_first = gl.program_id(0) // m_tiles * BLOCK_N
    per_split = gl.cdiv(units, gl.num_programs(1))
    begin = gl.program_id(1) * per_split
    steps = gl.minimum(per_split, units - begin)
    XS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    WS: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    x0_smem = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, BLOCK_M, 64], XS)
    x1_smem = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, BLOCK_M, 64], XS)
    w_smem = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK_N, 32], WS)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=128)
        mbarrier.init(empty.index(stage), count=256)
    wait_for_earlier_kernels(DEPENDENT)
    WORD: gl.constexpr = gl.pointer_type(gl.int32)
    groups = (s_ptr.to(WORD, bitcast=True) + begin * STEP, z_ptr.to(WORD, bitcast=True) + begin * STEP)
    smem = (x0_smem, x1_smem, w_smem)
    barriers = (full, empty)
    place = (n_first, m_first, steps, units, row_tiles)
    out = (bias_ptr, y_ptr, partial_ptr)
    FORMAT: gl.constexpr = (GROUPS, ZEROS, SINGLE_SPLIT, BIAS)
    gl.warp_specialize(
        [
            (_multiply, (smem, barriers, groups, place, out, (M, N), FORMAT, 0)),
            (_multiply, (smem, barriers, groups, place, out, (M, N), FORMAT, 1)),
            (
                _copy,
                (
                    smem,
                    barriers,
                    x_ptr + begin * 128,
                    w_ptr + begin * 512,
                    place,
                    (M, K - begin * 128, stride_xm),
                    CHECK_K,
                ),
            ),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
    let_dependents_start(DEPENDENT)


@triton.jit
def _reads_and_writes(x_ptr, w_ptr, s_ptr, z_ptr, bias_ptr, y_ptr, partial_ptr, SINGLE_SPLIT: tl.constexpr):
    """The twin: it reads and writes the same tensors."""
    total = tl.load(x_ptr).to(tl.float32) + tl.load(w_ptr) + tl.load(s_ptr) + tl.load(z_ptr) + tl.load(bias_ptr)
    if SINGLE_SPLIT:
        tl.store(y_ptr, total)
    else:
        tl.store(partial_ptr, total)


register(_linear_many_rows_hopper_kernel, "matmul", early_start="DEPENDENT", twin=_reads_and_writes)


def serves(call: LinearCall) -> bool:
    """Whether the kernel takes this call: Gluon can be launched, the weight's format fits, and so do rows of x."""
    fmt = call.fmt
    if call.x.dtype not in (torch.bfloat16, torch.float16) or not all_of_triton(call.x):
        return False
    if fmt.bits != 4 or fmt.has_zeros or fmt.scale_dtype != call.x.dtype:
        return False
    return copies_in_16_bytes(call.rows_of_x)


def launch_many_rows_hopper(call: LinearCall, config: HopperManyRowsConfig, into: Destination) -> None:
    """Launches the kernel, and the kernel that adds splits if there are several.

    Args:
        call: a call that :func:`serves` accepts.
        config: its tiles.
        into: where to write the result.
    """
    fmt, splits = call.fmt, config.num_splits
    partial = allocate_splits(call, splits, into.out)
    x, (weight, scales, zeros, bias) = call.rows_of_x, call.tensors
    kernel = wrap_triton(_linear_many_rows_hopper_kernel)
    programs = cdiv(call.rows, config.block_m) * cdiv(fmt.out_features, config.block_n)
    kernel[(programs * into.enabled, splits)](
        x,
        weight,
        scales,
        zeros,
        bias,
        into.out,
        partial,
        call.rows,
        fmt.out_features,
        fmt.in_features,
        fmt.column_tiles,
        fmt.row_tiles,
        x.stride(0),
        GROUPS=fmt.groups_per_tile,
        ZEROS=fmt.has_zeros,
        BIAS=call.bias is not None,
        CHECK_K=fmt.in_features % 128 != 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        SINGLE_SPLIT=splits == 1,
        CONSUMER_REGISTERS=232,
        PRODUCER_REGISTERS=48,
        num_warps=4,
        **dependent_launch(call.x),
    )
    if splits > 1:
        launch_sum_splits(call, partial, splits, into)
