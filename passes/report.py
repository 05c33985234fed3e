"""What the pass did with every attention node, for people (a table) and for programs (``to_dict``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class NodeRoute:
    """The decision about one ``scaled_dot_product_attention`` node.

    Attributes:
        node: name of the original node in the graph.
        module_path: dotted path of the module that called it (empty when the graph does not say).
        op: name of the operator that replaced it (``flashpte::sdpa_decode``, ...), two with a bar between them where
            L_q decides at run time, or ``None`` when it was declined.
        reason: one plain sentence: why this operator, or why the node was left alone.
        query, key, value: shapes as written in the graph; a dynamic size is a string such as ``"s3"``.
        lq_range: smallest and largest L_q the program admits (``None`` for no upper bound).
        dtype: dtype of query.
        mask: ``"none"``, ``"causal"``, ``"bool"`` or ``"float"``.
        branches: the operators that L_q decides between at run time; empty where there is no choice.
    """

    node: str
    module_path: str
    op: str | None
    reason: str
    query: tuple[int | str, ...]
    key: tuple[int | str, ...]
    value: tuple[int | str, ...]
    lq_range: tuple[int, int | None]
    dtype: str
    mask: str
    branches: tuple[str, ...] = ()

    @property
    def replaced(self) -> bool:
        """Whether the node was replaced."""
        return self.op is not None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; the keys are stable."""
        return {
            f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in dataclasses.fields(self)
        }


@dataclasses.dataclass(frozen=True)
class RoutingReport:
    """Every attention node of one program, in graph order."""

    nodes: tuple[NodeRoute, ...]

    @property
    def replaced(self) -> tuple[NodeRoute, ...]:
        """The nodes that now run on one of our kernels."""
        return tuple(n for n in self.nodes if n.replaced)

    @property
    def declined(self) -> tuple[NodeRoute, ...]:
        """The nodes that were left as they were."""
        return tuple(n for n in self.nodes if not n.replaced)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready report: ``{"version": 1, "nodes": [...]}``; the keys are stable."""
        return {"version": 1, "nodes": [n.to_dict() for n in self.nodes]}


def _shape(sizes: tuple[int | str, ...]) -> str:
    return "x".join(str(s) for s in sizes)


def format_table(reports: Mapping[str, RoutingReport]) -> str:
    """Renders reports (one per method) as a plain text table, one row per attention node."""
    header = ("method", "attention", "query", "key", "mask", "kernel", "why")
    rows = [
        (
            method,
            route.module_path or route.node,
            _shape(route.query),
            _shape(route.key),
            route.mask,
            route.op or "(left as it was)",
            route.reason,
        )
        for method, report in reports.items()
        for route in report.nodes
    ]
    if not rows:
        return "no scaled_dot_product_attention node was found"
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header) - 1)]
    lines = []
    for row in [header, tuple("-" * w for w in [*widths, 3]), *rows]:
        lines.append("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]))
    return "\n".join(lines)
