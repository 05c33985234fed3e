"""The test for rows of -inf that belongs to a decomposed safe softmax. The kernels return 0 for such rows anyway."""

from __future__ import annotations

import torch
from torch.fx import Node

from flashpte.passes.attention.masks.operators import constant_of
from flashpte.passes.graph.values import val
from flashpte.passes.graph.views import packet_of

aten = torch.ops.aten


def is_row_test(node: Node) -> bool:
    """Whether ``node`` is ``scores == -inf`` in ``~any(~(scores == -inf), -1, keepdim)``, and used for nothing else."""
    for packet in (aten.logical_not, aten.any, aten.logical_not):
        users = list(node.users)
        if len(users) != 1 or packet_of(users[0]) is not packet:
            return False
        node = users[0]
    return all(packet_of(user) is aten.where for user in node.users)


def row_choice(softmax: Node) -> Node | None:
    """The ``where(row is all -inf, 0, softmax)`` after a softmax, if any. The kernels return 0 for such rows anyway."""
    for user in softmax.users:
        if packet_of(user) is not aten.where or len(user.args) < 3 or user.args[2] is not softmax:
            continue
        rows = user.args[0]
        if constant_of(user.args[1], set()) != 0 or not isinstance(rows, Node):
            continue
        path = [rows]
        for packet in (aten.logical_not, aten.any, aten.logical_not, aten.eq):
            if packet_of(path[-1]) is not packet or not isinstance(path[-1].args[0], Node):
                return None
            path.append(path[-1].args[0])
        any_row, equal = path[1], path[3]
        rank = val(softmax).dim()
        over = any_row.args[1] if len(any_row.args) > 1 else None
        if not isinstance(over, int) or over % rank != rank - 1 or any_row.args[2:] != (True,):
            return None
        return user if equal.args == (softmax.args[0], float("-inf")) else None
    return None
