"""The one table of operators whose result holds entries of their argument: views, copies, repetitions, casts.

A kind says what happens to the entries, not whether memory is copied: a functional program spells ``transpose`` as
``transpose_copy``, and ``reshape`` copies where it has to.
"""

from __future__ import annotations

import enum
from typing import Any

import torch

from flashpte.passes.graph.values import Described, aten_target

aten = torch.ops.aten


class Kind(enum.Enum):
    """What an operator does with the entries of its first argument."""

    SAME = enum.auto()
    """Every entry stays where it is: an alias or a copy."""
    RESHAPE = enum.auto()
    """The entries in their order, in dimensions of other sizes."""
    EXPAND = enum.auto()
    """Dimensions of size 1 are broadcast, dimensions are added in front."""
    REPEAT = enum.auto()
    """All entries of a dimension, and all of them again."""
    INTERLEAVE = enum.auto()
    """Each entry of a dimension several times in a row."""
    PERMUTE = enum.auto()
    """Dimensions in another order, which is the second argument."""
    TRANSPOSE = enum.auto()
    """Two dimensions change places."""
    SLICE = enum.auto()
    """A run of one dimension."""
    SELECT = enum.auto()
    """One entry of a dimension, which goes."""
    INDEX = enum.auto()
    """Entries picked by an index tensor."""
    JOIN = enum.auto()
    """``cat`` or ``stack`` of a list."""
    SPLIT = enum.auto()
    """A list of parts."""
    CAST = enum.auto()
    """Another dtype, device or memory layout."""


_KINDS: dict[Kind, tuple[Any, ...]] = {
    Kind.SAME: (
        *(aten.clone, aten.contiguous, aten.alias, aten.alias_copy, aten.detach, aten.detach_, aten.detach_copy),
        *(aten.lift_fresh_copy, aten.positive),
    ),
    Kind.RESHAPE: (
        *(aten.view, aten.view_copy, aten.reshape, aten._unsafe_view, aten._reshape_copy, aten.flatten, aten.unflatten),
        *(aten.squeeze, aten.squeeze_copy, aten.unsqueeze, aten.unsqueeze_copy, aten.view_as, aten.reshape_as),
    ),
    Kind.EXPAND: (aten.expand, aten.expand_copy, aten.expand_as, aten.broadcast_to),
    Kind.REPEAT: (aten.repeat, aten.tile),
    Kind.INTERLEAVE: (aten.repeat_interleave,),
    Kind.PERMUTE: (aten.permute, aten.permute_copy),
    Kind.TRANSPOSE: (aten.transpose, aten.transpose_copy, aten.swapaxes, aten.swapdims, aten.t, aten.t_copy),
    Kind.SLICE: (aten.slice, aten.slice_copy, aten.narrow, aten.narrow_copy),
    Kind.SELECT: (aten.select, aten.select_copy),
    Kind.INDEX: (aten.index, aten.index_select),
    Kind.JOIN: (aten.stack, aten.cat, aten.concat),
    Kind.SPLIT: (aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.tensor_split),
    Kind.CAST: (aten.to, aten._to_copy, aten.type_as),
}
_KIND_OF = {packet: kind for kind, packets in _KINDS.items() for packet in packets}

VIEW_COPIES: dict[Any, Any] = {
    aten.alias.default: aten.alias_copy.default,
    aten.expand.default: aten.expand_copy.default,
    aten.permute.default: aten.permute_copy.default,
    aten.select.int: aten.select_copy.int,
    aten.slice.Tensor: aten.slice_copy.Tensor,
    aten.split.Tensor: aten.split_copy.Tensor,
    aten.split_with_sizes.default: aten.split_with_sizes_copy.default,
    aten.squeeze.dim: aten.squeeze_copy.dim,
    aten.squeeze.dims: aten.squeeze_copy.dims,
    aten.t.default: aten.t_copy.default,
    aten.transpose.int: aten.transpose_copy.int,
    aten.unbind.int: aten.unbind_copy.int,
    aten.unsqueeze.default: aten.unsqueeze_copy.default,
    aten.view.default: aten.view_copy.default,
}
"""Views, and the copies as which a dialect without views (ExecuTorch's edge dialect) spells them."""


def packet_of(node: Described) -> Any:
    """The operator that a node calls, whatever its overload; ``None`` for what calls none."""
    return getattr(aten_target(node), "overloadpacket", None) if node.op == "call_function" else None


def kind_of(node: Described) -> Kind | None:
    """What the operator of a node does with the entries of its argument; ``None``: it computes others."""
    target = aten_target(node) if node.op == "call_function" else None
    # The bits of one dtype read as another.
    if target is None or target is aten.view.dtype:
        return None
    # ExecuTorch's casts are an operator of their own.
    if getattr(target, "__name__", "") == "_to_dim_order_copy.default":
        return Kind.CAST
    return _KIND_OF.get(getattr(target, "overloadpacket", None))
