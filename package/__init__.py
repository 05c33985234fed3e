"""Attention kernels and compiler passes for ``torch.export`` programs lowered to CUDA.

The three rooms are imported separately, because they need different things installed:

* :mod:`flashpte.kernels` registers the ``flashpte::`` operators (needs torch and triton);
* :mod:`flashpte.passes` rewrites exported programs to use them (needs the kernels);
* :mod:`flashpte.export` builds ``.pte`` and ``.pt2`` files (needs ExecuTorch and transformers).
"""

__version__ = "0.1.0"
