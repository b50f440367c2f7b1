"""From experiments to a plan: their graph, the passes on it, the plan of it, the passes on that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mechdsl.graph.build import build
from mechdsl.graph.nodes import Graph, graph_of, leaves, lint
from mechdsl.plan.passes import GRAPH_PASSES, NAMES, PLAN_PASSES
from mechdsl.plan.plan import Plan, Rewrite, plan_of
from mechdsl.plan.save_plan import save_nodes
from mechdsl.resolve.random_targets import with_controls
from mechdsl.resolve.resolved import ResolvedExperiment


def graph_of_file(experiments: Sequence[ResolvedExperiment]) -> Graph:
    """The graph of experiments and of what they are set against, before any pass."""
    return build(with_controls(experiments))


def with_saves(graph: Graph, saving: Sequence[ResolvedExperiment]) -> Graph:
    """The same with what goes to files; saving: the experiments with `save` lines. Those are run on
    their own, behind all others: a plan has none."""
    nodes = [node for experiment in saving for node in save_nodes(experiment)]
    return graph_of([*leaves(graph), *nodes]) if nodes else graph


def make_plan(
    experiments: Sequence[ResolvedExperiment], *, without: frozenset[str] = frozenset()
) -> Plan:
    """The plan of a file; `without` names passes that are switched off."""
    return plan_graph(graph_of_file(experiments), without=without)


def plan_graph(graph: Graph, *, without: frozenset[str] = frozenset()) -> Plan:
    """The plan of what a graph asks for."""
    graph, rewrites = rewrite(graph, without=without)
    plan = plan_of(graph)
    for one in PLAN_PASSES:
        if one.name not in without:
            plan = one.apply(plan)
    passes = tuple(name for name in NAMES if name not in without)
    return replace(plan, passes=passes, rewrites=rewrites)


def rewrite(
    graph: Graph, *, without: frozenset[str] = frozenset()
) -> tuple[Graph, tuple[Rewrite, ...]]:
    """The graph after all graph passes but those switched off, and what each did."""
    rewrites: list[Rewrite] = []
    for one in GRAPH_PASSES:
        if one.name in without:
            continue
        before, graph = graph, one.apply(graph)
        lint(graph)
        counts = before.number_of_nodes(), graph.number_of_nodes()
        rewrites.append(Rewrite(one.name, graph is not before, *counts))
    return graph, tuple(rewrites)
