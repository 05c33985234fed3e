"""Brings attention of any rank to ``[B, H, L, D]``, and back: views around the node.

``[L, D]``, ``[B, L, D]``, windows ``[B, N, H, L, D]``, and tensors that broadcast along the batch or the heads: the
dimension in front of the length is the heads, what is in front of it the batch. A broadcast is a stride of 0.

The traps: dimensions that do not follow each other in memory merge only by a copy, which is worth it where keys are
read by many rows, not where a row or two read a cache. And the result must come back in the memory layout of the node.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Sequence

import torch
from torch.fx import Node

from flashpte.kernels.contract import MAX_ROWS
from flashpte.passes.attention.call import SdpaCall
from flashpte.passes.attention.masks.tile_maps import mask_source
from flashpte.passes.graph.insert import call_before, insert_before, size_argument
from flashpte.passes.graph.values import Ranges, same_size, size_range, val

aten = torch.ops.aten

Size = int | torch.SymInt

# Masks brought to four dimensions, by the mask and its form: layers share a mask, and so have to share its view.
MaskForms = dict[tuple, Node]


def may_copy(call: SdpaCall, ranges: Ranges | None = None) -> bool:
    """Whether a copy of the keys is small beside the attention: many rows read them, or they are as new as the rows."""
    q_len, kv_len = val(call.query).shape[-2], val(call.key).shape[-2]
    return size_range(q_len, ranges)[0] > MAX_ROWS or same_size(q_len, kv_len)


def merges_in_place(sizes: Sequence[int | torch.SymInt], strides: Sequence[int | torch.SymInt]) -> bool:
    """Whether neighbouring dimensions are one dimension of the same memory."""
    kept = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if not same_size(size, 1)]
    return all(same_size(outer[1], inner[0] * inner[1]) for outer, inner in itertools.pairwise(kept))


def to_four_dims(call: SdpaCall, masks: MaskForms, ranges: Ranges | None = None) -> SdpaCall | str:
    """The call on ``[B, H, L, D]`` tensors, by views before the node; or in one sentence why there are none.

    Args:
        call: the call as it is written.
        masks: the masks that were brought to four dimensions so far.
        ranges: the program's range constraints, where they are known.
    """
    tensors = [val(node) for node in (call.query, call.key, call.value)]
    rank = val(call.node).dim()
    if min(t.dim() for t in tensors) < 2 or rank < 2 or max(t.dim() for t in tensors) != rank:
        return f"query, key, value have {', '.join(str(t.dim()) for t in tensors)} dimensions, the result {rank}"
    if call.mask is not None and val(call.mask).dim() > rank:
        return f"the mask has {val(call.mask).dim()} dimensions, the result {rank}"
    if rank == 4 and all(t.dim() == 4 for t in tensors):
        return call
    if rank < 4:
        return _of_few_dims(call, masks, rank)
    return _of_many_dims(call, masks, rank, ranges)


def broadcast(call: SdpaCall) -> SdpaCall:
    """The call with one batch size and one number of key/value heads: what has size 1 there is expanded."""
    if any(val(node).dim() != 4 for node in (call.query, call.key, call.value)):
        return call
    nodes = {"query": call.query, "key": call.key, "value": call.value}
    for dim, names in ((0, ("query", "key", "value")), (1, ("key", "value"))):
        nodes |= _expanded(call.node, {name: nodes[name] for name in names}, dim)
    if same_size(val(nodes["query"]).shape[1], 1):
        nodes |= _expanded(call.node, {"query": nodes["query"], "key": nodes["key"]}, 1)
    if all(nodes[name] is getattr(call, name) for name in nodes):
        return call
    return dataclasses.replace(call, query=nodes["query"], key=nodes["key"], value=nodes["value"])


def with_unit_strides(call: SdpaCall, ranges: Ranges | None = None) -> SdpaCall:
    """The call on copies of keys and values that are not contiguous in the head dim, where a copy is worth it."""
    given = (call.key, call.value)
    if any(val(node).dim() != 4 for node in given) or not may_copy(call, ranges):
        return call
    key, value = (
        node
        if same_size(val(node).stride(3), 1)
        else call_before(call.node, aten.clone.default, node, memory_format=torch.contiguous_format)
        for node in given
    )
    return call if (key, value) == given else dataclasses.replace(call, key=key, value=value)


def require_equal(anchor: Node, a: Size, b: Size, sources: Sequence[Node | None]) -> None:
    """Inserts a check that two sizes, of which one is dynamic, are equal, as attention checks."""
    given = [node for node in sources if node is not None]
    sides = [size if isinstance(size, int) else _size_node(anchor, size, given) for size in (a, b)]
    equal = insert_before(anchor, operator.eq, tuple(sides), a == b)
    message = f"attention needs equal sizes, {a} and {b}"
    insert_before(anchor, aten._assert_scalar.default, (equal, message), None)


def restored(call: SdpaCall, result: Node) -> Node:
    """The kernel's ``[B, H, L, D]`` as the node's own dimensions, by views before the node."""
    shape = val(call.node).shape
    if all(len(group) == 1 for group in call.dims):
        return result
    added = [dim for dim, group in enumerate(call.dims) if not group]
    if all(len(group) <= 1 for group in call.dims):
        return call_before(call.node, aten.squeeze.dims, result, added)
    sources = [call.query, call.key, call.value, *call.node.all_input_nodes]
    sizes: list[int | Node] = [-1 if dim in call.dims[0][:1] else size for dim, size in enumerate(shape)]
    for dim, size in enumerate(sizes):
        if isinstance(size, torch.SymInt):
            sizes[dim] = _size_node(call.node, size, sources)
    return call_before(call.node, aten.view.default, result, sizes)


def _of_few_dims(call: SdpaCall, masks: MaskForms, rank: int) -> SdpaCall:
    """``[L, D]`` and ``[N, L, D]``."""
    nodes = [call.query, call.key, call.value]
    while any(val(node).dim() < rank for node in nodes):
        nodes = [_unsqueezed(call.node, node, 0) if val(node).dim() < rank else node for node in nodes]
    if rank == 2:
        nodes = [_unsqueezed(call.node, _unsqueezed(call.node, node, 0), 0) for node in nodes]
        return _with(call, nodes, call.mask, ((), (), (0,), (1,)))
    sizes = [val(node).shape[0] for node in nodes]
    fixed = all(isinstance(size, int) for size in sizes)
    if fixed and (call.enable_gqa or not all(same_size(size, sizes[0]) for size in sizes)):
        nodes = [_unsqueezed(call.node, node, 0) for node in nodes]
        return _with(call, nodes, call.mask, ((), (0,), (1,), (2,)))
    # Without groups the batch is as good, which may be dynamic, and where a mask may differ and still be proven.
    nodes = [_unsqueezed(call.node, node, 1) for node in nodes]
    mask = call.mask
    if mask is not None and val(mask).dim() == 3:
        source = mask_source(mask)
        if val(source).dim() == 3:
            if (source, "batch") not in masks:
                masks[source, "batch"] = _unsqueezed(call.node, source, 1)
            mask = masks[source, "batch"]
        else:
            mask = source
    return _with(call, nodes, mask, ((0,), (), (1,), (2,)))


def _of_many_dims(call: SdpaCall, masks: MaskForms, rank: int, ranges: Ranges | None) -> SdpaCall | str:
    """Four or more dimensions in any of the tensors: all in front of the heads are one batch."""
    nodes = [call.query, call.key, call.value]
    while any(val(node).dim() < rank for node in nodes):
        nodes = [_unsqueezed(call.node, node, 0) if val(node).dim() < rank else node for node in nodes]
    groups = (tuple(range(rank - 3)), (rank - 3,), (rank - 2,), (rank - 1,))
    if rank == 4:
        return _with(call, nodes, call.mask, groups)
    for dim in range(rank - 3):
        given = dict(zip("qkv", nodes, strict=True))
        nodes = list((given | _expanded(call.node, given, dim)).values())
    for dim in range(rank - 3):
        if not all(same_size(val(node).shape[dim], val(nodes[0]).shape[dim]) for node in nodes):
            return "query, key and value have different batch sizes"
    merged = []
    for name, node in zip(("query", "key", "value"), nodes, strict=True):
        tensor = val(node)
        if not merges_in_place(tensor.shape[: rank - 3], tensor.stride()[: rank - 3]):
            if not may_copy(call, ranges):
                return f"{name} has {rank} dimensions, which do not merge to 4: every call would copy it"
            node = call_before(call.node, aten.clone.default, node, memory_format=torch.contiguous_format)
        merged.append(_merged(call.node, node, rank))
    mask = call.mask if call.mask is None else _merged_mask(call, masks, val(nodes[0]).shape[: rank - 3], nodes)
    return _with(call, merged, mask, groups)


def _merged_mask(
    call: SdpaCall, masks: MaskForms, batch: Sequence[int | torch.SymInt], sources: Sequence[Node]
) -> Node:
    """A mask of an attention with several batch dimensions, as the attention with one sees it."""
    source = mask_source(call.mask)
    extra = val(source).dim() - 3
    if extra <= 0:
        return source
    form = (source, *(str(size) for size in batch))
    if form in masks:
        return masks[form]
    mask = source
    own = val(mask).shape[:extra]
    if all(same_size(size, 1) for size in own):
        if extra > 1:
            mask = call_before(call.node, aten.squeeze.dims, mask, list(range(extra - 1)))
    else:
        while val(mask).dim() - 3 < len(batch):
            mask = _unsqueezed(call.node, mask, 0)
        sizes = [size if isinstance(size, int) else _size_node(call.node, size, sources) for size in batch]
        mask = call_before(call.node, aten.expand.default, mask, [*sizes, -1, -1, -1])
        if not merges_in_place(val(mask).shape[: len(batch)], val(mask).stride()[: len(batch)]):
            mask = call_before(call.node, aten.clone.default, mask, memory_format=torch.contiguous_format)
        mask = _merged(call.node, mask, val(mask).dim())
    masks[form] = mask
    return mask


def _merged(anchor: Node, node: Node, rank: int) -> Node:
    sizes: list[int | Node] = [size_argument(anchor, node, dim) for dim in range(rank - 3, rank)]
    batch = val(node).shape[: rank - 3]
    first = math.prod(size for size in batch if isinstance(size, int))
    dynamic = any(not isinstance(size, int) for size in batch)
    return call_before(anchor, aten.view.default, node, [-1 if dynamic else first, *sizes])


def _expanded(anchor: Node, nodes: dict[str, Node], dim: int) -> dict[str, Node]:
    """The nodes that have size 1 in ``dim`` where another has more, expanded to it."""
    sizes = {name: val(node).shape[dim] for name, node in nodes.items()}
    wide = [name for name, size in sizes.items() if not same_size(size, 1)]
    if not wide:
        return {}
    size = size_argument(anchor, nodes[wide[0]], dim)
    grown = {}
    for name in nodes.keys() - wide:
        shape: list[int | Node] = [-1] * val(nodes[name]).dim()
        shape[dim] = size
        grown[name] = call_before(anchor, aten.expand.default, nodes[name], shape)
    return grown


def _size_node(anchor: Node, size: torch.SymInt, sources: Sequence[Node]) -> Node:
    """A node that reads a dynamic size off one of ``sources`` that has it."""
    for source in sources:
        known = source.meta["val"]
        if isinstance(known, torch.SymInt) and same_size(known, size):
            return source
        for dim, own in enumerate(known.shape if isinstance(known, torch.Tensor) else ()):
            if isinstance(own, torch.SymInt) and same_size(own, size):
                found = size_argument(anchor, source, dim)
                assert isinstance(found, Node)
                return found
    raise ValueError(f"no tensor of {anchor.name} has the size {size}")


def _unsqueezed(anchor: Node, node: Node, dim: int) -> Node:
    return call_before(anchor, aten.unsqueeze.default, node, dim)


def _with(call: SdpaCall, nodes: Sequence[Node], mask: Node | None, dims: tuple[tuple[int, ...], ...]) -> SdpaCall:
    query, key, value = nodes
    return dataclasses.replace(call, query=query, key=key, value=value, mask=mask, dims=dims)
