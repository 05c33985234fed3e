"""The least that a method's products must read and compute; ``run-model --profile`` compares times with it."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from flashpte.passes.graph.constants import constant_tensors
from flashpte.passes.graph.values import hint, val
from flashpte.passes.graph.views import Kind, kind_of, packet_of
from flashpte.passes.linear.find import find_product

_WHOLE = (Kind.SAME, Kind.RESHAPE, Kind.PERMUTE, Kind.TRANSPOSE, Kind.CAST)
_PARTS = (Kind.SLICE, Kind.SELECT, Kind.SPLIT, Kind.INDEX)
_OURS = (torch.ops.flashpte.few_rows_linear.default, torch.ops.flashpte.quantized_linear.default)
_BATCHED = (torch.ops.aten.matmul, torch.ops.aten.bmm)


def product_work(program: ExportedProgram) -> dict[str, int]:
    """The work of a program's products with stored weights: linear layers, and one product for each expert.

    Products whose weight is their first operand, ``einsum``, convolutions and products in a branch are left out.

    Returns:
        ``weight_bytes``: bytes of the weights with scales, zero points and biases, each once. ``flop_per_call`` and
        ``flop_per_token``: 2 M N K of the products whose M is fixed, and of the others for each of the dynamic number
        of tokens.
    """
    stored = _stored(program)
    read: dict[Node, dict[object, int]] = defaultdict(dict)
    flop = {False: 0, True: 0}
    for node in program.graph.nodes:
        x, *operands = _operands(node)
        found = [(operand, *_part(operand)) for operand in operands]
        if x is None or not any(base in stored for _, base, _ in found):
            continue
        # act(gate) * up has half as many columns as the weight has rows.
        columns = val(operands[0]).shape[0] if node.target is _OURS[0] else val(node).shape[-1]
        rows = math.prod(val(node).shape[:-1])
        flop[not isinstance(rows, int)] += 2 * _per_token(rows) * hint(val(x).shape[-1]) * hint(columns)
        for operand, base, part in found:
            if base in stored:
                count = val(operand).numel()
                # A part of a dynamic size may be all of the weight.
                read[base][part] = (count if isinstance(count, int) else val(base).numel()) * val(base).itemsize
    whole = {base: val(base).numel() * val(base).itemsize for base in read}
    weight_bytes = sum(min(whole[base], sum(parts.values())) for base, parts in read.items())
    return {"weight_bytes": weight_bytes, "flop_per_call": flop[False], "flop_per_token": flop[True]}


def _stored(program: ExportedProgram) -> set[Node]:
    """Placeholders of parameters, constants, and buffers that the program does not write."""
    names = {*program.graph_signature.inputs_to_parameters, *constant_tensors(program)}
    return {node for node in program.graph.nodes if node.op == "placeholder" and node.name in names}


def _operands(node: Node) -> list[Any]:
    """The activation of a product, then the tensors of its weight; ``[None]`` for any other node."""
    if node.op != "call_function":
        return [None]
    if node.target in _OURS:
        return [argument for argument in (*node.args, *node.kwargs.values()) if isinstance(argument, Node)]
    if packet_of(node) in _BATCHED and isinstance(node.args[1], Node) and val(node.args[1]).dim() == 3:
        return [node.args[0], node.args[1]]
    product = find_product(node)
    return [None] if product is None else [product.x, product.weight, *filter(None, [product.bias])]


def _part(node: Node) -> tuple[Node, tuple[str, ...]]:
    """The tensor that a node holds, or holds a part of, and which part."""
    part = []
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        if kind_of(node) in _PARTS or node.target is operator.getitem:
            part.append(f"{node.target}{node.args[1:]}")
        elif kind_of(node) not in _WHOLE:
            break
        node = node.args[0]
    return node, tuple(part)


def _per_token(rows: int | torch.SymInt) -> int:
    """Rows for each unit of the dynamic size; a fixed number of rows as it is."""
    if isinstance(rows, int):
        return rows
    expression = rows.node.expr
    (symbol,) = expression.free_symbols if len(expression.free_symbols) == 1 else (None,)
    return 1 if symbol is None else max(1, int(expression.coeff(symbol)))
