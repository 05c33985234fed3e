"""Assigns a GPU kernel to a part of the model by its name."""

from __future__ import annotations

import re
from typing import get_args

import flashpte.kernels  # noqa: F401 (registers the facts about its kernels)
from flashpte.kernels.facts import Family, facts_named

FAMILIES: tuple[Family, ...] = get_args(Family)

# ExecuTorch's replacement, fused attention of libraries, and plain attention. Inductor names a kernel after its
# operators; only attention has batched products, a softmax and heads copied for their group.
_ATTENTION = re.compile(r"sdpa|flash|fmha|attention|softmax|clone_expand|(^|_)bmm(_|$)", re.IGNORECASE)
# Inductor's matrix-multiply templates, with what is fused to them, and the libraries' kernels.
_MATMUL = re.compile(
    r"triton_tem_.*mm|(^|_)(add)?mm_|gemm|gemv|cutlass|cublas|nvjet|splitkreduce|dot_kernel", re.IGNORECASE
)


def family(kernel: str) -> Family:
    """Returns ``attention``, ``matmul`` (linear layers and fused epilogues) or ``rest`` (norms, RoPE, copies, ...)."""
    name = kernel.partition("(")[0].strip()
    facts = facts_named(name)
    if facts is not None:
        return facts.family
    if _ATTENTION.search(name):
        return "attention"
    return "matmul" if _MATMUL.search(name) else "rest"
