"""The rewrite that makes one product of those that share x and the format of their weights: q, k and v, gate and up.

Dense weights ``[N, K]`` follow each other row by row, packed weights row by row of tiles. So the fused one is the parts
end to end. Results become slices of the fused result, which are not contiguous where x has several rows. So products
stay apart if the views that follow need a contiguous result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from flashpte.kernels.linear.format import TILE_ROWS
from flashpte.passes.graph.aliasing import Writes
from flashpte.passes.graph.dead_code import readers
from flashpte.passes.graph.insert import insert_before
from flashpte.passes.graph.values import aten_target, val
from flashpte.passes.graph.views import Kind, kind_of
from flashpte.passes.graph.weights import Weights
from flashpte.passes.rewrite import Decision, Refusal, Rewrite, Run, Scope

Join = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""Makes the fused tensor of parts that follow each other along their first dimension."""

_FOLLOWED = (Kind.SAME, Kind.RESHAPE, Kind.EXPAND, Kind.PERMUTE, Kind.TRANSPOSE, Kind.SLICE, Kind.SELECT)


@dataclasses.dataclass(frozen=True)
class Siblings:
    """Products that share x and the format, in the order of the graph."""

    products: tuple[Node, ...]

    @property
    def node(self) -> Node:
        """The first product, in front of which the fused one goes."""
        return self.products[0]


@dataclasses.dataclass(frozen=True)
class _Product:
    """What fusing knows of a product.

    Attributes:
        node: the product.
        tensors: its weight and what comes with it; the bias is the last. ``None`` for what it does not have.
        numbers: what else must be the same for products to be fused.
        rows: N.
        tile: rows of the weight that cannot be divided.
    """

    node: Node
    tensors: tuple[Any, ...]
    numbers: tuple[int, ...]
    rows: int
    tile: int

    @property
    def x(self) -> Any:
        """Its input."""
        return self.node.args[0]

    @property
    def format(self) -> tuple[Any, ...] | None:
        """What must be the same for products to be fused; ``None`` for one that cannot be."""
        if any(
            tensor is not None and (not isinstance(tensor, Node) or tensor.op != "placeholder")
            for tensor in self.tensors
        ):
            return None
        dtypes = tuple(None if tensor is None else val(tensor).dtype for tensor in self.tensors)
        return self.node.target, self.numbers, val(self.tensors[0]).shape[1:], dtypes

    def fused_arguments(self, tensors: Sequence[Node | None], rows: int) -> tuple[Any, ...]:
        """The arguments of a product like this one with other tensors."""
        if self.tile == 1:
            return self.x, *tensors
        bits, group, k = self.numbers
        return self.x, *tensors, bits, group, rows, k


def _product(node: Node) -> _Product | None:
    arguments: Any = node.args
    if node.target is torch.ops.flashpte.quantized_linear.default:
        bits, group, rows, k = arguments[6:10]
        return _Product(node, arguments[1:6], (bits, group, k), rows, TILE_ROWS)
    if node.target is torch.ops.aten.linear.default and isinstance(arguments[1], Node):
        weight, bias = (*arguments[1:], None)[:2]
        sizes = val(weight).shape
        if len(sizes) == 2 and all(isinstance(size, int) for size in sizes):
            return _Product(node, (weight, bias), (), sizes[0], 1)
    return None


def _products(match: Siblings) -> list[_Product]:
    return [product for node in match.products if (product := _product(node)) is not None]


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
    """Fuses products that share x, so that one launch does the work of several.

    Args:
        allowed: the groups to fuse, each the names of its weights; by default all. Methods that share weights must fuse
            the same ones (:func:`agreed`), or both the parts and the whole are stored.
        join: makes a fused weight; by default in memory.
    """

    name = "linear-fusion"

    def __init__(self, allowed: Collection[tuple[str, ...]] | None = None, join: Join | None = None) -> None:
        self._allowed, self._join = allowed, join or (lambda parts: torch.cat(list(parts)))

    def match(self, node: Node, scope: Scope) -> Siblings | None:
        """The products that share x and format with this one, if it is the first of them."""
        product = _product(node)
        if product is None or scope.module is not scope.run.graph_module:
            return None
        wanted = product.format
        if wanted is None or not isinstance(product.x, Node):
            return None
        siblings = [
            user
            for user in sorted(product.x.users)  # in the order of the graph
            if (other := _product(user)) is not None and other.x is product.x and other.format == wanted
        ]
        return Siblings(tuple(siblings)) if len(siblings) > 1 and siblings[0] is node else None

    def decide(self, match: Siblings, scope: Scope) -> Decision | Refusal:
        """Fuses them if rows fill tiles and no view needs a contiguous result."""
        products = _products(match)
        sizes, tile = [product.rows for product in products], products[0].tile
        if any(size % tile for size in sizes[:-1]):
            return Refusal(f"their rows {sizes} do not fill tiles of {tile}")
        weights = scope.run.weights
        tensors = [tensor for product in products for tensor in product.tensors if tensor is not None]
        if weights is None or any(tensor.name not in weights.held for tensor in tensors):
            return Refusal("their weights are not known when the program is compiled")
        if len({tensor.name for tensor in tensors}) != len(tensors):
            return Refusal("two of them have the same weight")
        if any(len(readers(tensor)) > 1 for tensor in tensors):
            return Refusal("one of their weights is also read elsewhere")
        names = tuple(weights.name_of(product.tensors[0]) for product in products)
        if self._allowed is not None and names not in self._allowed:
            return Refusal("another method that reads these weights does not fuse them")
        if scope.state(_writes).to(products[0].x):
            return Refusal("x is written in place")
        results = _slices(val(match.node), sizes)
        try:
            for node, result in zip(match.products, results, strict=True):
                list(_following(node, result))
        except (RuntimeError, ValueError) as error:
            return Refusal(f"a view of {node.name} needs another memory layout ({str(error).splitlines()[0]})")
        shown = ", ".join(node.name for node in match.products)
        return Decision(f"{shown} share x: one product of {sum(sizes)} rows", names)

    def apply(self, match: Siblings, decision: Decision, scope: Scope) -> dict[str, dict[str, int]]:
        """Puts the fused product before the first one, and slices of its result in the place of each.

        Returns:
            The parts of each fused tensor, by name, in order: their sizes along its first dimension.
        """
        products = _products(match)
        sizes = [product.rows for product in products]
        weights, first = scope.run.weights, match.node
        assert weights is not None
        mode: Any = val(products[0].x).fake_mode  # type: ignore[attr-defined]
        held: list[Node | None] = []
        fused_tensors: dict[str, dict[str, int]] = {}
        for parts in zip(*(product.tensors for product in products), strict=True):
            if parts[0] is None:
                held.append(None)
                continue
            names = [weights.name_of(part) for part in parts]
            tensor = self._join([weights.held[part.name].detach() for part in parts])
            fake = mode.from_tensor(tensor, static_shapes=True)
            added = weights.add(scope.graph, _joined(names), tensor, fake)
            held.append(added)
            sizes_of_parts = (int(val(part).shape[0]) for part in parts)
            fused_tensors[weights.name_of(added)] = dict(zip(names, sizes_of_parts, strict=True))
        results = _slices(val(first), sizes)
        arguments = products[0].fused_arguments(held, sum(sizes))
        target: Any = first.target
        fused = insert_before(first, target, arguments, _whole(val(first), sum(sizes)))
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
        return fused_tensors


def agreed(programs: Collection[ExportedProgram]) -> frozenset[tuple[str, ...]]:
    """The groups of weights that all programs fuse, of those that read one of them. They share weights by name."""
    rewrite, fused, read = FuseLinears(), [], []
    for program in programs:
        weights = Weights(program)
        scope = Scope(program.graph_module, Run(program.graph_module, program.range_constraints, (), {}, weights))
        matches = [match for node in program.graph.nodes if (match := rewrite.match(node, scope)) is not None]
        decisions = [rewrite.decide(match, scope) for match in matches]
        fused.append({decision.plan for decision in decisions if isinstance(decision, Decision)})
        read.append({weights.name_of(node) for node in program.graph.find_nodes(op="placeholder") if readers(node)})
    groups = frozenset().union(*fused)
    return frozenset(
        group
        for group in groups
        if all(group in fuses or reads.isdisjoint(group) for fuses, reads in zip(fused, read, strict=True))
    )


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
