"""The kernel for Hopper: warps that copy, warps that compute, softmax under the matrix products of the next tile.

For prefill, verify and wide decode: the same results, arguments and tile maps as :mod:`flashpte.kernels.tiled` and
:mod:`flashpte.kernels.split_k`. Written in Gluon, Triton's language for layouts and synchronisation, because Triton
proper leaves the tensor cores idle during every softmax. One program has three warp groups: a producer that copies
tiles of keys and values into a ring in shared memory (``cp.async``), and two consumers with 64 rows each. A consumer
issues ``Q K`` of tile ``i`` and ``P V`` of tile ``i - 1`` together and computes the softmax of tile ``i`` while ``P V``
still runs (the pipelining within a warp group of FlashAttention-3, arXiv:2407.08608, section 3.2).

* Prefill: consumers have rows of their own. Where D_v is above 256 the accumulator does not fit in registers: programs
  then share the columns of V and each computes the scores for itself, half as much again as the least arithmetic. Few
  rows over a long context fill the GPU by splitting the keys.
* Few rows (``share_rows``): the ``L_q x H_q / H_kv`` rows that read the same keys are packed into one tile of 64, both
  consumers compute its scores, and each has half of the columns of V. Memory still bounds the time: on an H200 64 rows
  of D = 512 take 1.2 times the time of reading the keys and values once.

Copies do not use TMA: its descriptors do not go through AOTInductor. They need strides and addresses that are multiples
of 16 bytes; :func:`flashpte.kernels.hopper.launch.serves` decides.
"""

from flashpte.kernels.hopper.kernel import _hopper_kernel
from flashpte.kernels.hopper.launch import launch_hopper, serves

__all__ = ["_hopper_kernel", "launch_hopper", "serves"]
