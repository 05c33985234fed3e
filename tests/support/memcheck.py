"""Launches each kernel once under a memory checker: ``compute-sanitizer python tests/support/memcheck.py``."""

from __future__ import annotations

import torch
from attention_cases import Case, build, check, with_intervals

from flashpte.kernels import sdpa_decode, sdpa_prefill, sdpa_verify

CASES = (
    (sdpa_decode, Case(1, 1025, head_dim=80, dtype=torch.bfloat16, mask="bool_ring", layout="sliced")),
    (sdpa_verify, Case(5, 1025, heads_q=6, head_dim=128, dtype=torch.bfloat16, mask="bool_context", layout="sliced")),
    (sdpa_prefill, Case(130, 1025, head_dim=96, dtype=torch.bfloat16, mask="float_min_context", layout="sliced")),
    (sdpa_prefill, Case(130, 1025, head_dim=128, dtype=torch.bfloat16, mask="is_causal", layout="sliced")),
)

for op, case in CASES:
    p = build(case, "cuda")
    out = op(p.query, p.key, p.value, p.mask, None, None, p.is_causal, p.scale, list(case.dim_order))
    torch.cuda.synchronize()
    print(f"{op._name} {case}: error / bound = {check(p, out):.2f}")

for op, case, kind in (
    (sdpa_decode, Case(1, 1025, head_dim=80, dtype=torch.bfloat16, layout="sliced"), "ring"),
    (sdpa_verify, Case(5, 1025, batch=2, head_dim=128, dtype=torch.bfloat16, layout="sliced"), "documents"),
    (sdpa_prefill, Case(130, 1025, head_dim=96, dtype=torch.bfloat16, layout="sliced"), "window"),
):
    p, intervals = with_intervals(case, kind, "cuda")
    bounds = (intervals.bounds, intervals.values)
    out = op(p.query, p.key, p.value, None, None, None, False, p.scale, list(case.dim_order), *bounds)
    torch.cuda.synchronize()
    print(f"{op._name} {case} {kind}: error / bound = {check(p, out):.2f}")
