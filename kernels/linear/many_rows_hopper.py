"""Many rows of x on Hopper, in Gluon: two warp groups dequantize the weight in registers and multiply with ``wgmma``.

The result is that of the plain many-rows kernel (:mod:`flashpte.kernels.linear.plain`), for every packed format, x in
16 bits and rows of x that are aligned to 16 bytes. Weights are the first operand, in registers
(:mod:`flashpte.kernels.linear.dequantize`); ``x^T`` is the second, in shared memory. One group's products run while the
other dequantizes its next columns. Four more warps copy packed words and x with ``cp.async``.

A block has ``BLOCK_N`` rows of the weight and ``BLOCK_M`` rows of x. Programs take whole blocks in waves. Blocks that
do not fill a wave are shared equally (:mod:`flashpte.kernels.linear.shares`).

Shape legend: ``R`` rows of the weight of one warp group, half of a program's; ``BM`` rows of x.
"""

from __future__ import annotations

import torch
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
from flashpte.kernels.launch import cdiv, dependent_launch
from flashpte.kernels.linear.call import Destination, LinearCall
from flashpte.kernels.linear.dequantize import (
    dequantize,
    dequantize_bytes,
    float_offsets,
    floats_of_planes,
    kind_of,
    of_planes,
)
from flashpte.kernels.linear.few_rows_hopper import fits_in_registers, index
from flashpte.kernels.linear.shares import Shares, full_waves, launch_sum_shares, reads_and_writes, share_of
from flashpte.kernels.linear.store_columns import store_columns
from flashpte.kernels.linear.tuning import HopperManyRowsConfig
from flashpte.kernels.primitives import let_dependents_start, wait_for_earlier_kernels


@gluon.jit
def _segments(blocks, units):
    """How a program's work is made up: full waves of blocks, then its share of the blocks that are left.

    In a wave all programs are at the same columns at a time, so that they share x and the weight in L2.

    Returns:
        ``(waves, first, last)``: the program's blocks in waves, and its steps of the blocks left.
    """
    programs = gl.num_programs(0)
    waves = full_waves(blocks, programs)
    left = gl.maximum(blocks - waves * programs, 0)
    first, last = share_of(gl.program_id(0), left * units, programs)
    # The last wave may lack blocks.
    waves -= (gl.program_id(0) + (waves - 1) * programs >= blocks).to(gl.int32)
    return waves, first, last


@gluon.jit
def _segment(i, segments, blocks, units):
    """One segment of a program's work.

    The copying and the multiplying warps must count steps alike, so the number of steps before a segment is computed
    from ``i``. Do not carry a counter from segment to segment. Constant propagation (SCCP) in Triton 3.6 and 3.7 folds
    it to 0 in the last function of ``warp_specialize``, and the warps deadlock.

    Returns:
        ``(block, begin, end, done)``: the block, its first unit, its end unit, and the steps before the segment.
    """
    waves, first, last = segments
    programs = gl.num_programs(0)
    if i < waves:
        block = gl.program_id(0) + i * programs
        begin = block * 0
        end = units + begin
        done = i * units
    else:
        left = first // units + i - waves
        block = full_waves(blocks, programs) * programs + left
        begin = gl.maximum(first - left * units, 0)
        end = gl.minimum(last - left * units, units)
        done = (waves + left) * units + begin - first
    return block, begin, end, done


@gluon.jit
def _number_of_segments(segments, units):
    waves, first, last = segments
    return waves + (last + units - 1) // units - first // units


@gluon.constexpr_function
def group_words(words):
    """The layout of words ``[R / 16, g, words]`` of scales: the four lanes of a row have the same."""
    return gl.SliceLayout(2, gl.BlockedLayout([1, 1, 1, words], [1, 8, 4, 1], [4, 1, 1, 1], [3, 2, 1, 0]))


@gluon.jit
def _group_pointers(ptr, rows, columns, T: gl.constexpr, GROUPS: gl.constexpr, DTYPE: gl.constexpr):
    """Pointers to words ``[T, g, words]`` of scales, zero points or offsets: one of 32 bits, or two of 16.

    Args:
        rows: ``(first, row_tiles)``: the first tile of rows, and the end. Tiles past the last one repeat it.
        columns: ``(units, begin)``: tiles of columns, and the first of them.
    """
    WORDS: gl.constexpr = GROUPS * 2 if gl.float32 == DTYPE else GROUPS
    LS: gl.constexpr = group_words(WORDS)
    tile = gl.minimum(rows[0] + index(0, 3, T, LS), rows[1] - 1)
    offsets = (tile * columns[0] + columns[1]) * (8 * WORDS) + index(1, 3, 8, LS) * WORDS + index(2, 3, WORDS, LS)
    return ptr + offsets


@gluon.jit
def _multiply(smem, barriers, groups, place, out, sizes, FORMAT: gl.constexpr, HALF: gl.constexpr):
    """A warp group: half of the rows of the weight of a program's blocks times their rows of x.

    Args:
        smem: ``(x0, x1, words)``: columns 0 to 63 and 64 to 127 of x, and packed words, all with slots.
        barriers: ``(full, empty)``.
        groups: pointers to words of scales, and of zero points or offsets.
        place: ``(blocks, units, m_blocks, row_tiles)``.
        out, sizes, FORMAT: as for :func:`flashpte.kernels.linear.store_columns.store_columns`.
    """
    x0_smem, x1_smem, w_smem = smem
    full, empty = barriers
    s_ptr, z_ptr = groups
    blocks, units, m_blocks, row_tiles = place
    GROUPS: gl.constexpr = FORMAT[0]
    ZEROS: gl.constexpr = FORMAT[1]
    STAGES: gl.constexpr = w_smem.shape[0]
    BN: gl.constexpr = w_smem.shape[1]
    R: gl.constexpr = BN // 2
    BM: gl.constexpr = x0_smem.shape[1]
    DTYPE: gl.constexpr = x0_smem.dtype
    BYTES: gl.constexpr = w_smem.shape[2] == 64
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    # A word of two codes of 8 bits is two columns of A.
    WORDS: gl.constexpr = gl.DotOperandLayout(0, MMA, 1) if BYTES else A
    ROW: gl.constexpr = gl.SliceLayout(1, WORDS)
    S_DTYPE: gl.constexpr = FORMAT[7]
    Z_DTYPE: gl.constexpr = FORMAT[8]
    KIND: gl.constexpr = "float" if BYTES else kind_of(DTYPE, S_DTYPE, Z_DTYPE, ZEROS, FORMAT[6])
    # With one scale per row, all steps have the same words.
    S_STEP: gl.constexpr = 0 if FORMAT[9] else 8
    BITS: gl.constexpr = 8 if BYTES else 4
    MOVED: gl.constexpr = ZEROS or FORMAT[6]
    segments = _segments(blocks, units)
    for i in range(_number_of_segments(segments, units)):
        block, begin, end, done = _segment(i, segments, blocks, units)
        n_first = block // m_blocks * BN + HALF * R
        rows = (n_first // 16, row_tiles)
        if FORMAT[9]:
            columns = (1, 0)
        else:
            columns = (units, begin)
        s_ptrs = _group_pointers(s_ptr, rows, columns, R // 16, GROUPS, S_DTYPE)
        z_ptrs = _group_pointers(z_ptr, rows, columns, R // 16, GROUPS, Z_DTYPE)
        s_words = gl.load(s_ptrs)
        if MOVED:
            z_words = gl.load(z_ptrs)
        acc = gl.zeros([R, BM], gl.float32, MMA)
        stop = done + end - begin
        for step in range(done, stop):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), (step // STAGES) & 1)
            fence_async_shared()
            words = w_smem.index(slot).slice(HALF * R, R, 0).load(WORDS)
            if KIND == "float":
                scales = floats_of_planes(s_words, S_DTYPE, ROW)
            else:
                scales = of_planes(s_words, DTYPE, False, ROW)
            s_ptrs += S_STEP * s_words.shape[2]
            s_words = gl.load(s_ptrs, mask=step + 1 < stop, other=0)
            if MOVED:
                if KIND == "float":
                    moved = floats_of_planes(z_words, Z_DTYPE, ROW)
                else:
                    moved = of_planes(z_words, DTYPE, KIND == "whole", ROW)
                z_ptrs += S_STEP * z_words.shape[2]
                z_words = gl.load(z_ptrs, mask=step + 1 < stop, other=0)
            else:
                moved = ()
            if KIND == "float":
                moved = float_offsets(scales, moved, ZEROS, FORMAT[6], BITS)
            if BYTES:
                low = dequantize_bytes(words, scales, moved, DTYPE, A, False)
            else:
                low = dequantize(words, scales, moved, DTYPE, KIND, False)
            acc = warpgroup_mma(low, x0_smem.index(slot).permute([1, 0]), acc, is_async=True)
            if BYTES:
                high = dequantize_bytes(words, scales, moved, DTYPE, A, True)
            else:
                high = dequantize(words, scales, moved, DTYPE, KIND, True)
            acc = warpgroup_mma(high, x1_smem.index(slot).permute([1, 0]), acc, is_async=True)
            # The other warp group's products run while this one waits, and dequantizes its next columns.
            acc, low, high = warpgroup_mma_wait(0, [acc, low, high])
            # Each thread arrives by itself: it has no copies to wait for.
            async_copy.mbarrier_arrive(empty.index(slot), increment_count=False)
        slot_of_sums = 2 * gl.program_id(0) + (begin == 0).to(gl.int32)
        slot_of_sums = gl.where((begin == 0) & (end == units), -1, slot_of_sums)
        at = (n_first, block % m_blocks * BM, HALF * R, 0)
        store_columns(acc, at, out, sizes, slot_of_sums, FORMAT)


@gluon.jit
def _copy(smem, barriers, pointers, place, x_sizes, CHECK_K: gl.constexpr):
    """The warps that copy x and packed words; zeros past the last rows and columns.

    Args:
        smem, barriers, place: as for :func:`_multiply`.
        pointers: ``(x_ptr, w_ptr)``.
        x_sizes: ``(M, K, stride_xm)``.
    """
    x0_smem, x1_smem, w_smem = smem
    full, empty = barriers
    x_ptr, w_ptr = pointers
    blocks, units, m_blocks, row_tiles = place
    M, K, stride_xm = x_sizes
    STAGES: gl.constexpr = w_smem.shape[0]
    BM: gl.constexpr = x0_smem.shape[1]
    BN: gl.constexpr = w_smem.shape[1]
    # A few rows at a time, because the addresses of more would need more registers than a producer has.
    CX: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    WIDTH: gl.constexpr = w_smem.shape[2]
    CW: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    ROWS: gl.constexpr = 1024 // WIDTH
    column = gl.arange(0, 64, gl.SliceLayout(0, CX))
    row = gl.arange(0, 16, gl.SliceLayout(1, CX))
    w_row = gl.arange(0, ROWS, gl.SliceLayout(1, CW))
    word = gl.arange(0, WIDTH, gl.SliceLayout(0, CW))
    x_off = (row * stride_xm)[:, None] + column[None, :]
    w_off = (w_row // 16 * (units * (16 * WIDTH)) + w_row % 16 * WIDTH)[:, None] + word[None, :]
    segments = _segments(blocks, units)
    for i in range(_number_of_segments(segments, units)):
        block, begin, end, done = _segment(i, segments, blocks, units)
        m_first = block % m_blocks * BM
        n_tile = block // m_blocks * (BN // 16)
        x_source = x_ptr + m_first.to(gl.int64) * stride_xm + begin * 128 + x_off
        w_source = w_ptr + (n_tile.to(gl.int64) * units + begin) * (16 * WIDTH) + w_off
        columns = K - begin * 128
        stop = done + end - begin
        for step in range(done, stop):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            for chunk in gl.static_range(BN // ROWS):
                ok = w_row // 16 + chunk * (ROWS // 16) < row_tiles - n_tile
                words = w_smem.index(slot).slice(chunk * ROWS, ROWS, 0)
                async_load(words, w_source + chunk * (ROWS // 16) * units * (16 * WIDTH), mask=ok[:, None])
            for chunk in gl.static_range(BM // 16):
                ok = (row + chunk * 16 < M - m_first)[:, None]
                source = x_source + chunk * 16 * stride_xm
                x0 = x0_smem.index(slot).slice(chunk * 16, 16, 0)
                x1 = x1_smem.index(slot).slice(chunk * 16, 16, 0)
                if CHECK_K:
                    async_load(x0, source, mask=ok & (column < columns)[None, :])
                    async_load(x1, source + 64, mask=ok & (column + 64 < columns)[None, :])
                else:
                    async_load(x0, source, mask=ok)
                    async_load(x1, source + 64, mask=ok)
            async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
            x_source += 128
            w_source += 16 * WIDTH
            columns -= 128


@gluon.jit
def _linear_many_rows_hopper_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, bias_ptr, y_ptr,
    partial_ptr,  # float32 [2 * programs, BLOCK_M, BLOCK_N]
    M, N, K,
    units,  # K / 128, rounded up: the steps of a block
    row_tiles, m_blocks, blocks, stride_xm,
    # Use tl.constexpr: Inductor copies the parameters into code that knows only Triton's language, not Gluon's.
    GROUPS: tl.constexpr, ZEROS: tl.constexpr, OFFSETS: tl.constexpr, PER_CHANNEL: tl.constexpr, BIAS: tl.constexpr,
    CHECK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
    CONSUMER_REGISTERS: tl.constexpr, PRODUCER_REGISTERS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Blocks of ``BLOCK_M`` rows of x times ``BLOCK_N`` rows of the weight: a program's share of the steps.

    Blocks with the same rows of the weight follow each other, so that they share them in L2.
    """
    XS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    # Codes of 8 bits are read as words of two.
    WIDTH: gl.constexpr = 64 if w_ptr.dtype.element_ty == gl.int8 else 32
    WS: gl.constexpr = gl.SwizzledSharedLayout(8, 64 // WIDTH, WIDTH // 8, [1, 0])
    x0_smem = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, BLOCK_M, 64], XS)
    x1_smem = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, BLOCK_M, 64], XS)
    w_smem = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK_N, WIDTH], WS)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=128)
        mbarrier.init(empty.index(stage), count=256)
    wait_for_earlier_kernels(DEPENDENT)
    WORD: gl.constexpr = gl.pointer_type(gl.int32)
    words = w_ptr.to(gl.pointer_type(gl.int16), bitcast=True)
    groups = (s_ptr.to(WORD, bitcast=True), z_ptr.to(WORD, bitcast=True))
    smem = (x0_smem, x1_smem, w_smem)
    barriers = (full, empty)
    place = (blocks, units, m_blocks, row_tiles)
    out = (bias_ptr, y_ptr, partial_ptr)
    S_DTYPE: gl.constexpr = s_ptr.dtype.element_ty
    Z_DTYPE: gl.constexpr = z_ptr.dtype.element_ty
    FORMAT: gl.constexpr = (GROUPS, ZEROS, WHOLE, BIAS, BLOCK_M, BLOCK_N, OFFSETS, S_DTYPE, Z_DTYPE, PER_CHANNEL)
    gl.warp_specialize(
        [
            (_multiply, (smem, barriers, groups, place, out, (M, N), FORMAT, 0)),
            (_multiply, (smem, barriers, groups, place, out, (M, N), FORMAT, 1)),
            (_copy, (smem, barriers, (x_ptr, words), place, (M, K, stride_xm), CHECK_K)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
    let_dependents_start(DEPENDENT)


register(_linear_many_rows_hopper_kernel, "matmul", early_start="DEPENDENT", twin=reads_and_writes)


def serves(call: LinearCall) -> bool:
    """Whether the kernel takes this call: :func:`fits_in_registers`."""
    return fits_in_registers(call)


def launch_many_rows_hopper(call: LinearCall, config: HopperManyRowsConfig, into: Destination) -> None:
    """Launches the kernel, and the kernel that adds the sums of shared blocks if there can be any.

    Args:
        call: a call that :func:`serves` accepts.
        config: its tiles.
        into: where to write the result.
    """
    fmt = call.fmt
    x = call.rows_of_x
    m_blocks = cdiv(call.rows, config.block_m)
    blocks = m_blocks * cdiv(fmt.out_features, config.block_n)
    whole = config.num_programs == 0
    programs = config.num_programs or blocks
    first = 0 if whole else full_waves.fn(blocks, programs) * programs
    left = 0 if whole else torch.sym_max(blocks - first, 0)
    shares = Shares(config.block_m, config.block_n, m_blocks, first, left, fmt.column_tiles, programs)
    partial = into.out if whole else shares.empty_sums(x)
    kernel = wrap_triton(_linear_many_rows_hopper_kernel)
    kernel[(programs * into.enabled,)](
        x,
        *call.tensors,
        into.out,
        partial,
        *(call.rows, fmt.out_features, fmt.in_features),
        *(fmt.column_tiles, fmt.row_tiles, m_blocks, blocks),
        x.stride(0),
        GROUPS=fmt.groups_per_tile,
        ZEROS=fmt.has_zeros,
        OFFSETS=fmt.has_offsets,
        PER_CHANNEL=fmt.per_channel,
        BIAS=call.bias is not None,
        CHECK_K=fmt.in_features % 128 != 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        WHOLE=whole,
        CONSUMER_REGISTERS=232,
        PRODUCER_REGISTERS=48,
        num_warps=4,
        **dependent_launch(call.x),
    )
    if not whole:
        launch_sum_shares(call, partial, shares, into)
