"""Finds every attention of a program, in any form. The report must not miss one."""

from __future__ import annotations

import dataclasses

from torch.fx import Node

from flashpte.passes.attention.call import ATEN_SDPA
from flashpte.passes.attention.other_operators import is_other_attention, named
from flashpte.passes.attention.written import Unserved, Written, find_written
from flashpte.passes.graph.values import aten_target


@dataclasses.dataclass(frozen=True)
class Call:
    """Attention as a single node: ``scaled_dot_product_attention`` or an equivalent operator."""

    node: Node


Found = Call | Written | Unserved


def find_attention(node: Node) -> Found | None:
    """The attention that a node is, or whose softmax it is; ``None`` if neither."""
    if aten_target(node) is ATEN_SDPA or is_other_attention(node):
        return Call(node)
    return named(node) or find_written(node)
