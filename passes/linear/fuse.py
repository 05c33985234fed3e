"""The rewrite that makes one product of those that share x and the format of their weights: q, k and v, gate and up.

The packed weights follow each other row by row of tiles, so the fused one is the parts end to end. Results become
slices of the fused result, which are not contiguous where x has several rows. So products stay apart if the views that
follow need a contiguous result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch.fx import Node

from flashpte.kernels.linear.format import TILE_ROWS
from flashpte.passes.graph.aliasing import Writes
from flashpte.passes.graph.insert import insert_before
from flashpte.passes.graph.values import aten_target, val
from flashpte.passes.graph.views import Kind, kind_of
from flashpte.passes.rewrite import Decision, Refusal, Rewrite, Scope

_WEIGHT, _BIAS, _NUMBERS = slice(1, 5), 5, slice(6, 10)
"""Where the operator's arguments are: packed, scales, zeros and offsets; the bias; bits, group, N and K."""

_FOLLOWED = (Kind.SAME, Kind.RESHAPE, Kind.EXPAND, Kind.PERMUTE, Kind.TRANSPOSE, Kind.SLICE, Kind.SELECT)


@dataclasses.dataclass(frozen=True)
class Siblings:
    """Products that share x and the format, in the order of the graph."""

    products: tuple[Node, ...]

    @property
    def node(self) -> Node:
        """The first product, in front of which the fused one goes."""
        return self.products[0]


def _arguments(product: Node) -> tuple[Any, ...]:
    return tuple(product.args)


def _format(product: Node) -> tuple[Any, ...] | None:
    """What must be the same for products to be fused; ``None`` for one that cannot be."""
    arguments = _arguments(product)
    held = [*arguments[_WEIGHT], arguments[_BIAS]]
    if any(tensor is not None and (not isinstance(tensor, Node) or tensor.op != "placeholder") for tensor in held):
        return None
    dtypes = tuple(None if tensor is None else val(tensor).dtype for tensor in held)
    bits, group, _, k = arguments[_NUMBERS]
    return bits, group, k, dtypes


def _following(product: Node, value: torch.Tensor) -> Iterator[tuple[Node, torch.Tensor]]:
    """The views of a product's result and what they are if the result is ``value``.

    Raises:
        RuntimeError, ValueError: a view needs another memory layout.
    """
    for user in product.users:
        if user.op == "call_function" and user.args[0] is product and kind_of(user) in _FOLLOWED:
            if aten_target(user) is torch.ops.aten.as_strided:
                raise RuntimeError("its strides are given")
            arguments = [value, *(_values(argument) for argument in user.args[1:])]
            call: Any = user.target
            result = call(*arguments, **{key: _values(argument) for key, argument in user.kwargs.items()})
            if isinstance(result, torch.Tensor):
                yield user, result
                yield from _following(user, result)


def _values(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return type(argument)(map(_values, argument))
    return argument.meta["val"] if isinstance(argument, Node) else argument


def _writes(scope: Scope) -> Writes:
    return Writes(scope.graph)


class FuseLinears(Rewrite):
    """Fuses products with packed weights that share x, so that one launch does the work of several."""

    name = "linear-fusion"

    def match(self, node: Node, scope: Scope) -> Siblings | None:
        """The products that share x and format with this one, if it is the first of them."""
        if node.target is not torch.ops.flashpte.quantized_linear.default or scope.module is not scope.run.graph_module:
            return None
        wanted = _format(node)
        if wanted is None or not isinstance(node.args[0], Node):
            return None
        siblings = [
            user
            for user in sorted(node.args[0].users)  # in the order of the graph
            if user.target is node.target and user.args[0] is node.args[0] and _format(user) == wanted
        ]
        return Siblings(tuple(siblings)) if len(siblings) > 1 and siblings[0] is node else None

    def decide(self, match: Siblings, scope: Scope) -> Decision | Refusal:
        """Fuses them if rows fill tiles and no view needs a contiguous result."""
        sizes = [int(_arguments(product)[_NUMBERS][2]) for product in match.products]
        if any(size % TILE_ROWS for size in sizes[:-1]):
            return Refusal(f"their rows {sizes} do not fill tiles of {TILE_ROWS}")
        weights = scope.run.weights
        tensors = [
            tensor for product in match.products for tensor in _arguments(product)[_WEIGHT] if tensor is not None
        ]
        if weights is None or any(tensor.name not in weights.held for tensor in tensors):
            return Refusal("their weights are not known when the program is compiled")
        if len({tensor.name for tensor in tensors}) != len(tensors):
            return Refusal("two of them have the same weight")
        if scope.state(_writes).to(_arguments(match.node)[0]):
            return Refusal("x is written in place")
        results = _slices(val(match.node), sizes)
        try:
            for product, result in zip(match.products, results, strict=True):
                list(_following(product, result))
        except (RuntimeError, ValueError) as error:
            return Refusal(f"a view of {product.name} needs another memory layout ({str(error).splitlines()[0]})")
        names = ", ".join(product.name for product in match.products)
        return Decision(f"{names} share x: one product of {sum(sizes)} rows", sizes)

    def apply(self, match: Siblings, decision: Decision, scope: Scope) -> None:
        """Puts the fused product before the first one, and slices of its result in the place of each."""
        sizes: list[int] = decision.plan
        weights, first = scope.run.weights, match.node
        assert weights is not None
        x, *_ = _arguments(first)
        mode = val(x).fake_mode  # type: ignore[attr-defined]
        held: list[Node | None] = []
        columns = zip(*(_arguments(product)[_WEIGHT.start : _BIAS + 1] for product in match.products), strict=True)
        for parts in columns:
            if parts[0] is None:
                held.append(None)
                continue
            tensor = torch.cat([weights.held[part.name] for part in parts])
            fake = mode.from_tensor(tensor, static_shapes=True)
            held.append(weights.add(scope.graph, _joined(map(weights.name_of, parts)), tensor, fake))
        bits, group, _, k = _arguments(first)[_NUMBERS]
        results = _slices(val(first), sizes)
        arguments = (x, *held, bits, group, sum(sizes), k)
        fused = insert_before(
            first, torch.ops.flashpte.quantized_linear.default, arguments, _whole(val(first), sum(sizes))
        )
        slices: list[Node] = []
        start = 0
        for size, result in zip(sizes, results, strict=True):
            slices.append(insert_before(first, torch.ops.aten.slice.Tensor, (fused, -1, start, start + size), result))
            start += size
        for product, part in zip(match.products, slices, strict=True):
            for view, value in list(_following(product, val(part))):
                view.meta["val"] = value
            product.replace_all_uses_with(part)
            scope.graph.erase_node(product)
            # The signatures of a program and of its modules refer to outputs by name.
            part.name = product.name


def _joined(names: Iterable[str]) -> str:
    """A name for the fused weight: ``attn.q_and_k_and_v.weight`` for ``attn.q.weight``, ``attn.k.weight``, ..."""
    columns = list(zip_longest(*(name.split(".") for name in names), fillvalue=""))
    return ".".join("_and_".join(dict.fromkeys(filter(None, column))) for column in columns)


def _whole(result: torch.Tensor, rows: int) -> torch.Tensor:
    """A description of the fused result, given that of one product."""
    return result.new_empty((*result.shape[:-1], rows))


def _slices(result: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    """Descriptions of the parts of the fused result."""
    return _whole(result, sum(sizes)).split(sizes, -1)
