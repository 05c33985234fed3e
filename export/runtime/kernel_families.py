"""Which part of a model a GPU kernel belongs to, by its name."""

from __future__ import annotations

import re
from typing import get_args

import flashpte.kernels  # noqa: F401 (registers the facts about its kernels)
from flashpte.kernels.facts import Family, facts_named

FAMILIES: tuple[Family, ...] = get_args(Family)

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
    facts = facts_named(name)
    if facts is not None:
        return facts.family
    if _ATTENTION.search(name):
        return "attention"
    return "matmul" if _MATMUL.search(name) else "rest"
