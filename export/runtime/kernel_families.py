"""Which part of a model a GPU kernel belongs to, by its name."""

from __future__ import annotations

import re
from typing import Literal, get_args

Family = Literal["attention", "matmul", "rest"]
FAMILIES: tuple[Family, ...] = get_args(Family)

# flashpte's own kernels, masks' tile maps among them: they exist for attention alone.
FLASHPTE_KERNELS = frozenset(
    {
        "_split_k_kernel",
        "_combine_kernel",
        "_tiled_kernel",
        "_hopper_kernel",
        "_classify_kernel",
        "_classify_intervals_kernel",
        "_compact_kernel",
    }
)

# ExecuTorch's replacement and libraries' fused attention; and attention written out, where Inductor names a kernel
# after the operators in it: batched products, the softmax and heads copied for their group are found in attention only.
_ATTENTION = re.compile(r"sdpa|flash|fmha|attention|softmax|clone_expand|(^|_)bmm(_|$)", re.IGNORECASE)
# Inductor's templates of a matrix multiply and what follows it, and the libraries' kernels.
_MATMUL = re.compile(
    r"triton_tem_.*mm|(^|_)(add)?mm_|gemm|gemv|cutlass|cublas|nvjet|splitkreduce|dot_kernel", re.IGNORECASE
)


def family(kernel: str) -> Family:
    """``attention``, ``matmul`` (linear layers, with what is fused to them) or ``rest`` (norms, RoPE, copies, ...)."""
    name = kernel.partition("(")[0].strip()
    base = re.sub(r"_\d+$", "", name)
    if name in FLASHPTE_KERNELS or base in FLASHPTE_KERNELS or _ATTENTION.search(name):
        return "attention"
    return "matmul" if _MATMUL.search(name) else "rest"
