"""Recovers grouped-query attention (GQA) by undoing any repetition of the key and value heads.

Without ``enable_gqa``, a model repeats each key/value head for the query heads that share it: ``unsqueeze -> expand ->
reshape`` (Hugging Face's ``repeat_kv``), ``repeat_interleave`` before or after the heads are moved in front of the
length, a broadcast of a single head, ``stack``, or an index. That copies the whole cache at every step. The kernels
take grouped heads directly. The pass recognizes such a chain by where each head comes from
(``passes/graph/layouts.py``), not by its operators.

Two traps. ``k.repeat(1, G, 1, 1)`` has the same shapes but another order of heads (0 1 0 1 instead of 0 0 1 1). In a
program that is not functional yet, the cache or its copy may be written between the repetition and the attention, and
then the copy differs from the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import torch
from torch.fx import Node

from flashpte.passes.attention.call import SdpaCall
from flashpte.passes.graph.aliasing import written_between
from flashpte.passes.graph.layouts import Layout, Layouts, moved_input
from flashpte.passes.graph.planned import Value, nodes_of, planned
from flashpte.passes.graph.values import same_size, val

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where keys or values ``[B, H, L, D]`` come from.

    Attributes:
        source: the node at the start of the chain.
        chain: the nodes after the source, in order.
        dims: the source's dimension for each of the four dimensions; ``None`` where the source has one entry for all.
        group: how many consecutive heads come from one head of the source.
        repeats: whether anything is repeated.
        read: nodes whose values were evaluated.
    """

    source: Value
    chain: tuple[Value, ...]
    dims: tuple[int | None, ...]
    group: int
    repeats: bool
    read: frozenset[Node]

    @property
    def is_view(self) -> bool:
        """Whether the source has the same four dimensions, except for repeated heads."""
        return self.dims == (0, 1, 2, 3) and val(self.source).dim() == 4

    def heads(self) -> int | torch.SymInt:
        """Number of heads of the source."""
        dim = self.dims[-3]
        return 1 if dim is None else val(self.source).shape[dim]

    def planned(self) -> Value:
        """The source as ``[B or 1, H / group, L, D]``, with planned views."""
        value, dims = self.source, self.dims
        missing = [dim for dim in range(val(value).dim()) if dim not in dims]
        if missing:
            value = planned(aten.squeeze.dims, value, missing, near=value)
        kept = sorted(dim for dim in dims if dim is not None)
        order = [kept.index(dim) for dim in dims if dim is not None]
        if order != sorted(order):
            value = planned(aten.permute.default, value, order, near=value)
        for dim, origin in enumerate(dims):
            if origin is None:
                value = planned(aten.unsqueeze.default, value, dim, near=value)
        return value

    def may_be_written(self, before: Node) -> bool:
        """Whether memory that the operand is read from may be written before the node ``before``."""
        copied = [node for node in self.chain if isinstance(node, Node)]
        # A plan reads its source at the call itself.
        if copied and written_between(copied[0].prev, before, nodes_of([self.source, *copied])):
            return True
        first = min(self.read, default=None)
        return first is not None and written_between(first.prev, before, self.read)


def recover_gqa(call: SdpaCall, constants: Mapping[str, torch.Tensor] | None = None) -> SdpaCall:
    """The call on grouped heads if both key and value repeat fewer heads, otherwise the call itself.

    Plans at most views. The repetition becomes dead code once the call is replaced.

    Args:
        call: the call, on four dimensions.
        constants: the values of placeholders that are the same in every call, by name.
    """
    if any(val(node).dim() != 4 for node in (call.query, call.key, call.value)):
        return call
    key, value = (origin_of(node, constants) for node in (call.key, call.value))
    if key is None or value is None or not same_size(key.heads(), value.heads()):
        return call
    heads = val(call.query).shape[1]
    if not same_size(heads, val(call.key).shape[1]) and key.group > 1:
        return call
    if any(origin.may_be_written(call.node) for origin in (key, value)):
        return call
    grouped = [origin.planned() for origin in (key, value)]
    return dataclasses.replace(call, key=grouped[0], value=grouped[1], enable_gqa=True)


def origin_of(node: Value, constants: Mapping[str, torch.Tensor] | None = None) -> Origin | None:
    """The tensor that ``node`` ``[B, H, L, D]`` repeats along the heads and the batch; ``None`` if there is none."""
    chain = [node]
    while (parent := moved_input(chain[-1])) is not None:
        chain.append(parent)
    best: Origin | None = None
    for length in range(1, len(chain)):
        layouts = Layouts(constants)
        layout = layouts.through(chain[length], chain[length - 1 :: -1])
        origin = None if layout is None else origin_from(chain[length], chain[length - 1 :: -1], layout, layouts.read)
        if origin is None or not origin.repeats:
            continue
        if best is None:
            best = origin
        elif origin.is_view and (not best.is_view or val(origin.source).stride(3) == val(best.source).stride(3)):
            # Keep the nearest origin, unless a farther one needs no views and the nearest does, or it skips a copy.
            best = origin
    return best


def origin_from(source: Value, chain: Sequence[Value], layout: Layout, read: Collection[Node] = ()) -> Origin | None:
    """The origin of an operand with this layout; ``None`` if it is more than a repetition along heads and batch.

    Args:
        source: the start of the chain.
        chain: the nodes after the source, in order.
        layout: the layout of the operand. The third dimension from the end, if there is one, is the heads.
        read: nodes whose values were evaluated.
    """
    shape = val(source).shape
    group, repeats = 1, False
    dims: list[int | None] = []
    for dim, factors in enumerate(layout):
        own = list(factors)
        if dim == len(layout) - 3 and own and own[-1].dim is None:
            size = own.pop().size
            if not isinstance(size, int):
                return None
            group, repeats = size, True
        elif dim < len(layout) - 3 and len(own) == 1 and own[0].dim is None:
            own, repeats = [], True
        if not own:
            dims.append(None)
            continue
        if len(own) > 1 or own[0].dim is None or not same_size(own[0].size, shape[own[0].dim]):
            return None
        dims.append(own[0].dim)
    # A dimension of size 1 has no factor. Assign it the source's own dimension if possible.
    if len(shape) == len(dims):
        for dim, origin in enumerate(dims):
            if origin is None and dim not in dims and same_size(shape[dim], 1):
                dims[dim] = dim
    if any(not same_size(size, 1) for dim, size in enumerate(shape) if dim not in dims):
        return None
    return Origin(source, tuple(chain), tuple(dims), group, repeats, frozenset(read))
