"""Recovers grouped-query attention: undoes whatever repeats heads in front of the keys and values.

Without ``enable_gqa`` a model repeats each key/value head for the query heads that share it: ``unsqueeze -> expand ->
reshape`` (Hugging Face's ``repeat_kv``), ``repeat_interleave`` before or after the heads are moved in front of the
length, a broadcast to more heads than one, ``stack``, an index. That copies the whole cache at every step; the kernels
take grouped heads as they are. Where each head comes from (``passes/graph/layouts.py``) tells such a chain from any
other, not its form.

The traps: ``k.repeat(1, G, 1, 1)`` has the same shapes and another order of heads (0 1 0 1 instead of 0 0 1 1). And
before a program is made functional, the cache may be written between the repetition and the attention, or the copy may
be: then the copy is not the cache.
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
        chain: the nodes behind it, first one first.
        dims: for each of the four dimensions the source's; ``None`` where the source has one entry for all.
        group: how many heads in a row are one head of the source.
        repeats: whether anything is repeated.
        read: nodes whose values were looked at.
    """

    source: Value
    chain: tuple[Value, ...]
    dims: tuple[int | None, ...]
    group: int
    repeats: bool
    read: frozenset[Node]

    @property
    def is_view(self) -> bool:
        """Whether the source has the four dimensions as they are, but for repeated heads."""
        return self.dims == (0, 1, 2, 3) and val(self.source).dim() == 4

    def heads(self) -> int | torch.SymInt:
        """Heads of the source."""
        dim = self.dims[-3]
        return 1 if dim is None else val(self.source).shape[dim]

    def planned(self) -> Value:
        """The source as ``[B or 1, H / group, L, D]``, by planned views."""
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
        """Whether what the operand is read from may be written to on the way to ``before``."""
        copied = [node for node in self.chain if isinstance(node, Node)]
        # What is planned reads its source at the call itself.
        if copied and written_between(copied[0].prev, before, nodes_of([self.source, *copied])):
            return True
        first = min(self.read, default=None)
        return first is not None and written_between(first.prev, before, self.read)


def recover_gqa(call: SdpaCall, constants: Mapping[str, torch.Tensor] | None = None) -> SdpaCall:
    """The call on grouped heads, if both key and value are repetitions of fewer heads; else the call itself.

    Plans at most views; the repetition is dead once the call is replaced.

    Args:
        call: the call, on four dimensions.
        constants: the values of placeholders that no run of the program changes, by name.
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
    """What ``node`` ``[B, H, L, D]`` is a repetition of, along the heads and the batch; ``None`` if of nothing."""
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
            # The nearest is good enough, unless there is one that needs no views, or is not a copy.
            best = origin
    return best


def origin_from(source: Value, chain: Sequence[Value], layout: Layout, read: Collection[Node] = ()) -> Origin | None:
    """Attention's operand of a layout; ``None`` if it is more than a repetition along the heads and the batch.

    Args:
        source: the start of the chain.
        chain: the nodes behind it, first one first.
        layout: the layout of the operand, with the heads in the third dimension from the end, if there are three.
        read: nodes whose values were looked at.
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
    # Of a size of 1, which no factor tells, the source's own dimension where there is one.
    if len(shape) == len(dims):
        for dim, origin in enumerate(dims):
            if origin is None and dim not in dims and same_size(shape[dim], 1):
                dims[dim] = dim
    if any(not same_size(size, 1) for dim, size in enumerate(shape) if dim not in dims):
        return None
    return Origin(source, tuple(chain), tuple(dims), group, repeats, frozenset(read))
