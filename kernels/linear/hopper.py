"""Few rows of x on Hopper, in Gluon: symmetric weights of 4 bits go from a ring in shared memory to tensor cores.

The result is that of the plain few-rows kernel (:mod:`flashpte.kernels.linear.plain`), for bfloat16, K a multiple of
128 and groups of 32 or 128 columns. Unpacked weights never pass through shared memory: a lane's 16 bytes of row ``g``
and of row ``g + 8`` of a tile are, once unpacked, its own registers of four operands. The order of columns within an
operand is then not the natural one, but x is read in the same order.

``x^T`` is the second operand, so M is padded to 8 or 16 only. ``COLUMN_WARPS`` warps take tiles of 128 columns in turn,
``ROW_WARPS`` warps share the rows of the weight. Packed words, scales and x wait in a ring of ``STAGES`` steps, which
``cp.async`` fills.

Shape legend: ``KW`` column warps, ``BN`` rows of the weight and ``BM`` rows of x of one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from flashpte.kernels.facts import register
from flashpte.kernels.launch import all_of_triton, cdiv, copies_in_16_bytes, static_int
from flashpte.kernels.linear.call import Destination, LinearCall
from flashpte.kernels.linear.splits import allocate_splits, launch_sum_splits
from flashpte.kernels.linear.tuning import HopperFewRowsConfig

# A word of 32 bits holds two neighboring columns of each plane. 0x4300 | q is the bfloat16 128 + q, 0x4308 is 136.
UNPACK = gl.constexpr(
    """{
    .reg .b32 t, u, z;
    mov.b32 z, 0x43084308;
    lop3.b32 t, $8, 0x000F000F, 0x43004300, 0xEA;
    sub.rn.bf16x2 t, t, z;
    mov.b32 {$0, $1}, t;
    shr.u32 u, $8, 4;
    lop3.b32 t, u, 0x000F000F, 0x43004300, 0xEA;
    sub.rn.bf16x2 t, t, z;
    mov.b32 {$2, $3}, t;
    shr.u32 u, $8, 8;
    lop3.b32 t, u, 0x000F000F, 0x43004300, 0xEA;
    sub.rn.bf16x2 t, t, z;
    mov.b32 {$4, $5}, t;
    shr.u32 u, $8, 12;
    lop3.b32 t, u, 0x000F000F, 0x43004300, 0xEA;
    sub.rn.bf16x2 t, t, z;
    mov.b32 {$6, $7}, t;
    }"""
)


@gluon.jit
def _unpack(words):
    """The four planes of int32 words as bfloat16 ``q - 8``, even and odd columns apart.

    Words stay int32 until here: values of 16 bits that live across iterations of a loop cost an instruction each to
    pack again.
    """
    return gl.inline_asm_elementwise(
        UNPACK,
        "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r",
        [words],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _as_bf16(words):
    """The two bfloat16 values in each int32."""
    return gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1
    )


@gluon.jit
def _low_as_f32(words):
    """The bfloat16 value in the low half of each int32, as float32."""
    return (words << 16).to(gl.float32, bitcast=True)


@gluon.jit
def _high_as_f32(words):
    """The bfloat16 value in the high half of each int32, as float32."""
    return (words & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _operand_a(even, odd, LAYOUT: gl.constexpr):
    """Columns ``[KW, tile, half, g, 4 l + 2 c + h]`` of a plane to ``[KW, row, 16 c + 8 h + 2 l + e]``."""
    KW: gl.constexpr = even.shape[0]
    BN: gl.constexpr = even.shape[1] * 16
    p = gl.reshape(gl.join(even, odd), [KW, BN, 4, 2, 2, 2])
    return gl.convert_layout(gl.reshape(gl.permute(p, [0, 1, 3, 4, 2, 5]), [KW, BN, 32]), LAYOUT)


@gluon.jit
def _operands_b(x, LAYOUT: gl.constexpr):
    """An operand ``[KW, 32, BM]`` for each plane of x ``[KW, 1, BM, 16 plane + pair]``, in the same order."""
    KW: gl.constexpr = x.shape[0]
    BM: gl.constexpr = x.shape[2]
    even, odd = _as_bf16(x)
    # [KW, m, plane, l, c, h, e] to [KW, column, m, plane].
    x = gl.permute(gl.reshape(gl.join(even, odd), [KW, BM, 2, 2, 4, 2, 2, 2]), [0, 5, 6, 4, 7, 1, 2, 3])
    x02, x13 = gl.split(gl.reshape(x, [KW, 32, BM, 2, 2]))
    x0, x2 = gl.split(x02)
    x1, x3 = gl.split(x13)
    return (
        gl.convert_layout(x0, LAYOUT),
        gl.convert_layout(x1, LAYOUT),
        gl.convert_layout(x2, LAYOUT),
        gl.convert_layout(x3, LAYOUT),
    )


@gluon.jit
def _multiply_tile(acc, words, scales, x, GROUPS: gl.constexpr):
    """``acc [KW, BN, BM] += scale * (q - 8) x`` over a tile of 128 columns for each of KW warps.

    Args:
        words: packed words ``[KW, tile, half, g, word]``.
        scales: pairs of scales ``[KW, tile, g, 2 half + pair]``, or ``[KW, tile, g, 1]`` where a pair is two rows.
        x: pairs of columns ``[KW, 1, m, 16 plane + pair]``.
    """
    KW: gl.constexpr = acc.shape[0]
    BN: gl.constexpr = acc.shape[1]
    BM: gl.constexpr = acc.shape[2]
    MMA: gl.constexpr = acc.type.layout
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    ROW: gl.constexpr = gl.SliceLayout(2, MMA)
    e0, o0, e1, o1, e2, o2, e3, o3 = _unpack(words)
    x0, x1, x2, x3 = _operands_b(x, gl.DotOperandLayout(1, MMA, 2))
    zero = gl.zeros([KW, BN, BM], gl.float32, MMA)
    if GROUPS == 4:
        # Each plane is a group; its sum is scaled in float32.
        s01, s23 = gl.split(gl.permute(gl.reshape(scales, [KW, BN // 16, 8, 2, 2]), [0, 1, 3, 2, 4]))
        s01 = gl.convert_layout(gl.reshape(s01, [KW, BN]), ROW)[:, :, None]
        s23 = gl.convert_layout(gl.reshape(s23, [KW, BN]), ROW)[:, :, None]
        acc += _low_as_f32(s01) * mma_v2(_operand_a(e0, o0, A), x0, zero)
        acc += _high_as_f32(s01) * mma_v2(_operand_a(e1, o1, A), x1, zero)
        acc += _low_as_f32(s23) * mma_v2(_operand_a(e2, o2, A), x2, zero)
        acc += _high_as_f32(s23) * mma_v2(_operand_a(e3, o3, A), x3, zero)
    else:
        gl.static_assert(GROUPS == 1)
        # The scales of rows g and g + 8 are in a word.
        pair = gl.permute(gl.join(_low_as_f32(scales), _high_as_f32(scales)), [0, 1, 4, 2, 3])
        scale = gl.convert_layout(gl.reshape(pair, [KW, BN]), ROW)[:, :, None]
        product = mma_v2(_operand_a(e0, o0, A), x0, zero)
        product = mma_v2(_operand_a(e1, o1, A), x1, product)
        product = mma_v2(_operand_a(e2, o2, A), x2, product)
        product = mma_v2(_operand_a(e3, o3, A), x3, product)
        acc += scale * product
    return acc


@gluon.constexpr_function
def slice_to(axis, rank, layout):
    """The layout of a vector along ``axis`` that ``expand_dims`` turns into ``layout``, lower dimensions first."""
    for other in reversed(range(rank)):
        if other != axis:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _index(AXIS: gl.constexpr, RANK: gl.constexpr, SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """``0 .. SIZE`` along dimension AXIS of a tensor of rank RANK."""
    index = gl.arange(0, SIZE, slice_to(AXIS, RANK, LAYOUT))
    for other in gl.static_range(RANK):
        if other != AXIS:
            index = gl.expand_dims(index, other)
    return index


@gluon.jit
def _pointers(tensors, M, units, stride_xm, TILE: gl.constexpr):
    """What each thread copies of the first step: pointers and tiles of words, of scales, and of x with its rows.

    Args:
        tensors: ``(x_ptr, w_ptr, s_ptr)``.
        units: tiles of columns of a row.
        TILE: ``(GROUPS, BN, BM, KW, RW)``.
    """
    x_ptr, w_ptr, s_ptr = tensors
    GROUPS: gl.constexpr = TILE[0]
    TILES: gl.constexpr = TILE[1] // 16
    BM: gl.constexpr = TILE[2]
    KW: gl.constexpr = TILE[3]
    RW: gl.constexpr = TILE[4]
    WORD: gl.constexpr = gl.pointer_type(gl.int32)
    # Words of weights [KW, tile, half, g, word].
    LW: gl.constexpr = gl.BlockedLayout([1, 1, 2, 1, 4], [1, 1, 1, 8, 4], [KW, RW, 1, 1, 1], [4, 3, 2, 1, 0])
    w_kw = _index(0, 5, KW, LW)
    w_off = _index(1, 5, TILES, LW) * (units * 256) + w_kw * 256
    w_off += _index(2, 5, 2, LW) * 128 + _index(3, 5, 8, LW) * 16 + _index(4, 5, 16, LW)
    weights = (w_ptr.to(WORD, bitcast=True) + w_off, w_kw)
    # Pairs of scales [KW, tile, g, 2 half + pair], or [KW, tile, g, 1] where a pair is two rows.
    LX: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 1, 8, 4], [KW, RW, 1, 1], [3, 2, 1, 0])
    STEP: gl.constexpr = 8 * GROUPS
    if GROUPS == 4:
        s_kw = _index(0, 4, KW, LX)
        s_off = _index(1, 4, TILES, LX) * (units * STEP) + s_kw * STEP
        s_off += _index(2, 4, 8, LX) * 4 + _index(3, 4, 4, LX)
    else:
        LS: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1], [1, 1, 8, 4], [KW, RW, 1, 1], [3, 2, 1, 0])
        s_kw = _index(0, 4, KW, LS)
        s_off = _index(1, 4, TILES, LS) * (units * STEP) + s_kw * STEP + _index(2, 4, 8, LS) + _index(3, 4, 1, LS)
    scales = (s_ptr.to(WORD, bitcast=True) + s_off, s_kw)
    # Pairs of x [KW, 1, m, 16 plane + pair].
    x_kw = _index(0, 4, KW, LX)
    x_m = _index(2, 4, BM, LX)
    x_off = x_m * (stride_xm // 2) + x_kw * 64 + _index(3, 4, 64, LX)
    return weights, scales, (x_ptr.to(WORD, bitcast=True) + x_off, x_kw, x_m < M)


@gluon.jit
def _copy_step(ring, pointers, slot, row, unit, end, units):
    """Starts the copies of the tiles ``unit + 0 .. KW`` into a slot, as one group; zeros from ``end`` on, and past M.

    Args:
        ring: shared memory for words, scales and x.
        pointers: the result of :func:`_pointers`.
        row: the first tile of the program's rows.
    """
    w_smem, s_smem, x_smem = ring
    weights, scales, x = pointers
    STEP: gl.constexpr = 8 * s_smem.shape[4]
    at = row.to(gl.int64) * units + unit
    async_copy.async_copy_global_to_shared(w_smem.index(slot), weights[0] + at * 256, mask=weights[1] + unit < end)
    async_copy.async_copy_global_to_shared(s_smem.index(slot), scales[0] + at * STEP, mask=scales[1] + unit < end)
    async_copy.async_copy_global_to_shared(x_smem.index(slot), x[0] + unit * 64, mask=x[2] & (x[1] + unit < end))
    async_copy.commit_group()


@gluon.jit
def _store(acc, out, sizes, SPLITS: gl.constexpr, BIAS: gl.constexpr):
    """Adds the column warps' sums, and stores the result, or float32 sums ``partial [SPLITS, M, N]``.

    Args:
        acc: ``[KW, BN, BM]``.
        out: ``(bias_ptr, y_ptr, partial_ptr)``.
        sizes: ``(M, N)``.
    """
    bias_ptr, y_ptr, partial_ptr = out
    M, N = sizes
    BN: gl.constexpr = acc.shape[1]
    BM: gl.constexpr = acc.shape[2]
    y = gl.sum(acc, 0)
    # Neighboring rows of the weight, which are columns of the result, to one thread.
    WARPS: gl.constexpr = gl.num_warps()
    EACH: gl.constexpr = 4 if BN * BM >= 128 * WARPS else 2
    LANES: gl.constexpr = 32 if BN // EACH >= 32 else BN // EACH
    Y: gl.constexpr = gl.BlockedLayout([EACH, 1], [LANES, 32 // LANES], [1, WARPS], [0, 1])
    y = gl.convert_layout(y, Y)
    n = gl.program_id(0) * BN + gl.arange(0, BN, gl.SliceLayout(1, Y))
    m = gl.arange(0, BM, gl.SliceLayout(0, Y))
    inside = (n < N)[:, None] & (m < M)[None, :]
    at = m[None, :] * N + n[:, None]
    if SPLITS == 1:
        if BIAS:
            y += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
        gl.store(y_ptr + at, y.to(gl.bfloat16), mask=inside)
    else:
        gl.store(partial_ptr + gl.program_id(1) * M * N + at, y, mask=inside)


@gluon.jit
def _linear_few_rows_hopper_kernel(
    x_ptr, w_ptr, s_ptr, bias_ptr, y_ptr,
    partial_ptr,  # float32 [SPLITS, M, N]
    M, N,
    units,  # K / 128
    stride_xm,
    # Use tl.constexpr: Inductor copies the parameters into code that knows only Triton's language, not Gluon's.
    GROUPS: tl.constexpr, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    COLUMN_WARPS: tl.constexpr, ROW_WARPS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All rows of x times ``BLOCK_N`` rows of the weight, over one split of the columns."""
    KW: gl.constexpr = COLUMN_WARPS
    TILES: gl.constexpr = BLOCK_N // 16
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[KW, ROW_WARPS, 1], instr_shape=[1, 16, 8]
    )
    TILE: gl.constexpr = (GROUPS, BLOCK_N, BLOCK_M, KW, ROW_WARPS)
    pointers = _pointers((x_ptr, w_ptr, s_ptr), M, units, stride_xm, TILE)
    LW: gl.constexpr = pointers[0][1].type.layout
    LS: gl.constexpr = pointers[1][1].type.layout
    LX: gl.constexpr = pointers[2][1].type.layout
    FLAT5: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    w_smem = gl.allocate_shared_memory(gl.int32, [STAGES, KW, TILES, 2, 8, 16], FLAT5)
    FLAT4: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    s_smem = gl.allocate_shared_memory(gl.int32, [STAGES, KW, TILES, 8, GROUPS], FLAT4)
    # Even and odd rows of x are in different halves of the banks.
    XS: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 2, [3, 2, 1, 0])
    x_smem = gl.allocate_shared_memory(gl.int32, [STAGES, KW, 1, BLOCK_M, 64], XS)
    ring = (w_smem, s_smem, x_smem)

    row = gl.program_id(0) * TILES
    per_split = (units + SPLITS - 1) // SPLITS
    begin = gl.program_id(1) * per_split
    end = gl.minimum(begin + per_split, units)
    unit = begin
    for stage in gl.static_range(STAGES - 1):
        _copy_step(ring, pointers, stage, row, unit, end, units)
        unit += KW
    acc = gl.zeros([KW, BLOCK_N, BLOCK_M], gl.float32, MMA)
    slot = 0
    for _ in range(begin, end, KW):
        async_copy.wait_group(STAGES - 2)
        # The barrier that belongs to the wait also says that no warp still reads the slot before this one.
        free = gl.where(slot == 0, STAGES - 1, slot - 1)
        _copy_step(ring, pointers, free, row, unit, end, units)
        unit += KW
        words = w_smem.index(slot).load(LW)
        scales = s_smem.index(slot).load(LS)
        acc = _multiply_tile(acc, words, scales, x_smem.index(slot).load(LX), GROUPS)
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
    async_copy.wait_group(0)
    _store(acc, (bias_ptr, y_ptr, partial_ptr), (M, N), SPLITS, BIAS)


@triton.jit
def _reads_and_writes(x_ptr, w_ptr, s_ptr, bias_ptr, y_ptr, partial_ptr, SPLITS: tl.constexpr):
    """The twin: it reads and writes the same tensors."""
    total = tl.load(x_ptr).to(tl.float32) + tl.load(w_ptr) + tl.load(s_ptr) + tl.load(bias_ptr)
    if SPLITS == 1:
        tl.store(y_ptr, total)
    else:
        tl.store(partial_ptr, total)


register(_linear_few_rows_hopper_kernel, "matmul", twin=_reads_and_writes)


def serves(call: LinearCall, config: HopperFewRowsConfig) -> bool:
    """Whether the kernel takes this call: Gluon can be launched, the weight's format fits, and so do rows of x."""
    fmt = call.fmt
    if not call.x.dtype == fmt.scale_dtype == torch.bfloat16 or not all_of_triton(call.x):
        return False
    if fmt.bits != 4 or fmt.has_zeros or fmt.group not in (32, 128) or fmt.in_features % 128:
        return False
    return fmt.row_tiles % (config.block_n // 16) == 0 and copies_in_16_bytes(call.rows_of_x)


def launch_few_rows_hopper(call: LinearCall, config: HopperFewRowsConfig, into: Destination) -> None:
    """Launches the kernel, and the kernel that adds splits if there are several.

    Args:
        call: a call that :func:`serves` accepts, with at most 16 rows of x.
        config: its tiles.
        into: where to write the result.
    """
    fmt, splits = call.fmt, config.num_splits
    partial = allocate_splits(call, splits, into.out)
    x, (weight, scales, _, bias) = call.rows_of_x, call.tensors
    kernel = wrap_triton(_linear_few_rows_hopper_kernel)
    kernel[(cdiv(fmt.out_features, config.block_n) * into.enabled, splits)](
        x,
        weight,
        scales,
        bias,
        into.out,
        partial,
        call.rows,
        fmt.out_features,
        fmt.column_tiles,
        x.stride(0),
        GROUPS=fmt.groups_per_tile,
        BIAS=call.bias is not None,
        BLOCK_N=config.block_n,
        BLOCK_M=8 if (static_int(call.rows) or 16) <= 8 else 16,
        COLUMN_WARPS=config.column_warps,
        ROW_WARPS=config.row_warps,
        SPLITS=splits,
        STAGES=config.num_stages,
        num_warps=config.column_warps * config.row_warps,
    )
    if splits > 1:
        launch_sum_splits(call, partial, splits, into)
