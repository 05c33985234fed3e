"""Equal shares of the steps of a product: each program takes a run of steps, wherever a block of rows begins or ends.

The steps of all blocks of rows form one sequence, block by block. Of ``programs`` programs the first ones take one step
more, if the steps do not divide ("stream-K", Osama et al., 2023). So all multiprocessors have the same work, whatever
the number of blocks is. A program stores the result of a block that it has alone. Of another block it stores float32
sums, of which it has at most two: a block that it ends and a block that it begins. A second launch adds the sums of a
block, first to last, so that results do not depend on timing.

Sums are ``partial [2 * programs, BLOCK_M, BLOCK_N]``: at ``2 p`` those of a block that program p does not begin, at
``2 p + 1`` those of one that it begins and does not end. Block b has the rows of x ``b % m_blocks`` and the rows of the
weight ``b // m_blocks``, in units of ``BLOCK_M`` and ``BLOCK_N``.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from flashpte.kernels.facts import register
from flashpte.kernels.launch import dependent_launch
from flashpte.kernels.linear.call import Destination, LinearCall
from flashpte.kernels.primitives import let_dependents_start, wait_for_earlier_kernels


@triton.jit
def share_of(program, total, programs):
    """The first step of a program, and the first after its last."""
    each = total // programs
    more = total % programs
    first = program * each + tl.minimum(program, more)
    return first, first + each + (program < more).to(tl.int32)


@triton.jit
def owner_of(step, total, programs):
    """The program that has a step."""
    each = total // programs
    more = total % programs
    bound = more * (each + 1)
    return tl.where(step < bound, step // (each + 1), more + (step - bound) // each)


@triton.jit
def _linear_sum_shares_kernel(
    partial_ptr, bias_ptr, y_ptr, M, N,
    total,  # steps of the shared blocks
    programs,
    steps,  # of one block
    m_blocks,
    first_block,  # that is shared
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Adds the sums of the block that a program begins and does not end, ``ROWS`` rows of x, and the bias."""
    program = tl.program_id(0)
    begin, last = share_of(program, total, programs)
    block = (last - 1) // steps
    end = (block + 1) * steps
    wait_for_earlier_kernels(DEPENDENT)
    if (begin < last) & (block * steps >= begin) & (last < end):
        m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        n = tl.arange(0, BLOCK_N)
        at = m[:, None] * BLOCK_N + n[None, :]
        block += first_block
        m_of_all = block % m_blocks * BLOCK_M + m
        n_of_all = block // m_blocks * BLOCK_N + n
        ok = (m_of_all < M)[:, None] & (n_of_all < N)[None, :]
        sums = tl.load(partial_ptr + (2 * program + 1) * (BLOCK_M * BLOCK_N) + at, mask=ok, other=0.0)
        for other in range(program + 1, owner_of(end - 1, total, programs) + 1):
            sums += tl.load(partial_ptr + 2 * other * (BLOCK_M * BLOCK_N) + at, mask=ok, other=0.0)
        if BIAS:
            sums += tl.load(bias_ptr + n_of_all, mask=n_of_all < N, other=0.0).to(tl.float32)[None, :]
        y_ptrs = y_ptr + m_of_all.to(tl.int64)[:, None] * N + n_of_all[None, :]
        tl.store(y_ptrs, sums.to(y_ptr.dtype.element_ty), mask=ok)
    let_dependents_start(DEPENDENT)


register(_linear_sum_shares_kernel, "matmul", early_start="DEPENDENT")


@triton.jit
def full_waves(blocks, programs):
    """How many waves whole blocks fill, one per program. Blocks that fill nine tenths of a wave are one.

    (The host calls ``full_waves.fn`` with integers, so that it agrees with the kernel.)
    """
    return (blocks + programs // 10) // programs


@triton.jit
def reads_and_writes(x_ptr, w_ptr, s_ptr, z_ptr, bias_ptr, y_ptr, partial_ptr, WHOLE: tl.constexpr):
    """The twin of kernels that share steps: it reads and writes the same tensors."""
    total = tl.load(x_ptr).to(tl.float32) + tl.load(w_ptr) + tl.load(s_ptr) + tl.load(z_ptr) + tl.load(bias_ptr)
    tl.store(y_ptr, total)
    if not WHOLE:
        tl.store(partial_ptr, total)


@dataclasses.dataclass(frozen=True)
class Shares:
    """How the work of a launch is shared.

    Attributes:
        block_m, block_n: rows of x and of the weight of a block.
        m_blocks: blocks along the rows of x; may be symbolic.
        first: the first block that is shared; may be symbolic.
        blocks: how many are shared; may be symbolic.
        steps: steps of a block.
        programs: programs that share the steps.
    """

    block_m: int
    block_n: int
    m_blocks: int
    first: int
    blocks: int
    steps: int
    programs: int

    def empty_sums(self, like: torch.Tensor) -> torch.Tensor:
        """Uninitialized memory for the programs' sums."""
        return like.new_empty((2 * self.programs * self.block_m * self.block_n,), dtype=torch.float32)


def launch_sum_shares(call: LinearCall, partial: torch.Tensor, shares: Shares, into: Destination) -> None:
    """Adds the sums of blocks that several programs share, and the bias, into the result."""
    rows = min(shares.block_m, max(1, 2048 // shares.block_n))
    kernel = wrap_triton(_linear_sum_shares_kernel)
    kernel[(shares.programs * into.enabled, shares.block_m // rows)](
        partial,
        call.tensors[-1],
        into.out,
        call.rows,
        call.fmt.out_features,
        shares.blocks * shares.steps,
        shares.programs,
        shares.steps,
        shares.m_blocks,
        shares.first,
        BLOCK_M=shares.block_m,
        BLOCK_N=shares.block_n,
        ROWS=rows,
        BIAS=call.bias is not None,
        num_warps=4,
        **dependent_launch(call.x),
    )
