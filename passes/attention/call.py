"""One attention call: the arguments of ``scaled_dot_product_attention``, read from a node or planned, and some more."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import GraphModule, Node

from flashpte.passes.graph.planned import Value
from flashpte.passes.graph.values import aten_target, val

ATEN_SDPA = torch.ops.aten.scaled_dot_product_attention.default


def find_sdpa(graph_module: GraphModule) -> list[tuple[GraphModule, Node]]:
    """Every ``scaled_dot_product_attention`` with the graph or subgraph that contains it, in graph order."""
    return [
        (module, node)
        for module in graph_module.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.nodes
        if aten_target(node) is ATEN_SDPA
    ]


@dataclasses.dataclass(frozen=True)
class SdpaCall:
    """One attention call as written in the graph.

    Attributes:
        node: the node itself.
        query, key, value, mask: arguments, as nodes or plans (``mask`` may be ``None``).
        dropout_p, is_causal, scale, enable_gqa: as in ``torch.nn.functional.scaled_dot_product_attention``.
        softcap: limit of the scores before the mask; 0 for none.
        sinks: ``[H_q]``, one more score of each query head, which has no value; ``None`` for none.
        dims: for each of the dimensions ``[B, H, L, D]``, the dimensions of the node's result that it represents.
    """

    node: Node
    query: Value
    key: Value
    value: Value
    mask: Value | None
    dropout_p: Any
    is_causal: Any
    scale: Any
    enable_gqa: Any
    softcap: float = 0.0
    sinks: Value | None = None
    dims: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,), (3,))

    @classmethod
    def from_node(cls, node: Node) -> SdpaCall:
        """Reads positional and keyword arguments according to the operator's schema."""
        names = [argument.name for argument in ATEN_SDPA._schema.arguments]
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        return cls(
            node=node,
            query=given["query"],
            key=given["key"],
            value=given["value"],
            mask=given.get("attn_mask"),
            dropout_p=given.get("dropout_p", 0.0),
            is_causal=given.get("is_causal", False),
            scale=given.get("scale"),
            enable_gqa=given.get("enable_gqa", False),
        )

    @property
    def mask_kind(self) -> str:
        """``"none"``, ``"causal"``, ``"bool"`` or ``"float"``."""
        if self.mask is not None:
            return "bool" if val(self.mask).dtype == torch.bool else "float"
        return "causal" if self.is_causal else "none"
