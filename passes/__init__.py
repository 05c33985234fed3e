"""Rewrites of exported programs.

``replace_sdpa`` swaps attention for flashpte's kernels. ``rewrite_program`` runs every rewrite, including those of
other packages. ``replace_linear`` swaps products and embeddings with quantized weights. ``graph`` holds helpers that
every rewrite needs; ``attention`` and ``linear`` hold the rewrites.
"""

from flashpte.passes.attention.report import NodeRoute, RoutingReport
from flashpte.passes.attention.table import format_table
from flashpte.passes.pipeline import (
    ReplaceSdpaPass,
    default_rewrites,
    replace_linear,
    replace_sdpa,
    rewrite_graph,
    rewrite_program,
)
from flashpte.passes.rewrite import Decision, Refusal, Report, Rewrite, Scope

__all__ = [
    "Decision",
    "NodeRoute",
    "Refusal",
    "ReplaceSdpaPass",
    "Report",
    "Rewrite",
    "RoutingReport",
    "Scope",
    "default_rewrites",
    "format_table",
    "replace_linear",
    "replace_sdpa",
    "rewrite_graph",
    "rewrite_program",
]
