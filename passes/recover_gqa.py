"""Recovers grouped-query attention: undoes ``repeat_kv`` in front of the keys and values.

Without ``enable_gqa`` a model repeats each key/value head for the query heads that share it:
``unsqueeze -> expand -> reshape`` (Hugging Face's ``repeat_kv``, or ``repeat_interleave`` once decomposed), or
``repeat_interleave`` itself. That copies the whole cache at every step; the kernels take grouped heads as they are.

The traps: ``k.repeat(1, G, 1, 1)`` has the same shapes and another order of heads (0 1 0 1 instead of 0 0 1 1), so only
the repetition right behind the head dimension is recovered. And before a program is made functional, the cache may be
written between the repetition and the attention, or the copy may be: then the copy is not the cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from flashpte.passes.mutation import written_between
from flashpte.passes.sdpa_node import SdpaCall, aten_target, same_size, val

aten = torch.ops.aten
_COPIES = (aten.clone, aten.contiguous, aten.alias, aten.alias_copy, aten.detach, aten.lift_fresh_copy)
_RESHAPES = (aten.view, aten.view_copy, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten)
_EXPANDS = (aten.expand, aten.expand_copy)
_UNSQUEEZES = (aten.unsqueeze, aten.unsqueeze_copy)
_SLICES = (aten.slice, aten.slice_copy)


def recover_gqa(call: SdpaCall) -> SdpaCall:
    """The call on grouped heads, if both key and value are repetitions of fewer heads; else the call itself.

    Changes nothing in the graph: the repetition is dead once the call is replaced.
    """
    key, value = _ungrouped(call.key), _ungrouped(call.value)
    if key is None or value is None or val(key).shape[1] != val(value).shape[1]:
        return call
    if val(call.query).shape[1] != val(call.key).shape[1]:
        return call
    for source, repeated in ((key, call.key), (value, call.value)):
        chain = _chain(source, repeated)
        if written_between(chain[0], call.node, [source, *chain]):
            return call
    return dataclasses.replace(call, key=key, value=value, enable_gqa=True)


def _ungrouped(repeated: Node) -> Node | None:
    """The ``[B, H_kv, L, D]`` node that ``repeated`` ``[B, H_kv * G, L, D]`` repeats head by head, or ``None``."""
    node = _skip_identities(repeated)
    if val(node).dim() != 4:
        return None
    if _calls(node, (aten.repeat_interleave,)):
        source, times, *dim = node.args
        if isinstance(times, int) and (dim or [node.kwargs.get("dim")])[0] in (1, -3):
            return _node(source)
        return None
    if not _calls(node, _RESHAPES):
        return None
    merged, grouped = val(node).shape, _skip_identities(node.args[0])
    shape = val(grouped).shape
    if len(shape) != 5 or not _calls(grouped, _EXPANDS):
        return None
    keeps_order = same_size(shape[0], merged[0]) and same_size(shape[3], merged[2]) and same_size(shape[4], merged[3])
    if not keeps_order or not same_size(shape[1] * shape[2], merged[1]):
        return None
    single = _skip_identities(grouped.args[0])
    one = val(single).shape
    if len(one) != 5 or not same_size(one[2], 1) or not all(same_size(one[i], shape[i]) for i in (0, 1, 3, 4)):
        return None
    if not _calls(single, (*_UNSQUEEZES, *_RESHAPES)):
        return None
    source = _skip_identities(single.args[0])
    if val(source).dim() != 4 or not all(
        same_size(a, b) for a, b in zip(val(source).shape, (*one[:2], *one[3:]), strict=True)
    ):
        return None
    return source


def _chain(source: Node, repeated: Node) -> list[Node]:
    """The nodes from behind ``source`` to ``repeated``, first one first."""
    nodes = [repeated]
    while nodes[-1].args[0] is not source:
        nodes.append(_node(nodes[-1].args[0]))
    return nodes[::-1]


def _skip_identities(argument: Any) -> Node:
    """Walks back over nodes that hand their input on unchanged in value and shape."""
    node = _node(argument)
    while _calls(node, _COPIES) or (_calls(node, (*_SLICES, *_EXPANDS, *_RESHAPES)) and _same_shape(node)):
        node = _node(node.args[0])
    return node


def _same_shape(node: Node) -> bool:
    before, after = val(_node(node.args[0])).shape, val(node).shape
    return len(before) == len(after) and all(same_size(a, b) for a, b in zip(before, after, strict=True))


def _calls(node: Node, packets: tuple[Any, ...]) -> bool:
    return getattr(aten_target(node), "overloadpacket", None) in packets


def _node(argument: Any) -> Node:
    assert isinstance(argument, Node)
    return argument
