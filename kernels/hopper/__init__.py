"""The tiled kernel for Hopper: warps that copy, warps that compute, and the softmax of one tile under the matrix
products of the next.

Same result, arguments and tile maps as :mod:`flashpte.kernels.tiled`; written in Gluon, Triton's language for layouts
and synchronisation, because Triton proper leaves the tensor cores idle during every softmax. One program has three warp
groups: a producer that copies tiles of keys and values into a ring in shared memory (``cp.async``), and two consumers
that own 64 query rows each. A consumer issues ``Q K`` of tile ``i`` and ``P V`` of tile ``i - 1`` together and computes
the softmax of tile ``i`` while ``P V`` still runs (the pipelining within a warp group of FlashAttention-3,
arXiv:2407.08608, section 3.2). Where D_v is above 256 the accumulator does not fit in registers: programs then share
the columns of V and each computes the scores for itself, half as much again as the least arithmetic.

Copies do not use TMA: its descriptors do not go through AOTInductor. They need strides and addresses that are multiples
of 16 bytes; :func:`flashpte.kernels.tiled.launch_tiled` decides.
"""

from flashpte.kernels.hopper.kernel import _hopper_kernel
from flashpte.kernels.hopper.launch import launch_hopper, serves

__all__ = ["_hopper_kernel", "launch_hopper", "serves"]
