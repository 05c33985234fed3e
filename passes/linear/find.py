"""Finds products of an activation and a weight (``linear``, ``addmm``, ``mm``, ``matmul``) and rows of a table."""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from flashpte.passes.graph.values import val
from flashpte.passes.graph.views import packet_of

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Product:
    """``x [..., K]`` times a weight.

    Attributes:
        node: the product.
        x: the activation.
        weight: the weight as the product takes it, ``[N, K]``, or ``[K, N]`` if ``transposed``.
        transposed: whether the second dimension of ``weight`` is the output's.
        bias: what is added, ``[N]``.
    """

    node: Node
    x: Node
    weight: Node
    transposed: bool
    bias: Node | None = None


def find_product(node: Node) -> Product | None:
    """The product that a node computes; ``None`` if it computes another thing, or a product of more dimensions."""
    packet = packet_of(node)
    if packet is aten.linear:
        x, weight, bias = (*node.args, None)[:3]
        return _product(node, x, weight, False, bias)
    if packet in (aten.mm, aten.matmul):
        return _product(node, node.args[0], node.args[1], True)
    if packet is aten.addmm and all(node.kwargs.get(name, 1) == 1 for name in ("alpha", "beta")):
        bias, x, weight = node.args[:3]
        return _product(node, x, weight, True, bias)
    return None


def _product(node: Node, x: object, weight: object, transposed: bool, bias: object = None) -> Product | None:
    if not isinstance(x, Node) or not isinstance(weight, Node) or not isinstance(bias, (Node, type(None))):
        return None
    if val(weight).dim() != 2 or val(x).dim() < 1 or (bias is not None and val(bias).dim() != 1):
        return None
    return Product(node, x, weight, transposed, bias)


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Rows of a table by their index, as ``torch.nn.Embedding`` takes them.

    Attributes:
        node: the rows, ``[..., K]``.
        indices: integers ``[...]``.
        weight: the table ``[N, K]``.
    """

    node: Node
    indices: Node
    weight: Node
    transposed = False


def find_lookup(node: Node) -> Lookup | None:
    """The lookup that a node computes, or ``None``. Options of ``embedding`` say something about gradients alone."""
    if packet_of(node) is not aten.embedding:
        return None
    weight, indices = node.args[:2]
    if not isinstance(weight, Node) or not isinstance(indices, Node) or val(weight).dim() != 2:
        return None
    return Lookup(node, indices, weight)
