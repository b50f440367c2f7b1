"""Graph passes: each gives an equal graph with less work, and says whether it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from mechdsl.graph.nodes import (
    Forward,
    Graph,
    Measure,
    Node,
    Read,
    graph_of,
    highest_read,
    lint,
    rebuild,
)

Pass = Callable[[Graph, Mapping[str, int]], tuple[Graph, bool]]
"""(graph, number of layers by model) -> (graph, whether it changed)."""


@dataclass(frozen=True)
class PassOutcome:
    """What one pass did, for `plan`."""

    name: str
    changed: bool
    before: int
    after: int


def stop_early(graph: Graph, layers: Mapping[str, int]) -> tuple[Graph, bool]:
    """A pass that is only read, never measured, stops above its highest read."""
    change: dict[Node, Node] = {}
    for node in graph:
        if not isinstance(node, Forward) or node.stop is not None:
            continue
        users = list(graph.successors(node))
        if not users or any(isinstance(user, Measure) for user in users):
            continue
        needed = [
            highest_read(user, layers[node.model]) for user in users if isinstance(user, Read)
        ]
        if needed and None not in needed:
            highest = max(n for n in needed if n is not None)
            if highest <= layers[node.model]:
                change[node] = replace(node, stop=highest)
    if not change:
        return graph, False
    leaves = [node for node in graph if graph.out_degree(node) == 0]
    return graph_of([rebuild(leaf, change) for leaf in leaves]), True


PASSES: Mapping[str, Pass] = {"stop_early": stop_early}
PASS_MEANINGS: Mapping[str, str] = {
    "stop_early": "an unpatched run that is only read stops above the highest read",
}


def run_passes(
    graph: Graph, layers: Mapping[str, int], *, without: frozenset[str] = frozenset()
) -> tuple[Graph, list[PassOutcome]]:
    """All graph passes in order, except those switched off."""
    outcomes: list[PassOutcome] = []
    for name, one in PASSES.items():
        if name in without:
            continue
        before = graph.number_of_nodes()
        graph, changed = one(graph, layers)
        lint(graph)
        outcomes.append(PassOutcome(name, changed, before, graph.number_of_nodes()))
    return graph, outcomes
