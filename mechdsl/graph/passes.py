"""Graph passes: each gives an equal graph with less work; the same one where there is none."""

from __future__ import annotations

from dataclasses import replace

from mechdsl.graph.nodes import (
    ForwardNode,
    Graph,
    MeasureNode,
    Node,
    ReadNode,
    highest_read,
    rewritten,
)


def stop_early(graph: Graph) -> Graph:
    """A pass that is only read, never measured, stops above its highest read."""
    stops: dict[Node, int] = {}
    for node in graph:
        if not isinstance(node, ForwardNode) or node.stop is not None:
            continue
        users = list(graph.successors(node))
        if not users or any(isinstance(user, MeasureNode) for user in users):
            continue
        needed = [highest_read(user) for user in users if isinstance(user, ReadNode)]
        if needed and None not in needed:
            highest = max(n for n in needed if n is not None)
            if highest <= node.n_layers:
                stops[node] = highest
    if not stops:
        return graph

    def stopped(node: Node) -> Node:
        stop = stops.get(node) if isinstance(node, ForwardNode) else None
        return node if stop is None else replace(node, stop=stop)

    return rewritten(graph, stopped)
