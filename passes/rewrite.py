"""What a rewrite is: something that finds matches in a graph, decides about each, and applies what it decided.

``flashpte.passes.rewrite_program`` runs an ordered list of them. Deciding changes nothing; what is to be inserted is
planned (:mod:`flashpte.passes.graph.planned`). Each match ends in the report, applied or refused, with its reason.
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

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Decision:
    """A match will be rewritten.

    Attributes:
        reason: one plain sentence: what it becomes, and why.
        plan: what :meth:`Rewrite.apply` needs.
    """

    reason: str
    plan: Any = None


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A match stays as it is.

    Attributes:
        reason: one plain sentence on why.
        plan: what the report says besides.
    """

    reason: str
    plan: Any = None


@dataclasses.dataclass
class Run:
    """One run of a rewrite over a graph module and the branches and regions in it.

    Attributes:
        graph_module: the graph module.
        ranges: the range constraints of its program, where they are known.
        kept: names of nodes that stay even if nothing uses them any more.
        constants: by graph, the tensors that its placeholders always hold, by their names.
    """

    graph_module: GraphModule
    ranges: Ranges | None
    kept: Collection[str]
    constants: dict[GraphModule, Mapping[str, Constant]]


@dataclasses.dataclass
class Scope:
    """One graph, as a rewrite sees it.

    Attributes:
        module: the graph's module: the program's, or a branch or region in it.
        run: the run that it is part of.
        dropped: nodes that go with what was rewritten, though they count as impure.
        changed: whether a match in it was rewritten.
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
        """What matches of this graph share: ``make(self)``, made at the first call."""
        if make not in self._state:
            self._state[make] = make(self)
        return self._state[make]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What happened to one match.

    Attributes:
        node: name of the node that shows the match.
        module_path: dotted path of the module that it is in; empty where the graph does not say.
        decision: the decision, or the refusal.
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
    """A rewrite of exported programs. ``docs/adding-a-rewrite.md`` writes one."""

    name: ClassVar[str]
    """Its key in reports, and the end of its logger's name."""

    @abc.abstractmethod
    def match(self, node: Node, scope: Scope) -> Any | None:
        """What the rewrite sees in a node: anything but ``None``, or ``None`` where there is nothing for it."""

    @abc.abstractmethod
    def decide(self, match: Any, scope: Scope) -> Decision | Refusal:
        """Decides about a match, with a reason. Changes nothing."""

    @abc.abstractmethod
    def apply(self, match: Any, decision: Decision, scope: Scope) -> Any:
        """Rewrites a match in place; what nothing uses any more is removed after the run."""

    def node_of(self, match: Any) -> Node:
        """The node that shows a match in the report."""
        return match if isinstance(match, Node) else match.node

    def prepare(self, program: ExportedProgram) -> ExportedProgram:
        """The program that the rewrite starts from: the same one, or an equal one in another form."""
        return program

    @contextlib.contextmanager
    def around(self, run: Run) -> Iterator[None]:
        """What happens before the first match of a run is looked for, and after the last one was applied."""
        yield

    def report(self, outcomes: Sequence[Outcome]) -> Any:
        """The report on a run; has ``to_dict()``."""
        return Report(tuple(outcomes))


@dataclasses.dataclass(frozen=True)
class Report:
    """What a rewrite did to each of its matches, in graph order."""

    outcomes: tuple[Outcome, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready report; the keys are stable."""
        return {"version": 1, "nodes": [outcome.to_dict() for outcome in self.outcomes]}


def outcome_of(node: Node, decision: Decision | Refusal) -> Outcome:
    """The outcome of a match whose node is still in its graph."""
    return Outcome(node.name, module_path(node), decision)
