"""Helpers of the launchers: arithmetic on symbolic sizes, launch options, the memory layout of the result."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence

import torch
import triton
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flashpte.kernels import tuning
from flashpte.kernels.primitives import INTERPRETED, LOG2E, MASK_BOOL, MASK_FLOAT, MASK_NONE

# Whether a traced program may get kernels that use more than core Triton, such as Gluon. Set during lowering, which
# teaches Inductor about them.
INDUCTOR_IS_TAUGHT = False


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)``. Also takes symbolic integers and adds no guard."""
    return (a + b - 1) // b


def static_int(size: int | torch.SymInt) -> int | None:
    """The value of a static size, or ``None`` for a symbolic size. Adds no guard."""
    return size if isinstance(size, int) else None


def broadcast_stride(tensor: torch.Tensor, dim: int) -> int:
    """The stride along ``dim`` in elements; 0 if the dimension has size 1, so that it broadcasts."""
    return 0 if static_int(tensor.shape[dim]) == 1 else tensor.stride(dim)


def mask_kind(mask: torch.Tensor | None) -> int:
    """The kernels' ``MASK`` constant for ``mask``."""
    if mask is None:
        return MASK_NONE
    return MASK_BOOL if mask.dtype == torch.bool else MASK_FLOAT


def exponent_scale(dtype: torch.dtype, mask: torch.Tensor | None) -> float:
    """The kernels' ``EXP2_SCALE``, the factor from the units of the scores to base-2 exponents.

    It is log2(e) if scores stay in natural units, which is more exact (float32 tensors and float masks), else 1.
    """
    return LOG2E if dtype == torch.float32 or mask_kind(mask) == MASK_FLOAT else 1.0


def with_unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself if its last dimension is contiguous, otherwise a contiguous copy."""
    return tensor if static_int(tensor.stride(-1)) == 1 or static_int(tensor.shape[-1]) == 1 else tensor.contiguous()


def _is_data(tensor: torch.Tensor) -> bool:
    """Whether a kernel for ``tensor`` is launched now, as opposed to later by the program being traced."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def all_of_triton(tensor: torch.Tensor) -> bool:
    """Whether kernels for ``tensor`` may use more than core Triton: Gluon and dependent launches."""
    return not INTERPRETED and (_is_data(tensor) or INDUCTOR_IS_TAUGHT)


def dependent_launch(tensor: torch.Tensor) -> dict[str, bool]:
    """Launch options that let a kernel for ``tensor`` start before the previous kernel ends, if the arch supports it.

    Returns:
        The constant ``DEPENDENT``, which says whether the kernel itself waits for the kernels before it. For a launch
        now, also Triton's launch option. (In a lowered program, lowering emits dependent launches for these kernels.)
    """
    dependent = all_of_triton(tensor) and tuning.current_arch(tensor.device).capability >= (9, 0)
    return {"DEPENDENT": dependent, **({"launch_pdl": True} if dependent and _is_data(tensor) else {})}


def may_read_weights_early(dependent: dict[str, bool]) -> bool:
    """Whether a kernel with the options of :func:`dependent_launch` may read weights before it waits.

    In a lowered program weights are constants. At a launch now, the kernel before it may have written them.
    """
    return dependent["DEPENDENT"] and "launch_pdl" not in dependent


def launch_with_scratch(launch: Callable[[], None], tensor: torch.Tensor) -> None:
    """Calls ``launch`` for a kernel that needs global scratch memory, and gets that memory from PyTorch.

    Triton asks the allocator of the current context, which has none by default. Setting it in a copy of the context
    does not replace anyone else's allocator. (A lowered program allocates the memory itself.)
    """
    if not _is_data(tensor):
        launch()
        return

    def in_own_context() -> None:
        triton.set_allocator(lambda size, alignment, stream: tensor.new_empty(size, dtype=torch.int8))
        launch()

    contextvars.copy_context().run(in_own_context)


def copies_in_16_bytes(tensor: torch.Tensor) -> bool:
    """Whether every row ``tensor[..., :]`` of a 16-bit dtype is known to start and end at a multiple of 16 bytes.

    Strides must be multiples of 16 elements, because that is the divisibility that Triton and Inductor pass to the
    compiler.
    """

    def multiple(number: int | torch.SymInt, of: int) -> bool:
        return statically_known_true(number % of == 0)

    strides = [broadcast_stride(tensor, d) for d in range(tensor.dim() - 1)]
    if not multiple(tensor.shape[-1], 8) or not all(multiple(stride, 16) for stride in strides):
        return False
    return starts_at_16_bytes(tensor)


def starts_at_16_bytes(tensor: torch.Tensor) -> bool:
    """Whether a tensor is known to start at a multiple of 16 bytes. (Memory of lowered programs is aligned.)"""
    if _is_data(tensor):
        return tensor.data_ptr() % 16 == 0
    return statically_known_true(tensor.storage_offset() * tensor.itemsize % 16 == 0)


def empty_output(query: torch.Tensor, v_head_dim: int, dim_order: Sequence[int]) -> torch.Tensor:
    """Uninitialized ``[B, H_q, L_q, D_v]`` with its dimensions in memory order ``dim_order``, outermost first."""
    shape = (*query.shape[:3], v_head_dim)
    inverse = [list(dim_order).index(d) for d in range(4)]
    return query.new_empty([shape[d] for d in dim_order]).permute(inverse)
