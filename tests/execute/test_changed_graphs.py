"""The executor runs the graph: a changed graph equals the file with that change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mechdsl.execute.run.panel import Execution, execute
from mechdsl.planner.graph import ForwardNode, Graph, Node, ReadNode, map_nodes
from mechdsl.planner.passes import build_file_graph, plan_graph
from mechdsl.resolve.types import ResolvedRule
from mechdsl.results.assembly.collection import check_denominators

from .support import DIFFERENCE, EVERY_PASS, adopted, check_file, experiment

FAMILY = "llama"
FROM = ("prompts p", "from other into clean")
FIRST = "patch resid_pre layer * at cue token"
PASSES = pytest.mark.parametrize("without", [frozenset[str](), EVERY_PASS], ids=["all", "none"])


def graph(folder: Path, *lines: str) -> Graph:
    """The graph of one experiment."""
    text = experiment("e", *FROM, *lines, DIFFERENCE)
    return build_file_graph(check_file(text, folder, adopted(FAMILY)).experiments)


def run(made: Graph, without: frozenset[str]) -> Execution:
    """Run a graph."""
    plan = plan_graph(made, without=without)
    return execute(plan, {"m": adopted(FAMILY)}, check=check_denominators)


def equal(found: Execution, expected: Execution) -> None:
    """Assert equal values."""
    (values,), (others,) = found.measured["e"].patched, expected.measured["e"].patched
    np.testing.assert_array_equal(values, others)
    assert found.measured["e"].rows == expected.measured["e"].rows
    assert found.profile.distinct == expected.profile.distinct
    assert found.profile.unpatched_passes == expected.profile.unpatched_passes


def reading(made: Graph, change: Callable[[ReadNode], ReadNode]) -> Graph:
    """The graph with its reads changed."""

    def changed(node: Node) -> Node:
        return change(node) if isinstance(node, ReadNode) else node

    return map_nodes(made, changed)


@PASSES
@pytest.mark.parametrize(
    "second",
    [
        "ablate z layer 1 head 0..1 at last token with zero",
        "ablate mlp_out layer 1 at last token with mean",
        "patch L1H0 at last token with longer",
        "block attention layer 1 heads * from last token to cue token",
    ],
)
def test_graph_without_a_write_equals_the_file_without_the_rule(
    folder: Path, second: str, without: frozenset[str]
) -> None:
    both = graph(folder, FIRST, second)

    def drop(node: Node) -> Node:
        if not isinstance(node, ForwardNode) or len(node.writes) < 2:
            return node
        first = next(w for w in node.writes if isinstance(w.by, ResolvedRule))
        return replace(node, writes=(first,))

    expected = run(graph(folder, FIRST), without)
    equal(run(map_nodes(both, drop), without), expected)
    values = run(both, without).measured["e"].patched[0]
    assert not np.array_equal(values, expected.measured["e"].patched[0]), "it does something"


@PASSES
def test_graph_with_reversed_writes_equals_the_file_with_reversed_rules(
    folder: Path, without: frozenset[str]
) -> None:
    """The later write applies if both write to the same position."""
    rules = (
        "patch resid_post layer 1 at subject token",
        "ablate resid_post layer 1 at subject token with zero",
    )
    made, other = graph(folder, *rules), graph(folder, *rules[::-1])

    def turned(node: Node) -> Node:
        return replace(node, writes=node.writes[::-1]) if isinstance(node, ForwardNode) else node

    equal(run(map_nodes(made, turned), without), run(other, without))
    (first,), (second,) = (run(each, without).measured["e"].patched for each in (made, other))
    assert not np.array_equal(first, second)


@PASSES
def test_graph_with_a_read_of_another_layer_equals_the_file(
    folder: Path, without: frozenset[str]
) -> None:
    rule = "patch resid_post layer {} at subject token"
    there = next(n for n in graph(folder, rule.format(0)) if isinstance(n, ReadNode))
    moved = reading(graph(folder, rule.format(2)), lambda read: replace(read, points=there.points))
    assert next(n for n in moved if isinstance(n, ReadNode)).places == (("resid_post", 0),)
    into = graph(folder, rule.format(0) + " into layer 2")
    equal(run(moved, without), run(into, without))


@PASSES
def test_graph_with_a_read_of_another_run_equals_the_file(
    folder: Path, without: frozenset[str]
) -> None:
    rule = "patch resid_post layer 1 at subject token"
    with_longer = graph(folder, rule + " with longer")
    there = next(n for n in with_longer if isinstance(n, ReadNode))
    moved = reading(
        graph(folder, rule),
        lambda read: replace(read, forward=there.forward, positions=there.positions),
    )
    equal(run(moved, without), run(with_longer, without))


@PASSES
def test_graph_with_a_read_at_another_position_equals_the_file(
    folder: Path, without: frozenset[str]
) -> None:
    onto = graph(folder, "patch resid_post layer 1 at subject token onto cue token")
    there = next(n for n in onto if isinstance(n, ReadNode))
    here = graph(folder, "patch resid_post layer 1 at cue token")
    moved = reading(here, lambda read: replace(read, positions=there.positions))
    equal(run(moved, without), run(onto, without))
