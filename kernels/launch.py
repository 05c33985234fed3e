"""What the launchers share: symbolic-safe arithmetic, the result's memory layout."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence

import torch
import triton
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flashpte.kernels import tuning
from flashpte.kernels.primitives import INTERPRETED, LOG2E, MASK_BOOL, MASK_FLOAT, MASK_NONE

# Whether a program that is being traced may get kernels that use more than Triton's core, such as Gluon: set while
# lowering, which teaches Inductor about them.
INDUCTOR_IS_TAUGHT = False


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)`` that also takes symbolic integers without a guard."""
    return (a + b - 1) // b


def static_int(size: int | torch.SymInt) -> int | None:
    """The value of a static size, ``None`` for a symbolic one. Never adds a guard."""
    return size if isinstance(size, int) else None


def broadcast_stride(tensor: torch.Tensor, dim: int) -> int:
    """The stride to step with along ``dim``: 0 where the dimension has size 1, so that it broadcasts."""
    return 0 if static_int(tensor.shape[dim]) == 1 else tensor.stride(dim)


def mask_kind(mask: torch.Tensor | None) -> int:
    """Which of the kernels' mask cases ``mask`` is."""
    if mask is None:
        return MASK_NONE
    return MASK_BOOL if mask.dtype == torch.bool else MASK_FLOAT


def exponent_scale(dtype: torch.dtype, mask: torch.Tensor | None) -> float:
    """The kernels' ``EXP2_SCALE``: log2(e) where scores stay in natural units, which is more exact, else 1."""
    return LOG2E if dtype == torch.float32 or mask_kind(mask) == MASK_FLOAT else 1.0


def with_unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself if its last dimension is contiguous, else one contiguous copy."""
    return tensor if static_int(tensor.stride(-1)) == 1 or static_int(tensor.shape[-1]) == 1 else tensor.contiguous()


def _is_data(tensor: torch.Tensor) -> bool:
    """Whether a kernel is launched for ``tensor`` now, and not later from a program that is being traced."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def all_of_triton(tensor: torch.Tensor) -> bool:
    """Whether kernels for ``tensor`` may use more than Triton's core: Gluon, dependent launches."""
    return not INTERPRETED and (_is_data(tensor) or INDUCTOR_IS_TAUGHT)


def dependent_launch(tensor: torch.Tensor) -> dict[str, bool]:
    """How a kernel for ``tensor`` is launched beside the end of the kernel before it, where the arch can do that.

    Returns:
        The constant ``DEPENDENT``: whether the kernel waits for those before it by itself; and for a launch now
        Triton's option for it. (A lowered program's launches of kernels with that constant are made so by lowering.)
    """
    dependent = all_of_triton(tensor) and tuning.current_arch(tensor.device).capability >= (9, 0)
    return {"DEPENDENT": dependent, **({"launch_pdl": True} if dependent and _is_data(tensor) else {})}


def launch_with_scratch(launch: Callable[[], None], tensor: torch.Tensor) -> None:
    """Calls ``launch``, of a kernel that needs global memory of its own; a launch now takes it from PyTorch.

    Triton asks the allocator of the current context, and has none: in a copy of the context nobody else's is replaced.
    (In a lowered program the program allocates it.)
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

    Strides have to be multiples of 16 elements, which is what Triton and Inductor tell the compiler about integers.
    """

    def multiple(number: int | torch.SymInt, of: int) -> bool:
        return statically_known_true(number % of == 0)

    strides = [broadcast_stride(tensor, d) for d in range(tensor.dim() - 1)]
    if not multiple(tensor.shape[-1], 8) or not all(multiple(stride, 16) for stride in strides):
        return False
    if _is_data(tensor):
        return tensor.data_ptr() % 16 == 0
    return multiple(tensor.storage_offset(), 8)


def empty_output(query: torch.Tensor, v_head_dim: int, dim_order: Sequence[int]) -> torch.Tensor:
    """Uninitialised ``[B, H_q, L_q, D_v]`` whose dimensions lie in memory in ``dim_order``, outermost first."""
    shape = (*query.shape[:3], v_head_dim)
    inverse = [list(dim_order).index(d) for d in range(4)]
    return query.new_empty([shape[d] for d in dim_order]).permute(inverse)
