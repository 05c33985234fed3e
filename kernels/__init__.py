"""Kernels registered as ``flashpte::`` operators.

============================ ==================== ==========================================
operator                     L_q                  kernel
============================ ==================== ==========================================
``flashpte::sdpa_decode``    1                    split-K (:mod:`flashpte.kernels.split_k`)
``flashpte::sdpa_verify``    1 to 16              split-K (:mod:`flashpte.kernels.split_k`)
``flashpte::sdpa_prefill``   any                  tiled (:mod:`flashpte.kernels.tiled`)
``flashpte::sdpa_dispatch``  any                  split-K up to 16 rows, else tiled, by the L_q of the call
``flashpte::tile_map``       (of a mask)          :mod:`flashpte.kernels.tile_map`
``flashpte::interval_map``   (of intervals)       :mod:`flashpte.kernels.intervals`
============================ ==================== ==========================================

``flashpte::quantized_linear`` is a linear layer with weights of 4 or 8 bits, and ``flashpte::quantized_embedding``
picks rows of such a weight (:mod:`flashpte.kernels.linear`). ``flashpte::few_rows_linear`` is a linear layer with
16-bit weights and at most 16 rows of x (:mod:`flashpte.kernels.dense`). ``flashpte::delta_recurrent`` is the gated
delta rule of up to 16 tokens (:mod:`flashpte.kernels.delta`).

On sm_90, the Hopper kernel (:mod:`flashpte.kernels.hopper`) replaces the split-K kernel and the tiled kernel in most
16-bit calls with more than 16 packed rows (L_q x H_q / H_kv). It serves prefill with more than 64 query rows or a
dynamic L_q. It serves decode and verify above 16 packed rows if D_v is above 64 and there is no causal flag.
:mod:`flashpte.kernels.tuning.hopper` lists the exceptions.
"""

from flashpte.kernels.delta import delta_recurrent, delta_reference
from flashpte.kernels.dense import few_rows_linear
from flashpte.kernels.linear import quantized_embedding, quantized_linear
from flashpte.kernels.ops import sdpa_decode, sdpa_dispatch, sdpa_prefill, sdpa_verify
from flashpte.kernels.reference import attention_reference

__all__ = [
    "attention_reference",
    "delta_recurrent",
    "delta_reference",
    "few_rows_linear",
    "quantized_embedding",
    "quantized_linear",
    "sdpa_decode",
    "sdpa_dispatch",
    "sdpa_prefill",
    "sdpa_verify",
]
