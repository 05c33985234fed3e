"""Brings attention of any rank to ``[B, H, L, D]`` and back, with views around the node. Plans views, inserts nothing.

The inputs may be ``[L, D]``, ``[B, L, D]``, windows ``[B, N, H, L, D]``, or tensors that broadcast along the batch or
the heads. The dimension in front of the length is the heads, and all dimensions before that are the batch. A broadcast
is a stride of 0.

Two traps. Dimensions that are not adjacent in memory merge only with a copy. The copy pays off if many rows read the
keys, but not if one or two rows read a cache. The result must come back in the memory layout of the node.
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
from flashpte.passes.attention.masks.plan import mask_source
from flashpte.passes.graph.insert import insert_before
from flashpte.passes.graph.planned import Value, insert, planned, planned_size
from flashpte.passes.graph.values import Ranges, same_size, size_range, val

aten = torch.ops.aten

Size = int | torch.SymInt


def may_copy(call: SdpaCall, ranges: Ranges | None = None) -> bool:
    """Whether copying the keys is cheap next to the attention: many rows read them, or there is a row per key."""
    q_len, kv_len = val(call.query).shape[-2], val(call.key).shape[-2]
    return size_range(q_len, ranges)[0] > MAX_ROWS or same_size(q_len, kv_len)


def merges_in_place(sizes: Sequence[int | torch.SymInt], strides: Sequence[int | torch.SymInt]) -> bool:
    """Whether adjacent dimensions can be viewed as one dimension."""
    kept = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if not same_size(size, 1)]
    return all(same_size(outer[1], inner[0] * inner[1]) for outer, inner in itertools.pairwise(kept))


def to_four_dims(call: SdpaCall, ranges: Ranges | None = None) -> SdpaCall | str:
    """The call on ``[B, H, L, D]`` tensors, with planned views; or one sentence that says why that is impossible.

    Args:
        call: the call in its original form.
        ranges: the program's range constraints, if known.
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
        return _of_few_dims(call, rank)
    return _of_many_dims(call, rank, ranges)


def broadcast(call: SdpaCall) -> SdpaCall:
    """The call with equal batch sizes and equal key/value head counts. Dimensions of size 1 are expanded."""
    if any(val(node).dim() != 4 for node in (call.query, call.key, call.value)):
        return call
    nodes: dict[str, Value] = {"query": call.query, "key": call.key, "value": call.value}
    for dim, names in ((0, ("query", "key", "value")), (1, ("key", "value"))):
        nodes |= _expanded({name: nodes[name] for name in names}, dim)
    if same_size(val(nodes["query"]).shape[1], 1):
        nodes |= _expanded({"query": nodes["query"], "key": nodes["key"]}, 1)
    if all(nodes[name] is getattr(call, name) for name in nodes):
        return call
    return dataclasses.replace(call, query=nodes["query"], key=nodes["key"], value=nodes["value"])


def with_unit_strides(call: SdpaCall, ranges: Ranges | None = None) -> SdpaCall:
    """The call with copies of keys and values that are not contiguous in the head dim, if a copy pays off."""
    given = (call.key, call.value)
    if any(val(node).dim() != 4 for node in given) or not may_copy(call, ranges):
        return call
    key, value = (
        node
        if same_size(val(node).stride(3), 1)
        else planned(aten.clone.default, node, near=node, memory_format=torch.contiguous_format)
        for node in given
    )
    return call if (key, value) == given else dataclasses.replace(call, key=key, value=value)


def require_equal(anchor: Node, a: Size, b: Size, sources: Sequence[Value | None]) -> None:
    """Inserts a check that two sizes are equal, as attention does. At least one of them is dynamic."""
    given = [node for node in sources if node is not None]
    sides = [size if isinstance(size, int) else insert(_planned_size(anchor, size, given), anchor) for size in (a, b)]
    equal = insert_before(anchor, operator.eq, tuple(sides), a == b)
    message = f"attention needs equal sizes, {a} and {b}"
    insert_before(anchor, aten._assert_scalar.default, (equal, message), None)


def restored(call: SdpaCall, result: Value) -> Value:
    """The kernel's ``[B, H, L, D]`` result in the node's own dimensions, with planned views."""
    shape = val(call.node).shape
    if all(len(group) == 1 for group in call.dims):
        return result
    added = [dim for dim, group in enumerate(call.dims) if not group]
    if all(len(group) <= 1 for group in call.dims):
        return planned(aten.squeeze.dims, result, added, near=result)
    sources = [call.query, call.key, call.value, *call.node.all_input_nodes]
    sizes: list[int | Value] = [-1 if dim in call.dims[0][:1] else size for dim, size in enumerate(shape)]
    for dim, size in enumerate(sizes):
        if isinstance(size, torch.SymInt):
            sizes[dim] = _planned_size(call.node, size, sources)
    return planned(aten.view.default, result, sizes, near=result)


def _of_few_dims(call: SdpaCall, rank: int) -> SdpaCall:
    """Handles ``[L, D]`` and ``[N, L, D]``."""
    nodes: list[Value] = [call.query, call.key, call.value]
    while any(val(node).dim() < rank for node in nodes):
        nodes = [_unsqueezed(node, 0) if val(node).dim() < rank else node for node in nodes]
    if rank == 2:
        nodes = [_unsqueezed(_unsqueezed(node, 0), 0) for node in nodes]
        return _with(call, nodes, call.mask, ((), (), (0,), (1,)))
    sizes = [val(node).shape[0] for node in nodes]
    fixed = all(isinstance(size, int) for size in sizes)
    if fixed and (call.enable_gqa or not all(same_size(size, sizes[0]) for size in sizes)):
        nodes = [_unsqueezed(node, 0) for node in nodes]
        return _with(call, nodes, call.mask, ((), (0,), (1,), (2,)))
    # Without groups, N can also be the batch. The batch may be dynamic, and a mask that differs along it can be proven.
    nodes = [_unsqueezed(node, 1) for node in nodes]
    mask = call.mask
    if mask is not None and val(mask).dim() == 3:
        source = mask_source(mask)
        if val(source).dim() == 3:
            mask = _unsqueezed(source, 1)
        else:
            mask = source
    return _with(call, nodes, mask, ((0,), (), (1,), (2,)))


def _of_many_dims(call: SdpaCall, rank: int, ranges: Ranges | None) -> SdpaCall | str:
    """Handles four or more dimensions in any of the tensors. All dimensions before the heads become one batch."""
    nodes: list[Value] = [call.query, call.key, call.value]
    while any(val(node).dim() < rank for node in nodes):
        nodes = [_unsqueezed(node, 0) if val(node).dim() < rank else node for node in nodes]
    groups = (tuple(range(rank - 3)), (rank - 3,), (rank - 2,), (rank - 1,))
    if rank == 4:
        return _with(call, nodes, call.mask, groups)
    for dim in range(rank - 3):
        given = dict(zip("qkv", nodes, strict=True))
        nodes = list((given | _expanded(given, dim)).values())
    for dim in range(rank - 3):
        if not all(same_size(val(node).shape[dim], val(nodes[0]).shape[dim]) for node in nodes):
            return "query, key and value have different batch sizes"
    merged = []
    for name, node in zip(("query", "key", "value"), nodes, strict=True):
        tensor = val(node)
        if not merges_in_place(tensor.shape[: rank - 3], tensor.stride()[: rank - 3]):
            if not may_copy(call, ranges):
                return f"{name} has {rank} dimensions, which do not merge to 4: every call would copy it"
            node = planned(aten.clone.default, node, near=node, memory_format=torch.contiguous_format)
        merged.append(_merged(node, rank))
    mask = call.mask if call.mask is None else _merged_mask(call, val(nodes[0]).shape[: rank - 3], nodes)
    return _with(call, merged, mask, groups)


def _merged_mask(call: SdpaCall, batch: Sequence[int | torch.SymInt], sources: Sequence[Value]) -> Value:
    """The mask of an attention with several batch dimensions, with these merged into one."""
    assert call.mask is not None
    source = mask_source(call.mask)
    extra = val(source).dim() - 3
    if extra <= 0:
        return source
    mask = source
    own = val(mask).shape[:extra]
    if all(same_size(size, 1) for size in own):
        return mask if extra == 1 else planned(aten.squeeze.dims, mask, list(range(extra - 1)), near=mask)
    while val(mask).dim() - 3 < len(batch):
        mask = _unsqueezed(mask, 0)
    sizes = [size if isinstance(size, int) else _planned_size(call.node, size, sources) for size in batch]
    mask = planned(aten.expand.default, mask, [*sizes, -1, -1, -1], near=mask)
    if not merges_in_place(val(mask).shape[: len(batch)], val(mask).stride()[: len(batch)]):
        mask = planned(aten.clone.default, mask, near=mask, memory_format=torch.contiguous_format)
    return _merged(mask, val(mask).dim())


def _merged(node: Value, rank: int) -> Value:
    sizes = [planned_size(node, dim) for dim in range(rank - 3, rank)]
    batch = val(node).shape[: rank - 3]
    first = math.prod(size for size in batch if isinstance(size, int))
    dynamic = any(not isinstance(size, int) for size in batch)
    return planned(aten.view.default, node, [-1 if dynamic else first, *sizes], near=node)


def _expanded(nodes: dict[str, Value], dim: int) -> dict[str, Value]:
    """The nodes whose ``dim`` has size 1, expanded to the size of the others; empty if all have size 1."""
    sizes = {name: val(node).shape[dim] for name, node in nodes.items()}
    wide = [name for name, size in sizes.items() if not same_size(size, 1)]
    if not wide:
        return {}
    size = planned_size(nodes[wide[0]], dim)
    grown: dict[str, Value] = {}
    for name in nodes.keys() - wide:
        shape: list[int | Value] = [-1] * val(nodes[name]).dim()
        shape[dim] = size
        grown[name] = planned(aten.expand.default, nodes[name], shape, near=nodes[name])
    return grown


def _planned_size(anchor: Node, size: torch.SymInt, sources: Sequence[Value]) -> Value:
    """A value that reads a dynamic size from one of ``sources`` that has it."""
    for source in sources:
        known = source.meta["val"]
        if isinstance(known, torch.SymInt) and same_size(known, size):
            return source
        for dim, own in enumerate(known.shape if isinstance(known, torch.Tensor) else ()):
            if isinstance(own, torch.SymInt) and same_size(own, size):
                found = planned_size(source, dim)
                assert isinstance(found, Value)
                return found
    raise ValueError(f"no tensor of {anchor.name} has the size {size}")


def _unsqueezed(node: Value, dim: int) -> Value:
    return planned(aten.unsqueeze.default, node, dim, near=node)


def _with(call: SdpaCall, nodes: Sequence[Value], mask: Value | None, dims: tuple[tuple[int, ...], ...]) -> SdpaCall:
    query, key, value = nodes
    return dataclasses.replace(call, query=query, key=key, value=value, mask=mask, dims=dims)
