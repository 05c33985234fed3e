"""Finds attention that is written out as two matrix products around a softmax.

Eager attention has this form (``matmul``, scale, mask, ``softmax``, ``matmul``), and ``run_decompositions()`` turns
``scaled_dot_product_attention`` into it. Starting from a softmax over the last dimension, the pass walks forward to the
product with the values and back to the product of queries and keys. The steps between may be a factor, a softcap
(``c * tanh(scores / c)``), a mask that is added, a mask that selects, a column of sinks
(:mod:`flashpte.passes.attention.written_sinks`), the maximum that is subtracted, a cast or a view. Anything else (such
as weights that are used elsewhere) is named in the report.

Three traps. A mask that selects a finite number is more than a bool mask: a fully masked row is the mean of the values.
A factor after a mask also scales the mask. In a graph that is not functional, memory that the products read may be
written before the result is used.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from flashpte.passes.attention.masks.operators import constant_of
from flashpte.passes.attention.safe_softmax import is_row_test, row_choice
from flashpte.passes.attention.written_shapes import outcome, same_matrix, same_sizes
from flashpte.passes.attention.written_sinks import Joined, drops, joined_column, shifted
from flashpte.passes.graph.layouts import moved_input
from flashpte.passes.graph.values import aten_target, val
from flashpte.passes.graph.views import Kind, kind_of, packet_of

aten = torch.ops.aten

_SOFTMAX = (aten.softmax, aten._softmax, aten._safe_softmax, aten.special_softmax)
PRODUCTS = (aten.matmul, aten.bmm, aten.baddbmm)
_DROPOUTS = (aten.dropout, aten.native_dropout, aten.feature_dropout)
# They read no entry of the scores.
_CHECKS = (
    *(aten._assert_tensor_metadata, aten.sym_size, aten.full_like, aten.zeros_like, aten.ones_like),
    *(aten.new_full, aten.new_zeros, aten.new_ones),
)
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
    aten.tanh_: aten.tanh,
    aten.sub_: aten.sub,
}
_NAMES = {aten.cat: "columns are joined to the scores that are not one sink for each head"}
_DEPTH = 24


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation on the scores. ``kind`` is ``"scale"``, ``"tanh"``, ``"add"`` or ``"keep"``.

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
        joined: the sinks that join the scores before the softmax and are dropped after it, if any.
    """

    node: Node
    scores: Node
    result: Node
    steps: tuple[Step, ...]
    dropped: tuple[Node, ...]
    uncast: Node
    joined: Joined | None = None


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
        self._joined: Joined | None = None
        # Maxima of the scores that are subtracted from them.
        self._maxima: set[Node] = set()

    def read(self) -> Written:
        chain, scores, steps = self._back()
        weights, result = self._forward()
        if not same_matrix(scores, chain) or not all(same_matrix(source, nodes) for source, nodes in weights):
            raise _NotTaken("its scores or weights are transposed")
        found = outcome(result, val(self._softmax).shape)
        if found is None:
            raise _NotTaken("the heads of its result are not those of its softmax")
        return Written(found[0], scores, result, tuple(steps), tuple(self._dropped), found[1], self._joined)

    def _only_user(self, node: Node, expected: Node | None = None) -> Node:
        """The only user of a node, not counting checks."""
        users = []
        for user in node.users:
            if packet_of(user) in _CHECKS:
                if packet_of(user) is aten._assert_tensor_metadata:
                    self._dropped.append(user)
            elif user not in self._maxima and not self._is_safety(user, node):
                users.append(user)
        if len(users) != 1 or (expected is not None and users[0] is not expected):
            raise _NotTaken("its weights or scores are also used elsewhere")
        return users[0]

    def _is_safety(self, user: Node, node: Node) -> bool:
        """Whether ``user`` starts the test for rows of -inf that belongs to a decomposed softmax."""
        if packet_of(user) is not aten.eq or user.args[1] != float("-inf") or node is not self._softmax.args[0]:
            return False
        return is_row_test(user)

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
        if packet is aten.tanh and isinstance(source, Node):
            steps.append(Step("tanh"))
            return source
        if packet is aten.cat and self._joined is None and (joined := joined_column(node)) is not None:
            if steps:
                raise _NotTaken("a mask, a factor or a softcap is applied to its sinks as well")
            self._joined = joined
            return joined.scores
        if packet is aten.sub and (found := shifted(node)) is not None:
            scores, largest = found
            # Nothing else reads the maximum, so it goes with the scores.
            readers = [user for reader in largest.users for user in ([reader] if reader is node else reader.users)]
            if readers != [node]:
                raise _NotTaken("its weights or scores are also used elsewhere")
            self._maxima.add(largest)
            return scores
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
        shape = val(at).shape
        wanted = val(self._softmax if self._joined is None else self._joined.scores).shape
        if not same_sizes(shape[-2:], wanted[-2:]) or (len(shape) != 3 and not same_sizes(shape, wanted)):
            raise _NotTaken("its mask has other dimensions than its softmax")
        return mask

    def _forward(self) -> tuple[list[tuple[Node, list[Node]]], Node]:
        """Walks from the softmax to the product with the values.

        Returns the views between, as a source and the nodes after it, for the softmax and for the weights without
        sinks; and that product.
        """
        node = self._softmax
        chain: list[Node] = []
        views = [(node, chain)]
        safe = row_choice(node)
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
                if self._joined is not None and len(views) == 1:
                    raise _NotTaken("columns are joined to the scores and have values")
                return views, user
            packet = packet_of(user)
            if packet in _DROPOUTS:
                if packet is not aten.dropout or (user.args[1] != 0 and user.args[2]):
                    raise _NotTaken("it has dropout")
                self._dropped.append(user)
            elif kind_of(user) is Kind.CAST and user.args[0] is node:
                if not val(user).dtype.is_floating_point:
                    raise _NotTaken(f"its weights are cast to {val(user).dtype}")
            elif self._joined is not None and len(views) == 1 and drops(user, self._joined):
                chain = []
                views.append((user, chain))
            elif moved_input(user) is node:
                chain.append(user)
            else:
                raise _NotTaken(f"{_name(user)} is applied to its weights")
            node = user


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
