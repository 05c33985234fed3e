"""The least that a method's products must read and compute; ``run-model --profile`` compares times with it."""

from __future__ import annotations

import math

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from flashpte.passes.graph.values import val
from flashpte.passes.graph.views import Kind, kind_of
from flashpte.passes.linear.find import find_product

_WHOLE = (Kind.SAME, Kind.RESHAPE, Kind.PERMUTE, Kind.TRANSPOSE, Kind.CAST)
_PARTS = (Kind.SLICE, Kind.SELECT, Kind.INDEX)
_OURS = (torch.ops.flashpte.few_rows_linear.default, torch.ops.flashpte.quantized_linear.default)


def product_work(program: ExportedProgram) -> dict[str, int]:
    """The work of a program's products with weights.

    Returns:
        ``weight_bytes``: bytes of the weights with scales, zero points and biases, each once. ``flop_per_call`` and
        ``flop_per_token``: 2 M N K of the products whose M is fixed, and 2 N K of those whose M is the dynamic number
        of tokens. A weight that the program computes counts as arithmetic alone.
    """
    weights: dict[Node, int] = {}
    flop = {False: 0, True: 0}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        operands = _operands(node)
        if operands is None:
            continue
        x, *read = operands
        *rows, columns = val(x).shape
        # act(gate) * up has half as many columns as the weight has rows.
        out = val(read[0]).shape[0] if node.target is _OURS[0] else val(node).shape[-1]
        fixed = [size for size in rows if isinstance(size, int)]
        flop[len(fixed) < len(rows)] += 2 * math.prod(fixed) * columns * out
        for base in map(_base, read):
            stored = base.op in ("placeholder", "get_attr") or kind_of(base) in _PARTS
            if stored and all(isinstance(size, int) for size in val(base).shape):
                weights[base] = val(base).numel() * val(base).itemsize
    return {"weight_bytes": sum(weights.values()), "flop_per_call": flop[False], "flop_per_token": flop[True]}


def _operands(node: Node) -> list[Node] | None:
    """The activation of a product, then the tensors of its weight; ``None`` for any other node."""
    if node.target in _OURS:
        return [argument for argument in (*node.args, *node.kwargs.values()) if isinstance(argument, Node)]
    product = find_product(node)
    return None if product is None else [product.x, product.weight, *filter(None, [product.bias])]


def _base(node: Node) -> Node:
    """The tensor whose entries a node has, all of them."""
    while kind_of(node) in _WHOLE and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
