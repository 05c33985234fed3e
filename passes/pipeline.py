"""Runs rewrites over programs: ``rewrite_program`` runs an ordered list, ``replace_sdpa`` only the attention rewrite.

To debug a rewrite, use its logger, ``flashpte.rewrite.<name>``. At ``INFO`` it logs the time of each run in seconds and
how many matches were rewritten. At ``DEBUG`` it also logs the graph before and after.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from flashpte.passes.attention.report import RoutingReport
from flashpte.passes.attention.rewrite import AttentionRewrite
from flashpte.passes.graph.constants import Constant, constant_tensors
from flashpte.passes.graph.dead_code import eliminate_dead_code
from flashpte.passes.graph.insert import keep_names
from flashpte.passes.graph.values import Ranges
from flashpte.passes.graph.weights import Weights
from flashpte.passes.linear.fuse import FuseLinears
from flashpte.passes.linear.rewrite import LinearRewrite
from flashpte.passes.rewrite import Outcome, Refusal, Report, Rewrite, Run, Scope, outcome_of

ENTRY_POINTS = "flashpte.rewrites"
"""Entry point group for rewrites of other packages: subclasses of ``Rewrite`` that take no arguments."""


def default_rewrites() -> tuple[Rewrite, ...]:
    """The rewrites that run by default, in order: flashpte's own, then those of other packages, sorted by name.

    Raises:
        TypeError: an entry point is not a rewrite.
        ValueError: two rewrites have the same name.
    """
    others = []
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        made = point.load()()
        if not isinstance(made, Rewrite):
            raise TypeError(
                f"entry point {point.name} = {point.value} of {ENTRY_POINTS} is not a flashpte.passes.Rewrite"
            )
        others.append(made)
    rewrites = (AttentionRewrite(), *others)
    names = [rewrite.name for rewrite in rewrites]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} rewrites are named {name!r}")
    return rewrites


def rewrite_program(
    exported_program: ExportedProgram, rewrites: Sequence[Rewrite] | None = None
) -> tuple[ExportedProgram, dict[str, Any]]:
    """Runs rewrites over a program, one after the other.

    Args:
        exported_program: a program from ``torch.export.export``, before or after ``run_decompositions``, but before
            ``to_edge``. It is not changed. The result shares its weights without copying them. Buffers that the program
            does not write count as constants, so masks kept in them may be compiled away.
        rewrites: the rewrites, in order; by default :func:`default_rewrites`.

    Returns:
        The rewritten program, and each rewrite's report by the rewrite's name.

    Raises:
        TypeError: the argument is not an exported program.
        ValueError: the graph carries no tensor metadata.
    """
    if not isinstance(exported_program, ExportedProgram):
        raise TypeError(
            f"the pass takes a torch.export.ExportedProgram, got {type(exported_program).__name__}; "
            "call torch.export.export(model, example_inputs) first"
        )
    program, reports = exported_program, {}
    ours = None  # the working copy of the rewrites before; it may be changed in place
    for rewrite in default_rewrites() if rewrites is None else rewrites:
        prepared = rewrite.prepare(program)
        program = ours = prepared if prepared is ours else _copy(prepared)
        # Nodes that the signature of a preserved module names must stay.
        signatures = [entry.signature for entry in program.module_call_graph if entry.signature is not None]
        kept = {argument.name for signature in signatures for argument in (*signature.inputs, *signature.outputs)}
        constants, weights = constant_tensors(program), Weights(program)
        run = Run(program.graph_module, program.range_constraints, kept, {program.graph_module: constants}, weights)
        reports[rewrite.name] = _run(rewrite, run)
        weights.finish()
        _name_outputs(program)
        program.validate()
    return program, reports


def rewrite_graph(
    graph_module: GraphModule,
    rewrite: Rewrite,
    *,
    ranges: Ranges | None = None,
    kept: Collection[str] = (),
    constants: Mapping[str, Constant] | None = None,
) -> Any:
    """Runs one rewrite in place over a graph and the control flow branches in it.

    Args:
        graph_module: a graph whose nodes carry fake tensors.
        rewrite: the rewrite.
        ranges: the program's range constraints. Without them, a dynamic size starts at 2 even where 1 is allowed.
        kept: names of nodes that stay even if nothing uses them any more.
        constants: tensors by the name of the placeholder that always holds them.

    Returns:
        The rewrite's report.
    """
    return _run(rewrite, Run(graph_module, ranges, kept, {graph_module: dict(constants or {})}))


def _run(rewrite: Rewrite, run: Run) -> Any:
    log, graph_module = logging.getLogger(f"flashpte.rewrite.{rewrite.name}"), run.graph_module
    start = time.perf_counter()
    _log_graph(log, "before", rewrite, graph_module)
    with rewrite.around(run):
        outcomes = _outcomes(rewrite, run)
    report = rewrite.report(outcomes)
    _log_graph(log, "after", rewrite, graph_module)
    applied = sum(outcome.applied for outcome in outcomes)
    log.info(
        "%s: %d of %d matches rewritten in %.3f s", rewrite.name, applied, len(outcomes), time.perf_counter() - start
    )
    return report


def _name_outputs(program: ExportedProgram) -> None:
    """Updates the signature, which refers to nodes by name, to the nodes that the program now returns."""
    returned = program.graph.output_node().args[0]
    assert isinstance(returned, (list, tuple))
    for spec, node in zip(program.graph_signature.output_specs, returned, strict=True):
        if isinstance(node, Node) and hasattr(spec.arg, "name"):
            spec.arg.name = node.name


def _outcomes(rewrite: Rewrite, run: Run) -> list[Outcome]:
    scopes = [Scope(module, run) for module in run.graph_module.modules() if isinstance(module, GraphModule)]
    matches = [
        (scope, match)
        for scope in scopes
        for node in scope.graph.nodes
        if node.op == "call_function" and (match := rewrite.match(node, scope)) is not None
    ]
    outcomes = []
    for scope, match in matches:
        decision = rewrite.decide(match, scope)
        outcome = outcome_of(rewrite.node_of(match), decision)
        if not isinstance(decision, Refusal):
            outcome = dataclasses.replace(outcome, result=rewrite.apply(match, decision, scope))
            scope.changed = True
        outcomes.append(outcome)
    for scope in scopes:
        if scope.changed:
            eliminate_dead_code(scope.graph, run.kept, scope.dropped)
            scope.graph.lint()
            scope.module.recompile()
    return outcomes


def _log_graph(log: logging.Logger, when: str, rewrite: Rewrite, graph_module: GraphModule) -> None:
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s %s:\n%s", when, rewrite.name, graph_module.print_readable(print_output=False))


def replace_linear(exported_program: ExportedProgram, *, fuse: bool = True) -> tuple[ExportedProgram, Report]:
    """Swaps every product with a 4-bit or 8-bit weight for a kernel that reads the codes.

    Shorthand for :func:`rewrite_program` with the linear rewrite and the one that fuses its products.

    Args:
        exported_program: the same as for :func:`rewrite_program`. Weights may be torchao's tensor subclasses, or
            computed in the graph by any affine arithmetic on integers.
        fuse: whether products that share their input, such as those of q, k and v, become one.

    Returns:
        The rewritten program, which holds the packed weights, and a report with one entry for every product with a
        weight: its format, or the reason it was left alone. Entries for products that share their input follow. The
        rewritten program also runs on a CPU.

    Raises:
        TypeError: the argument is not an exported program.
        ValueError: the graph carries no tensor metadata.
    """
    rewrites = (LinearRewrite(), FuseLinears()) if fuse else (LinearRewrite(),)
    program, reports = rewrite_program(exported_program, rewrites)
    return program, Report(tuple(outcome for report in reports.values() for outcome in report.outcomes))


def replace_sdpa(exported_program: ExportedProgram) -> tuple[ExportedProgram, RoutingReport]:
    """Swaps every attention call of a program for the kernel that fits its shape.

    Shorthand for :func:`rewrite_program` with only the attention rewrite.

    Args:
        exported_program: the same as for :func:`rewrite_program`.

    Returns:
        The rewritten program, and a report with one entry for every attention, in any form. An entry names the chosen
        operator and the reason, or says why the attention was left alone. The rewritten program also runs on a CPU,
        where the operators run their reference implementations.

    Raises:
        TypeError: the argument is not an exported program.
        ValueError: the graph carries no tensor metadata.
    """
    rewrite = AttentionRewrite()
    program, reports = rewrite_program(exported_program, (rewrite,))
    return program, reports[rewrite.name]


class ReplaceSdpaPass(PassBase):
    """The attention rewrite as a pass over a graph module.

    Pass it to ``to_edge_transform_and_lower(..., transform_passes=[ReplaceSdpaPass()])``. The partitioner must keep
    ``scaled_dot_product_attention`` whole, as ExecuTorch's ``CudaPartitioner`` does. After a run, :attr:`report` says
    what happened to each attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.report = RoutingReport(())

    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrites ``graph_module`` in place."""
        self.report = rewrite_graph(graph_module, AttentionRewrite())
        return PassResult(graph_module, bool(self.report.replaced))


def _copy(program: ExportedProgram) -> ExportedProgram:
    """A program with its own graph and signature; parameters, buffers and constants are the same tensors."""
    graph_module = copy.deepcopy(program.graph_module)
    keep_names(program.graph, graph_module.graph)
    return ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict=dict(program.state_dict),
        range_constraints=dict(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=dict(program.constants),
        verifiers=program.verifiers,
    )
