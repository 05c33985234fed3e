"""The report on every attention node of a program; :mod:`.table` shows it to people."""

from __future__ import annotations

import dataclasses
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
        softcap: the limit of the scores before the mask; 0 for none.
        sinks: whether each head has one more score, without a value.
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
    softcap: float = 0.0
    sinks: bool = False

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
