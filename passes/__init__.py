"""Rewrites of exported programs.

``replace_sdpa`` swaps attention for the project's kernels; ``rewrite_program`` runs every rewrite there is, other
packages' among them. ``graph`` is plumbing that any rewrite needs, ``attention`` the rewrite of attention.
"""

from flashpte.passes.attention.report import NodeRoute, RoutingReport, format_table
from flashpte.passes.pipeline import ReplaceSdpaPass, default_rewrites, replace_sdpa, rewrite_graph, rewrite_program
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
    "replace_sdpa",
    "rewrite_graph",
    "rewrite_program",
]
