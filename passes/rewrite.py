"""The interface of a rewrite, which finds matches in a graph, decides on each, and applies its decisions.

``flashpte.passes.rewrite_program`` runs an ordered list of rewrites. Deciding changes nothing in the graph. It plans
the nodes to insert (:mod:`flashpte.passes.graph.planned`). Each match ends up in the report, applied or refused, with
the reason.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from flashpte.passes.graph.constants import Constant
from flashpte.passes.graph.values import Ranges, module_path
from flashpte.passes.graph.weights import Weights

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Decision:
    """A match will be rewritten.

    Attributes:
        reason: one plain sentence that says what the match becomes, and why.
        plan: the input of :meth:`Rewrite.apply`.
    """

    reason: str
    plan: Any = None


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A match stays as it is.

    Attributes:
        reason: one plain sentence that says why.
        plan: additional data for the report.
    """

    reason: str
    plan: Any = None


@dataclasses.dataclass
class Run:
    """One run of a rewrite over a graph module, including its branches and regions.

    Attributes:
        graph_module: the graph module.
        ranges: the range constraints of the program, if known.
        kept: names of nodes that stay even if nothing uses them any more.
        constants: for each graph, the tensors that placeholders always hold, by the placeholder's name.
        weights: the program's weights, parameters included; ``None`` if only a graph is known.
    """

    graph_module: GraphModule
    ranges: Ranges | None
    kept: Collection[str]
    constants: dict[GraphModule, Mapping[str, Constant]]
    weights: Weights | None = None


@dataclasses.dataclass
class Scope:
    """One graph, as a rewrite sees it.

    Attributes:
        module: the graph's module, which is the program's own or that of a branch or region.
        run: the run that this scope belongs to.
        dropped: nodes that are removed with a rewritten match even though they count as impure.
        changed: whether a match in this graph was rewritten.
    """

    module: GraphModule
    run: Run
    dropped: set[Node] = dataclasses.field(default_factory=set)
    changed: bool = False
    _state: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        """The graph."""
        return self.module.graph

    @property
    def ranges(self) -> Ranges | None:
        """The program's range constraints."""
        return self.run.ranges

    @property
    def constants(self) -> Mapping[str, Constant]:
        """Tensors by the name of the placeholder that always holds them."""
        return self.run.constants.get(self.module, {})

    def state(self, make: Callable[[Scope], T]) -> T:
        """State that the matches of this graph share: ``make(self)``, created at the first call."""
        if make not in self._state:
            self._state[make] = make(self)
        return self._state[make]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What happened to one match.

    Attributes:
        node: name of the node that represents the match.
        module_path: dotted path of the node's module; empty if the graph does not say.
        decision: the decision or the refusal.
        result: what :meth:`Rewrite.apply` returned; ``None`` for a refusal.
    """

    node: str
    module_path: str
    decision: Decision | Refusal
    result: Any = None

    @property
    def applied(self) -> bool:
        """Whether the match was rewritten."""
        return isinstance(self.decision, Decision)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; the keys are stable."""
        return {
            "node": self.node,
            "module_path": self.module_path,
            "applied": self.applied,
            "reason": self.decision.reason,
        }


class Rewrite(abc.ABC):
    """A rewrite of exported programs. ``docs/adding-a-rewrite.md`` walks through an example."""

    name: ClassVar[str]
    """The rewrite's key in reports, and the last part of its logger's name."""

    @abc.abstractmethod
    def match(self, node: Node, scope: Scope) -> Any | None:
        """The match that the rewrite finds at a node (any object), or ``None`` if it finds nothing."""

    @abc.abstractmethod
    def decide(self, match: Any, scope: Scope) -> Decision | Refusal:
        """Decides on a match and gives the reason. Changes nothing."""

    @abc.abstractmethod
    def apply(self, match: Any, decision: Decision, scope: Scope) -> Any:
        """Rewrites a match in place. Nodes that become unused are removed after the run."""

    def node_of(self, match: Any) -> Node:
        """The node that represents a match in the report."""
        return match if isinstance(match, Node) else match.node

    def prepare(self, program: ExportedProgram) -> ExportedProgram:
        """The program that the rewrite starts from: the given one, or an equivalent one in another form.

        The given one may then be changed in place, so do not keep it.
        """
        return program

    @contextlib.contextmanager
    def around(self, run: Run) -> Iterator[None]:
        """A context around the run, from before the search for the first match until the last one is applied."""
        yield

    def report(self, outcomes: Sequence[Outcome]) -> Any:
        """The report on a run. It must have ``to_dict()``."""
        return Report(tuple(outcomes))


@dataclasses.dataclass(frozen=True)
class Report:
    """What a rewrite did with each match, in graph order."""

    outcomes: tuple[Outcome, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready report; the keys are stable."""
        return {"version": 1, "nodes": [outcome.to_dict() for outcome in self.outcomes]}


def outcome_of(node: Node, decision: Decision | Refusal) -> Outcome:
    """The outcome of a match whose node is still in its graph."""
    return Outcome(node.name, module_path(node), decision)
