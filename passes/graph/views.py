"""The single table of operators whose result holds entries of their argument: views, copies, repetitions, casts.

A kind says what happens to the entries, not whether memory is copied. A functional program writes ``transpose`` as
``transpose_copy``, and ``reshape`` copies only if it must.
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
    """The entries keep their order, and dimensions change size."""
    EXPAND = enum.auto()
    """Dimensions of size 1 are broadcast, and dimensions may be added in front."""
    REPEAT = enum.auto()
    """A dimension is repeated as a whole."""
    INTERLEAVE = enum.auto()
    """Each entry of a dimension is repeated several times in a row."""
    PERMUTE = enum.auto()
    """Dimensions are reordered; the second argument is the order."""
    TRANSPOSE = enum.auto()
    """Two dimensions are swapped."""
    SLICE = enum.auto()
    """A range of one dimension is kept."""
    SELECT = enum.auto()
    """One entry of a dimension is kept, and the dimension is removed."""
    INDEX = enum.auto()
    """An index tensor picks entries."""
    JOIN = enum.auto()
    """``cat`` or ``stack`` of a list."""
    SPLIT = enum.auto()
    """A list of parts."""
    CAST = enum.auto()
    """The dtype, device or memory layout changes."""


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
"""Views, and the copies that replace them in a dialect without views (ExecuTorch's edge dialect)."""


def packet_of(node: Described) -> Any:
    """The operator that a node calls, without its overload; ``None`` if the node calls none."""
    return getattr(aten_target(node), "overloadpacket", None) if node.op == "call_function" else None


def kind_of(node: Described) -> Kind | None:
    """What a node's operator does with the entries of its argument; ``None`` if it computes new ones."""
    target = aten_target(node) if node.op == "call_function" else None
    # ``view.dtype`` reinterprets the bits as another dtype.
    if target is None or target is aten.view.dtype:
        return None
    # ExecuTorch has its own operator for casts.
    if getattr(target, "__name__", "") == "_to_dim_order_copy.default":
        return Kind.CAST
    return _KIND_OF.get(getattr(target, "overloadpacket", None))
