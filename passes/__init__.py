"""Rewrites of exported programs, one pass a file.

``replace_sdpa`` is the front door; the rest of this folder is what it is made of.
"""

from flashpte.passes.pipeline import ReplaceSdpaPass, replace_sdpa, replace_sdpa_in_graph
from flashpte.passes.report import NodeRoute, RoutingReport, format_table

__all__ = ["NodeRoute", "ReplaceSdpaPass", "RoutingReport", "format_table", "replace_sdpa", "replace_sdpa_in_graph"]
