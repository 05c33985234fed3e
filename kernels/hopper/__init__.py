"""The Hopper kernel, with producer and consumer warps. The softmax overlaps with matrix products.

It serves prefill, verify and wide decode, with the same results, arguments and tile maps as
:mod:`flashpte.kernels.tiled` and :mod:`flashpte.kernels.split_k`. It is written in Gluon, Triton's language for layouts
and synchronization, because plain Triton leaves the tensor cores idle during every softmax. A program has three warp
groups: a producer that copies tiles of keys and values into a ring in shared memory, and two consumers with 64 rows
each. A consumer issues ``Q K`` of tile ``i`` and ``P V`` of tile ``i - 1`` together, and computes the softmax of tile
``i`` while ``P V`` still runs (the intra-warpgroup pipelining of FlashAttention-3, arXiv:2407.08608, section 3.2).

* Prefill: each consumer has its own rows. If D_v is above 256, the accumulator does not fit in registers. Two programs
  then share the columns of V, and each computes all scores, which is 1.5x the minimum arithmetic. A few rows with a
  long context fill the GPU by splitting the keys.
  Rows of 80, 96, 160 or 192 columns are two blocks of columns (:func:`flashpte.kernels.tuning.hopper_columns`):
  scores are the sum of two products, and ``P V`` has two accumulators.
* Few rows (``share_rows``): the ``L_q x H_q / H_kv`` rows that read the same keys are packed into one tile of 64 rows.
  Both consumers compute its scores, and each has half of the columns of V. The kernel is still memory-bound: on an
  H200, 64 rows with D = 512 take 1.2x the time of reading the keys and values once.

In prefill, TMA copies keys and values for head dims up to 256, and for wider rows that are narrower than their tiles
(such as D = 320 or 384). AOTInductor cannot pass TMA descriptors (tensor maps), so each program makes its own, after it
has issued copies of the first two tiles with ``cp.async``. ``cp.async`` copies everything else: query rows, static
contexts of up to four tiles, D = 512, and keys and values for few rows (``share_rows``), whose splits are too short for
tensor maps.

Copies need strides and addresses that are multiples of 16 bytes. :func:`flashpte.kernels.hopper.launch.serves` checks
that.
"""

from flashpte.kernels.hopper.kernel import _hopper_kernel
from flashpte.kernels.hopper.launch import launch_hopper, serves

__all__ = ["_hopper_kernel", "launch_hopper", "serves"]
