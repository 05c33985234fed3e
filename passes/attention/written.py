"""Finds attention that is written out as two matrix products around a softmax.

Eager attention has this form (``matmul``, scale, mask, ``softmax``, ``matmul``), and ``run_decompositions()`` turns
``scaled_dot_product_attention`` into it. Starting from a softmax over the last dimension, the pass walks forward to the
product with the values and back to the product of queries and keys. The steps between may be a factor, a mask that is
added, a mask that selects, a cast or a view. Anything else (a softcap, a sink, weights that are used elsewhere) is
named in the report.

Three traps. A mask that selects a finite number is more than a bool mask: a fully masked row is the mean of the values.
A factor after a mask also scales the mask. In a graph that is not functional, memory that the products read may be
written before the result is used.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from flashpte.passes.attention.masks.operators import constant_of
from flashpte.passes.graph.layouts import Layouts, moved_input, regrouped
from flashpte.passes.graph.values import aten_target, same_size, val
from flashpte.passes.graph.views import Kind, kind_of, packet_of

aten = torch.ops.aten

_SOFTMAX = (aten.softmax, aten._softmax, aten._safe_softmax, aten.special_softmax)
PRODUCTS = (aten.matmul, aten.bmm, aten.baddbmm)
_DROPOUTS = (aten.dropout, aten.native_dropout, aten.feature_dropout)
_CHECKS = (aten._assert_tensor_metadata, aten.sym_size, aten.full_like, aten.zeros_like)
_CHOOSES = (aten.where, aten.masked_fill)
# Operators that the search for the two products passes through, including those that make the pass decline.
_BETWEEN = (
    *(aten.add, aten.sub, aten.mul, aten.div, aten.tanh, aten.cat, aten.slice, aten.where, aten.masked_fill, aten.neg),
    *(aten.clamp, aten.exp, aten.select, aten.nan_to_num, aten.sigmoid, aten.constant_pad_nd, aten.slice_scatter),
    *(aten.clamp_min, aten.clamp_max, aten.minimum, aten.maximum, aten.rsub, aten.masked_fill_, aten.add_, aten.mul_),
    *(aten.div_, aten.sub_, aten.tanh_, aten.masked_fill_, aten.pow, aten.sqrt, aten.abs, aten.relu),
    *_SOFTMAX,
    *_DROPOUTS,
    *(aten.to, aten._to_copy, aten.type_as),
)
# On scores that nothing else uses, an in-place operator is equivalent to its functional form.
_IN_PLACE = {
    aten.add_: aten.add,
    aten.mul_: aten.mul,
    aten.div_: aten.div,
    aten.masked_fill_: aten.masked_fill,
}
_NAMES = {
    aten.tanh: "a softcap (tanh) is applied to the scores",
    aten.cat: "columns, such as a sink, are joined to the scores",
}
_DEPTH = 24


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation on the scores. ``kind`` is ``"scale"``, ``"add"`` or ``"keep"``.

    ``"keep"`` keeps the scores where ``tensor`` is true (false if ``flipped``) and puts ``number`` elsewhere.
    """

    kind: str
    tensor: Node | None = None
    number: float = 0.0
    flipped: bool = False


@dataclasses.dataclass(frozen=True)
class Unserved:
    """Attention that is left alone: the node that represents it, and one sentence that says why."""

    node: Node
    reason: str


@dataclasses.dataclass(frozen=True)
class Written:
    """Attention that is written out.

    Attributes:
        node: its result, ``[..., L, D_v]``.
        scores, result: the two products. Their arguments are the queries and transposed keys, and the values.
        steps: the operations on the scores, in order.
        dropped: nodes between the products that count as impure. They are removed with the attention.
        uncast: the result before a cast down to 16 bits, if there is one; otherwise ``node``.
    """

    node: Node
    scores: Node
    result: Node
    steps: tuple[Step, ...]
    dropped: tuple[Node, ...]
    uncast: Node


def find_written(softmax: Node) -> Written | Unserved | None:
    """The attention whose softmax a node is; ``None`` if there is none."""
    if packet_of(softmax) not in _SOFTMAX or not isinstance(softmax.meta.get("val"), torch.Tensor):
        return None
    dim, rank = softmax.args[1], val(softmax).dim()
    if not isinstance(dim, int) or rank < 2:
        return None
    scores, result = _search(softmax, back=True), _search(softmax, back=False)
    if scores is None or result is None:
        return None
    if dim % rank != rank - 1:
        return Unserved(result, "written out; its softmax is not over the last dimension of the scores")
    try:
        return _Reader(softmax).read()
    except _NotTaken as failure:
        return Unserved(result, f"written out; {failure}")


def is_product(node: Node) -> bool:
    """Whether a node is a batched matrix product."""
    packet = packet_of(node)
    if packet not in PRODUCTS:
        return False
    factors = node.args[1:3] if packet is aten.baddbmm else node.args[:2]
    return all(isinstance(factor, Node) and val(factor).dim() >= 3 for factor in factors)


class _NotTaken(Exception):
    """The steps around the products include something that the kernels do not compute; the message says what."""


class _Reader:
    def __init__(self, softmax: Node) -> None:
        self._softmax = softmax
        self._dropped: list[Node] = []

    def read(self) -> Written:
        chain, scores, steps = self._back()
        weights, result = self._forward()
        shape = val(self._softmax).shape
        self._same_matrix(scores, chain)
        self._same_matrix(self._softmax, weights)
        node, uncast = self._outcome(result, shape)
        return Written(node, scores, result, tuple(steps), tuple(self._dropped), uncast)

    def _only_user(self, node: Node, expected: Node | None = None) -> Node:
        """The only user of a node, not counting checks."""
        users = []
        for user in node.users:
            if packet_of(user) in _CHECKS:
                if packet_of(user) is aten._assert_tensor_metadata:
                    self._dropped.append(user)
            elif not self._is_safety(user, node):
                users.append(user)
        if len(users) != 1 or (expected is not None and users[0] is not expected):
            raise _NotTaken("its weights or scores are also used elsewhere")
        return users[0]

    def _is_safety(self, user: Node, node: Node) -> bool:
        """Whether ``user`` starts the test for rows of -inf that belongs to a decomposed softmax."""
        if packet_of(user) is not aten.eq or user.args[1] != float("-inf") or node is not self._softmax.args[0]:
            return False
        return _is_row_test(user)

    def _back(self) -> tuple[list[Node], Node, list[Step]]:
        """Walks back from the softmax to ``Q K``: the nodes after that product, the product, and their steps."""
        chain: list[Node] = [self._softmax]
        steps: list[Step] = []
        while True:
            node = chain[-1].args[0] if len(chain) == 1 else self._scores_of(chain[-1], steps)
            assert isinstance(node, Node)
            self._only_user(node, chain[-1])
            if is_product(node):
                if packet_of(node) is aten.baddbmm:
                    steps += _of_baddbmm(node)
                return chain[::-1], node, steps[::-1]
            if len(chain) > _DEPTH:
                raise _NotTaken("too many steps lie between its products")
            chain.append(node)

    def _scores_of(self, node: Node, steps: list[Step]) -> Node:
        """The argument of a step that holds the scores."""
        packet, args = packet_of(node), node.args
        sides: tuple[int, ...] = (0, 1)
        if packet in _IN_PLACE:
            packet, sides = _IN_PLACE[packet], (0,)
            self._dropped.append(node)
        source = args[0] if args else None
        if isinstance(source, Node) and (kind_of(node) is Kind.CAST or moved_input(node) is source):
            if not val(node).dtype.is_floating_point or val(node).dtype == torch.float64:
                raise _NotTaken(f"its scores are cast to {val(node).dtype}")
            return source
        if packet in (aten.mul, aten.div):
            for at in sides if packet is aten.mul else (0,):
                number = constant_of(args[1 - at], set())
                if isinstance(args[at], Node) and isinstance(number, (int, float)) and number != 0:
                    steps.append(Step("scale", number=float(number) if packet is aten.mul else 1.0 / number))
                    return args[at]  # type: ignore[return-value]
            raise _NotTaken("its scores are scaled by a tensor")
        if packet is aten.add and len(args) == 2 and not node.kwargs:
            # The scores may be on either side.
            for at in sides:
                side, other = args[at], args[1 - at]
                if isinstance(side, Node) and isinstance(other, Node) and _search(side, back=True, start=True):
                    steps.append(Step("add", self._like_scores(other, node)))
                    return side
        if packet in _CHOOSES:
            return self._chosen(node, steps)
        raise _NotTaken(_NAMES.get(packet, f"{_name(node)} is applied to the scores"))

    def _chosen(self, node: Node, steps: list[Step]) -> Node:
        if packet_of(node) in (aten.masked_fill, aten.masked_fill_):
            scores, condition, number, flipped = *node.args[:2], node.args[2], True
        else:
            condition, scores, number, flipped = *node.args[:3], False
            if constant_of(number, set()) is None:
                scores, number, flipped = number, scores, True
        value = constant_of(number, set())
        if not isinstance(scores, Node) or not isinstance(condition, Node) or value is None:
            raise _NotTaken("its scores are chosen from two tensors")
        # A number above float16's minimum could be an ordinary score, so it does not hide anything.
        if value > torch.finfo(torch.float16).min:
            raise _NotTaken(f"what its mask hides has the score {value}")
        steps.append(Step("keep", self._like_scores(condition, node), float(value), flipped))
        return scores

    def _like_scores(self, mask: Node, at: Node) -> Node:
        """The mask, if its step has the shape of the softmax or of scores with batch and heads merged."""
        shape, wanted = val(at).shape, val(self._softmax).shape
        if not _same_sizes(shape[-2:], wanted[-2:]) or (len(shape) != 3 and not _same_sizes(shape, wanted)):
            raise _NotTaken("its mask has other dimensions than its softmax")
        return mask

    def _forward(self) -> tuple[list[Node], Node]:
        """Walks from the softmax to the product with the values: the nodes between, and that product."""
        node = self._softmax
        chain: list[Node] = []
        safe = _row_choice(node)
        if safe is not None:
            others = [user for user in node.users if user is not safe and packet_of(user) not in _CHECKS]
            if others:
                raise _NotTaken("its weights or scores are also used elsewhere")
            node = safe
        while True:
            user = self._only_user(node)
            if is_product(user):
                if packet_of(user) is aten.baddbmm or user.args[0] is not node or user.args[1] is node:
                    raise _NotTaken("its values stand to the left of the weights")
                return chain, user
            packet = packet_of(user)
            if packet in _DROPOUTS:
                if packet is not aten.dropout or (user.args[1] != 0 and user.args[2]):
                    raise _NotTaken("it has dropout")
                self._dropped.append(user)
            elif kind_of(user) is Kind.CAST and user.args[0] is node:
                if not val(user).dtype.is_floating_point:
                    raise _NotTaken(f"its weights are cast to {val(user).dtype}")
            elif moved_input(user) is node:
                chain.append(user)
            else:
                raise _NotTaken(f"{_name(user)} is applied to its weights")
            node = user

    @staticmethod
    def _same_matrix(source: Node, chain: list[Node]) -> None:
        """Checks that the nodes keep rows, columns and the order of the matrices."""
        moving = [node for node in chain if moved_input(node) is not None]
        layout, shape = Layouts().through(source, moving), val(source).shape
        # Regrouping to the source's dimensions undoes what views split.
        again = None if layout is None else regrouped(layout, shape)
        last = val((moving or [source])[-1]).shape
        whole = [dim for dim, size in enumerate(shape) if not same_size(size, 1)]
        if (
            again is None
            or [factors[0].dim for factors in again if factors] != whole
            or not all(len(factors) < 2 for factors in again)
            or not all(same_size(last[at], shape[at]) for at in (-2, -1))
        ):
            raise _NotTaken("its scores or weights are transposed")

    @staticmethod
    def _outcome(result: Node, shape: torch.Size) -> tuple[Node, Node]:
        """The node to replace, and the result before a cast to 16 bits (the same node if there is none)."""
        node, lead = result, shape[:-2]
        if not _same_sizes(val(node).shape[:-2], lead):
            view = next(iter(node.users)) if len(node.users) == 1 else None
            if (
                view is None
                or kind_of(view) is not Kind.RESHAPE
                or not _same_sizes(val(view).shape[:-2], lead)
                or not _same_sizes(val(view).shape[-2:], val(node).shape[-2:])
            ):
                raise _NotTaken("the heads of its result are not those of its softmax")
            node = view
        cast = next(iter(node.users)) if len(node.users) == 1 else None
        if (
            cast is not None
            and kind_of(cast) is Kind.CAST
            and val(node).dtype == torch.float32
            and val(cast).dtype in (torch.bfloat16, torch.float16)
            and val(cast).device == val(node).device
        ):
            return _behind_copy(cast), node
        node = _behind_copy(node)
        return node, node


def _of_baddbmm(node: Node) -> list[Step]:
    """The steps of ``beta * input + alpha * (a @ b)``, the last one first."""
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if not isinstance(alpha, (int, float)) or alpha == 0 or not isinstance(beta, (int, float)):
        raise _NotTaken("its scores are scaled by a number that is computed")
    steps = []
    if beta not in (0, 1):
        raise _NotTaken(f"its mask is scaled by {beta}")
    if beta == 1:
        steps.append(Step("add", node.args[0]))  # type: ignore[arg-type]
    return [*steps, Step("scale", number=float(alpha))]


def _behind_copy(node: Node) -> Node:
    """The end of a ``permute -> clone -> permute`` that only changes the memory layout, or else the node itself."""
    chain = [node]
    while len(chain) < 4 and len(chain[-1].users) == 1:
        user = next(iter(chain[-1].users))
        if moved_input(user) is not chain[-1]:
            break
        chain.append(user)
        if len(chain) == 4:
            kinds = [packet_of(n) for n in chain[1:]]
            layout = Layouts().through(node, chain[1:])
            same = layout is not None and [f.dim for dim in layout for f in dim] == [
                dim for dim, size in enumerate(val(node).shape) if not same_size(size, 1)
            ]
            moved = kinds == [aten.permute, aten.clone, aten.permute]
            if moved and same and _same_sizes(val(user).shape, val(node).shape):
                return user
    return node


def _same_sizes(a: torch.Size, b: torch.Size) -> bool:
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def _is_row_test(node: Node) -> bool:
    """Whether ``node`` is ``scores == -inf`` in ``~any(~(scores == -inf), -1, keepdim)``, and used for nothing else."""
    for packet in (aten.logical_not, aten.any, aten.logical_not):
        users = list(node.users)
        if len(users) != 1 or packet_of(users[0]) is not packet:
            return False
        node = users[0]
    return all(packet_of(user) is aten.where for user in node.users)


def _row_choice(softmax: Node) -> Node | None:
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


def _search(node: Node, back: bool, start: bool = False) -> Node | None:
    """A product before a node (or after it), reached only through steps that may lie between the two products."""
    seen, frontier = {node}, [node]
    for _ in range(_DEPTH):
        following: list[Node] = []
        for current in frontier:
            for near in [current] if start else (current.all_input_nodes if back else list(current.users)):
                if near in seen and not start:
                    continue
                seen.add(near)
                if is_product(near) or (packet_of(near) is aten.einsum):
                    return near
                moved = moved_input(near) is not None
                if moved or packet_of(near) in _BETWEEN:
                    following.append(near)
        start = False
        frontier = following
    return None


def _name(node: Node) -> str:
    target = aten_target(node)
    return getattr(target, "_name", None) or str(getattr(target, "__name__", target))
