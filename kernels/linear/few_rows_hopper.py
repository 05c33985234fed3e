"""Few rows of x on Hopper, in Gluon: weights of 4 or 8 bits go through a ring in shared memory to tensor cores.

The result is that of the plain few-rows kernel (:mod:`flashpte.kernels.linear.plain`), for every packed format, x in 16
bits and rows of x that are aligned to 16 bytes. Unpacked weights stay in registers
(:mod:`flashpte.kernels.linear.operands`).

``x^T`` is the second operand, so M is padded to 8 or 16 only. ``COLUMN_WARPS`` warps take tiles of 128 columns in turn,
``ROW_WARPS`` warps share the rows of the weight. Packed words, scales and x wait in a ring of ``STAGES`` steps, which
``cp.async`` fills. Programs have equal shares of all steps (:mod:`flashpte.kernels.linear.shares`); copies run ahead
into a program's next block. Programs start at different columns: otherwise all would read the same few lines of x at a
time.

Shape legend: ``KW`` column warps, ``BN`` rows of the weight and ``BM`` rows of x of one program. A unit is a tile's 128
columns, a step is ``KW`` units.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch.library import wrap_triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from flashpte.kernels.facts import register
from flashpte.kernels.launch import (
    all_of_triton,
    cdiv,
    copies_in_16_bytes,
    dependent_launch,
    may_read_weights_early,
    starts_at_16_bytes,
    static_int,
)
from flashpte.kernels.linear.call import Destination, LinearCall
from flashpte.kernels.linear.operands import (
    copied_words,
    groups_of_lanes,
    held_words,
    lane_layout,
    multiply_tile,
    numbers_of,
    rows_of_sums,
    sums_of_x,
    words_in_memory,
    words_of,
    words_of_lanes,
    x_of_lanes,
    zero_sums,
)
from flashpte.kernels.linear.shares import Shares, launch_sum_shares, reads_and_writes, share_of
from flashpte.kernels.linear.tuning import MAX_FEW_ROWS, HopperFewRowsConfig
from flashpte.kernels.primitives import let_dependents_start, wait_for_earlier_kernels


@gluon.constexpr_function
def slice_to(axis, rank, layout):
    """The layout of a vector along ``axis`` that ``expand_dims`` turns into ``layout``, lower dimensions first."""
    for other in reversed(range(rank)):
        if other != axis:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def index(AXIS: gl.constexpr, RANK: gl.constexpr, SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """``0 .. SIZE`` along dimension AXIS of a tensor of rank RANK."""
    numbers = gl.arange(0, SIZE, slice_to(AXIS, RANK, LAYOUT))
    for other in gl.static_range(RANK):
        if other != AXIS:
            numbers = gl.expand_dims(numbers, other)
    return numbers


@gluon.constexpr_function
def group_words(words, column_warps, row_warps):
    """The layout in which each lane holds its row's words ``[KW, T, g, word]``: four lanes have the same ones."""
    lanes = gl.BlockedLayout([1, 1, 1, 1, words], [1, 1, 8, 4, 1], [column_warps, row_warps, 1, 1, 1], [4, 3, 2, 1, 0])
    return gl.SliceLayout(3, lanes)


@gluon.jit
def _group_pointers(ptr, WORDS: gl.constexpr, TILE: gl.constexpr):
    """Pointers to words ``[KW, tile, g, WORDS]`` of scales or zero points of the first step, and their units."""
    KW: gl.constexpr = TILE[4]
    STEP: gl.constexpr = 8 * WORDS
    EACH: gl.constexpr = WORDS if WORDS < 4 else 4
    LS: gl.constexpr = gl.BlockedLayout([1, 1, 1, EACH], [1, 1, 8, 4], [KW, TILE[5], 1, 1], [3, 2, 1, 0])
    kw = index(0, 4, KW, LS)
    off = index(1, 4, TILE[2] // 16, LS) * ((1 if TILE[7] else TILE[0]) * STEP) + kw * (0 if TILE[7] else STEP)
    off += index(2, 4, 8, LS) * WORDS + index(3, 4, WORDS, LS)
    return ptr.to(gl.pointer_type(gl.int32), bitcast=True) + off, kw


@gluon.jit
def _pointers(tensors, M, stride_xm, TILE: gl.constexpr):
    """What each thread copies of the first step: pointers and units of words, scales, zero points, and x with its rows.

    Args:
        tensors: ``(x_ptr, w_ptr, s_ptr, z_ptr)``.
        TILE: ``(UNITS, GROUPS, BN, BM, KW, RW, BITS, PER_CHANNEL, S_WORDS, Z_WORDS)``.
    """
    x_ptr, w_ptr, s_ptr, z_ptr = tensors
    UNITS: gl.constexpr = TILE[0]
    TILES: gl.constexpr = TILE[2] // 16
    BM: gl.constexpr = TILE[3]
    KW: gl.constexpr = TILE[4]
    RW: gl.constexpr = TILE[5]
    WORDS: gl.constexpr = 4 * TILE[6]
    WORD: gl.constexpr = gl.pointer_type(gl.int32)
    # Words of weights [KW, tile, half, g, word].
    LW: gl.constexpr = copied_words(TILE[6], KW, RW)
    w_kw = index(0, 5, KW, LW)
    w_off = index(1, 5, TILES, LW) * (UNITS * 16 * WORDS) + w_kw * (16 * WORDS)
    w_off += index(2, 5, 2, LW) * (8 * WORDS) + index(3, 5, 8, LW) * WORDS + index(4, 5, WORDS, LW)
    weights = (w_ptr.to(WORD, bitcast=True) + w_off, w_kw)
    scales = _group_pointers(s_ptr, TILE[8], TILE)
    zeros = _group_pointers(z_ptr, TILE[9], TILE)
    # Pairs of x [KW, 1, m, 16 plane + pair].
    LX: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 1, 8, 4], [KW, RW, 1, 1], [3, 2, 1, 0])
    x_kw = index(0, 4, KW, LX)
    x_m = index(2, 4, BM, LX)
    x_off = x_m * (stride_xm // 2) + x_kw * 64 + index(3, 4, 64, LX)
    # Quarters of the words, so that 4 words are known to be copied together.
    x_quarter = x_kw * 16 + index(3, 4, 64, LX) // 4
    return weights, scales, zeros, (x_ptr.to(WORD, bitcast=True) + x_off, x_quarter, x_m < M)


@gluon.jit
def _groups_at(memory, pointers, place, FORMAT: gl.constexpr):
    """Where a step's scales, zero points or offsets begin, and which of them are of units that exist."""
    _, tile, unit = place
    STEP: gl.constexpr = 8 * memory.shape[4]
    if FORMAT[2]:
        scales_at = tile * STEP
    else:
        scales_at = (tile * FORMAT[0] + unit) * STEP
    inside = pointers[1] + unit < FORMAT[0]
    return scales_at, inside


@gluon.jit
def _copy_weights(ring, pointers, slot, place, FORMAT: gl.constexpr):
    """Starts the copies of words, scales, and zero points or offsets of a step, zeros past the last unit.

    Args:
        ring: shared memory for words, scales, zero points or offsets, and x.
        pointers: the result of :func:`_pointers`.
        place: number of the step, its first tile of rows, and its first unit.
        FORMAT: ``(UNITS, MOVED, PER_CHANNEL)``.
    """
    weights, scales, zeros, _ = pointers
    UNITS: gl.constexpr = FORMAT[0]
    MOVED: gl.constexpr = FORMAT[1]
    TILE_WORDS: gl.constexpr = 16 * ring[0].shape[5]
    _, tile, unit = place
    at = tile * UNITS + unit
    s_at, s_inside = _groups_at(ring[1], scales, place, FORMAT)
    z_at, z_inside = _groups_at(ring[2], zeros, place, FORMAT)
    if UNITS % ring[0].shape[1] == 0:
        async_copy.async_copy_global_to_shared(ring[0].index(slot), weights[0] + at * TILE_WORDS)
        async_copy.async_copy_global_to_shared(ring[1].index(slot), scales[0] + s_at)
        if MOVED:
            async_copy.async_copy_global_to_shared(ring[2].index(slot), zeros[0] + z_at)
    else:
        async_copy.async_copy_global_to_shared(
            ring[0].index(slot), weights[0] + at * TILE_WORDS, mask=weights[1] + unit < UNITS
        )
        async_copy.async_copy_global_to_shared(ring[1].index(slot), scales[0] + s_at, mask=s_inside)
        if MOVED:
            async_copy.async_copy_global_to_shared(ring[2].index(slot), zeros[0] + z_at, mask=z_inside)


@gluon.jit
def _copy_x(ring, pointers, slot, unit, K: gl.constexpr):
    """Starts the copies of x of a step; zeros past K and past M."""
    x = pointers[3]
    KW: gl.constexpr = ring[0].shape[1]
    if K % (KW * 128) == 0:
        inside = x[2]
    else:
        inside = x[2] & (x[1] + unit * 16 < K // 8)
    async_copy.async_copy_global_to_shared(ring[3].index(slot), x[0] + unit * 64, mask=inside)


@gluon.jit
def _next_step(place, STEPS: gl.constexpr, KW: gl.constexpr, TILES: gl.constexpr):
    """The step after ``place``: its number in the sequence, its first tile of rows, and its first unit."""
    step, _, unit = place
    step += 1
    unit += KW
    return step, step // STEPS * TILES, gl.where(unit >= STEPS * KW, 0, unit)


@gluon.jit
def _store(sums, block, out, sizes, slot, WHOLE: gl.constexpr, BIAS: gl.constexpr):
    """Adds the column warps' sums, and stores the result, or float32 sums for :mod:`flashpte.kernels.linear.shares`.

    Args:
        sums: those of :func:`flashpte.kernels.linear.operands.multiply_tile`.
        block: number of the block of rows of the weight.
        out: ``(bias_ptr, y_ptr, partial_ptr)``.
        sizes: ``(M, N)``.
        slot: where in ``partial``; negative for the result.
        WHOLE: whether it is the result for all blocks.
    """
    bias_ptr, y_ptr, partial_ptr = out
    M, N = sizes
    y = gl.sum(rows_of_sums(sums), 0)
    BN: gl.constexpr = y.shape[0]
    BM: gl.constexpr = y.shape[1]
    # Neighboring rows of the weight, which are columns of the result, to one thread.
    WARPS: gl.constexpr = gl.num_warps()
    EACH: gl.constexpr = 4 if BN * BM >= 128 * WARPS else 2
    LANES: gl.constexpr = 32 if BN // EACH >= 32 else BN // EACH
    Y: gl.constexpr = gl.BlockedLayout([EACH, 1], [LANES, 32 // LANES], [1, WARPS], [0, 1])
    y = gl.convert_layout(y, Y)
    row = gl.arange(0, BN, gl.SliceLayout(1, Y))
    m = gl.arange(0, BM, gl.SliceLayout(0, Y))
    n = block * BN + row
    result = slot < 0
    if WHOLE or result:
        inside = (n < N)[:, None] & (m < M)[None, :]
        if BIAS:
            y += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
        gl.store(y_ptr + m[None, :] * N + n[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        at = slot.to(gl.int64) * (BM * BN) + m[None, :] * BN + row[:, None]
        gl.store(partial_ptr + at, y, mask=(m < M)[None, :])


@gluon.jit
def _linear_few_rows_hopper_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, bias_ptr, y_ptr,
    partial_ptr,  # float32 [2 * programs, BLOCK_M, BLOCK_N]
    M, N,
    blocks,  # of BLOCK_N rows of the weight
    stride_xm,
    # Use tl.constexpr: Inductor copies the parameters into code that knows only Triton's language, not Gluon's.
    BITS: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, PER_CHANNEL: tl.constexpr, ZEROS: tl.constexpr,
    OFFSETS: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, COLUMN_WARPS: tl.constexpr, ROW_WARPS: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, DEPENDENT: tl.constexpr, EARLY_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """All rows of x times blocks of ``BLOCK_N`` rows of the weight: a program's share of the steps.

    With ``EARLY_WEIGHTS``, the first copies of the weight start before the kernels before this one have ended.
    """
    KW: gl.constexpr = COLUMN_WARPS
    TILES: gl.constexpr = BLOCK_N // 16
    UNITS: gl.constexpr = (K + 127) // 128
    STEPS: gl.constexpr = (UNITS + KW - 1) // KW
    LANES: gl.constexpr = lane_layout(KW, ROW_WARPS)
    MOVED: gl.constexpr = ZEROS or OFFSETS
    NUMBERS: gl.constexpr = numbers_of(
        x_ptr.dtype.element_ty, s_ptr.dtype.element_ty, z_ptr.dtype.element_ty, ZEROS, OFFSETS, BITS
    )
    S_WORDS: gl.constexpr = GROUPS * words_of(NUMBERS[1])
    Z_WORDS: gl.constexpr = GROUPS * words_of(NUMBERS[2])
    TILE: gl.constexpr = (UNITS, GROUPS, BLOCK_N, BLOCK_M, KW, ROW_WARPS, BITS, PER_CHANNEL, S_WORDS, Z_WORDS)
    FORMAT: gl.constexpr = (UNITS, MOVED, PER_CHANNEL)
    if not EARLY_WEIGHTS:
        wait_for_earlier_kernels(DEPENDENT)
    pointers = _pointers((x_ptr, w_ptr, s_ptr, z_ptr), M, stride_xm, TILE)
    LW: gl.constexpr = held_words(BITS, KW, ROW_WARPS)
    LS: gl.constexpr = group_words(S_WORDS, KW, ROW_WARPS)
    LZ: gl.constexpr = group_words(Z_WORDS, KW, ROW_WARPS)
    LX: gl.constexpr = pointers[3][1].type.layout
    w_smem = gl.allocate_shared_memory(gl.int32, [STAGES, KW, TILES, 2, 8, 4 * BITS], words_in_memory(BITS))
    FLAT4: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    s_smem = gl.allocate_shared_memory(gl.int32, [STAGES, KW, TILES, 8, S_WORDS], FLAT4)
    if MOVED:
        z_smem = gl.allocate_shared_memory(gl.int32, [STAGES, KW, TILES, 8, Z_WORDS], FLAT4)
    else:
        z_smem = s_smem
    # Even and odd rows of x are in different halves of the banks.
    XS: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 2, [3, 2, 1, 0])
    x_smem = gl.allocate_shared_memory(gl.int32, [STAGES, KW, 1, BLOCK_M, 64], XS)
    ring = (w_smem, s_smem, z_smem, x_smem)

    first, last = share_of(gl.program_id(0), blocks * STEPS, gl.num_programs(0))
    # What is copied next.
    if WHOLE:
        place = (first, first // STEPS * TILES, gl.program_id(0) * STEPS // gl.num_programs(0) * KW)
    else:
        place = (first, first // STEPS * TILES, first % STEPS * KW)
    if EARLY_WEIGHTS:
        early = place
        for stage in gl.static_range(STAGES - 1):
            if early[0] < last:
                _copy_weights(ring, pointers, stage, early, FORMAT)
            early = _next_step(early, STEPS, KW, TILES)
        wait_for_earlier_kernels(DEPENDENT)
    for stage in gl.static_range(STAGES - 1):
        if place[0] < last:
            if not EARLY_WEIGHTS:
                _copy_weights(ring, pointers, stage, place, FORMAT)
            _copy_x(ring, pointers, stage, place[2], K)
        async_copy.commit_group()
        place = _next_step(place, STEPS, KW, TILES)
    slot = 0
    for block in range(first // STEPS, (last + STEPS - 1) // STEPS):
        begin = gl.maximum(block * STEPS, first)
        end = gl.minimum((block + 1) * STEPS, last)
        sums = zero_sums(KW, TILES, BLOCK_M // 8, LANES)
        for _ in range(begin, end):
            async_copy.wait_group(STAGES - 2)
            # The barrier that belongs to the wait also says that no warp still reads the slot before this one.
            if place[0] < last:
                free = gl.where(slot == 0, STAGES - 1, slot - 1)
                _copy_weights(ring, pointers, free, place, FORMAT)
                _copy_x(ring, pointers, free, place[2], K)
            async_copy.commit_group()
            place = _next_step(place, STEPS, KW, TILES)
            words = words_of_lanes(w_smem.index(slot).load(LW), LANES)
            scales = groups_of_lanes(s_smem.index(slot).load(LS), LANES)
            x = x_of_lanes(x_smem.index(slot).load(LX), LANES)
            if MOVED:
                zeros = groups_of_lanes(z_smem.index(slot).load(LZ), LANES)
            else:
                zeros = ()
            x_sums = sums_of_x(x, GROUPS, NUMBERS)
            sums = multiply_tile(sums, words, x, scales, zeros, x_sums, GROUPS, NUMBERS)
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        if end == last:
            let_dependents_start(DEPENDENT)
        begins = begin == block * STEPS
        partial_slot = 2 * gl.program_id(0) + begins.to(gl.int32)
        partial_slot = gl.where(begins & (end == (block + 1) * STEPS), -1, partial_slot)
        _store(sums, block, (bias_ptr, y_ptr, partial_ptr), (M, N), partial_slot, WHOLE, BIAS)
    async_copy.wait_group(0)


register(_linear_few_rows_hopper_kernel, "matmul", early_start="DEPENDENT", twin=reads_and_writes)

_16_BITS = (torch.bfloat16, torch.float16)


def fits_in_registers(call: LinearCall) -> bool:
    """Whether kernels in Gluon can be launched for this call, and copy its x and its weight."""
    if call.x.dtype not in _16_BITS or not all_of_triton(call.x) or call.weight.nbytes >= 2**33:
        return False
    return copies_in_16_bytes(call.rows_of_x) and all(map(starts_at_16_bytes, call.tensors[:3]))


def serves(call: LinearCall, config: HopperFewRowsConfig) -> bool:
    """Whether the kernel takes this call: blocks divide the weight's rows, and :func:`fits_in_registers`."""
    return call.fmt.row_tiles % (config.block_n // 16) == 0 and fits_in_registers(call)


def launch_few_rows_hopper(call: LinearCall, config: HopperFewRowsConfig, into: Destination) -> None:
    """Launches the kernel, and the kernel that adds the sums of shared blocks if there are any.

    Args:
        call: a call that :func:`serves` accepts, with at most 16 rows of x.
        config: its tiles.
        into: where to write the result.
    """
    fmt = call.fmt
    x = call.rows_of_x
    block_m = 8 if (static_int(call.rows) or MAX_FEW_ROWS) <= 8 else 16
    blocks, steps = fmt.row_tiles // (config.block_n // 16), cdiv(fmt.column_tiles, config.column_warps)
    programs = min(config.num_programs or blocks, blocks * steps)
    whole = blocks % programs == 0
    shares = Shares(block_m, config.block_n, 1, 0, blocks, steps, programs)
    partial = into.out if whole else shares.empty_sums(x)
    dependent = dependent_launch(call.x)
    kernel = wrap_triton(_linear_few_rows_hopper_kernel)
    kernel[(programs * into.enabled,)](
        x,
        *call.tensors,
        into.out,
        partial,
        call.rows,
        fmt.out_features,
        blocks,
        x.stride(0),
        BITS=fmt.bits,
        K=fmt.in_features,
        GROUPS=fmt.groups_per_tile,
        PER_CHANNEL=fmt.per_channel,
        ZEROS=fmt.has_zeros,
        OFFSETS=fmt.has_offsets,
        BIAS=call.bias is not None,
        BLOCK_N=config.block_n,
        BLOCK_M=block_m,
        COLUMN_WARPS=config.column_warps,
        ROW_WARPS=config.row_warps,
        STAGES=config.num_stages,
        WHOLE=whole,
        EARLY_WEIGHTS=may_read_weights_early(dependent),
        num_warps=config.column_warps * config.row_warps,
        **dependent,
    )
    if not whole:
        launch_sum_shares(call, partial, shares, into)
