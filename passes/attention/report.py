"""The report on every attention node, for people (a table) and for programs (``to_dict``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class NodeRoute:
    """The decision on one attention.

    Attributes:
        node: name of the original node in the graph.
        module_path: dotted path of the module that called it; empty if the graph does not say.
        op: name of the operator that replaced it (``flashpte::sdpa_decode``, ...), or ``None`` if it was declined.
        reason: one plain sentence that says why this operator was chosen, or why the node was left alone.
        query, key, value: shapes; a dynamic size is a string such as ``"s3"``.
        lq_range: smallest and largest L_q that the program admits (``None`` for no upper bound).
        dtype: dtype of the query.
        mask: the kind of mask: ``"none"``, ``"causal"``, a proven structure such as ``"window"`` or
            ``"causal+padding"``, or ``"bool"`` or ``"float"`` if nothing more is known.
        branches: the operators that L_q chooses between at run time; empty if there is no choice.
        mask_form: how the operator gets the mask: ``"none"``, ``"is_causal"``, ``"positions"`` (without the mask's
            tensor) or ``"tensor"``.
        mask_note: one plain sentence on why the mask has that form; empty without a mask.
        map_users: how many attention nodes use this node's tile map, including this one; 0 without a map.
        bytes_saved: estimate of the bytes that one run of this node no longer reads and writes. It has the node's read
            of the mask (for a mapped mask, only if the map was made for another node), the write of a proven mask
            (counted once), and keys and values repeated per query head. Uses the largest sizes the program admits.
        bytes_copied: estimate of the bytes that one run writes only to hand query, key and value to this node's kernel:
            repeated heads, past keys joined with new ones, tensors in another memory layout. Uses the largest sizes the
            program admits. A copy that several nodes use is counted at the first.
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
    mask_form: str = "none"
    mask_note: str = ""
    map_users: int = 0
    bytes_saved: int = 0
    bytes_copied: int = 0

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
        """The nodes that now run on a flashpte kernel."""
        return tuple(n for n in self.nodes if n.replaced)

    @property
    def declined(self) -> tuple[NodeRoute, ...]:
        """The nodes that were left alone."""
        return tuple(n for n in self.nodes if not n.replaced)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready report: ``{"version": 1, "nodes": [...]}``; the keys are stable."""
        return {"version": 1, "nodes": [n.to_dict() for n in self.nodes]}


def _shape(sizes: tuple[int | str, ...]) -> str:
    return "x".join(str(s) for s in sizes)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B" if count else "-"


def _mask(route: NodeRoute) -> str:
    return {"positions": f"{route.mask}, by positions", "tensor": f"{route.mask}, mapped"}.get(
        route.mask_form, route.mask
    )


def format_table(reports: Mapping[str, RoutingReport]) -> str:
    """Renders reports (one per method) as a plain text table, one row per attention node."""
    header = ("method", "attention", "query", "key", "mask", "map for", "saves", "copies", "kernel", "why")
    rows = [
        (
            method,
            route.module_path or route.node,
            _shape(route.query),
            _shape(route.key),
            _mask(route),
            str(route.map_users or "-"),
            _bytes(route.bytes_saved),
            _bytes(route.bytes_copied),
            route.op or "(left as it was)",
            "; ".join(part for part in (route.reason, route.mask_note) if part),
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
