"""The intervention graph: nodes, planner passes, and drawings."""

from __future__ import annotations

import re
from pathlib import Path

import networkx as nx
import pytest

from mechdsl.planner.graph import (
    EncodeNode,
    ForwardNode,
    Graph,
    MeasureNode,
    ReadNode,
    WriteNode,
    check_graph,
)
from mechdsl.planner.passes import GRAPH_PASSES, PASS_NAMES, make_plan, rewrite_graph
from mechdsl.show.graph import to_dot, to_mermaid, to_svg, to_text

from .support import DELTA, FROM, HEAD, experiment, resolved

HERE = Path(__file__).parent
PASS_FIXTURES = sorted((HERE / "passes").glob("*.txt"))
REWRITES = {one.name: one.apply for one in GRAPH_PASSES}
RULE = (FROM, "patch layer 0 head * at last token", DELTA)


def graph(text: str) -> Graph:
    """The graph before any pass."""
    return make_plan(resolved(text), without=frozenset(PASS_NAMES)).graph


def kinds(made: Graph, kind: type) -> int:
    return sum(isinstance(node, kind) for node in made)


def test_patch_graph_has_the_expected_nodes() -> None:
    made = graph(HEAD + experiment(*RULE))
    check_graph(made)
    assert nx.is_directed_acyclic_graph(made)
    assert (kinds(made, EncodeNode), kinds(made, ForwardNode)) == (2, 3)
    assert (kinds(made, ReadNode), kinds(made, WriteNode), kinds(made, MeasureNode)) == (1, 1, 3)


def test_equal_experiments_share_graph_nodes() -> None:
    text = HEAD + experiment(*RULE, name="a") + experiment(*RULE, name="b")
    twice, once = graph(text), graph(HEAD + experiment(*RULE, name="a"))
    assert kinds(twice, ForwardNode) == kinds(once, ForwardNode)
    assert twice.number_of_nodes() == once.number_of_nodes() + 1  # the second report


def test_experiments_with_different_rows_share_no_forward_nodes() -> None:
    text = HEAD + experiment(*RULE, name="a") + experiment(*RULE, name="b", limit=32)
    assert kinds(graph(text), ForwardNode) == 2 * kinds(
        graph(HEAD + experiment(*RULE)), ForwardNode
    )


@pytest.mark.parametrize("path", PASS_FIXTURES, ids=lambda path: path.stem)
def test_graph_pass_equals_its_fixture(path: Path, update: bool) -> None:
    """A fixture has a title, lines of an experiment, and the graph before and after the pass."""
    title, lines, before, after = path.read_text(encoding="utf-8").split("\n---\n")
    assert title.startswith("# ")
    name = path.stem.partition("-")[0]
    made = graph(HEAD + experiment(*lines.splitlines()))
    changed = REWRITES[name](made)
    check_graph(changed)
    did = changed is not made
    assert did == (to_text(changed) != to_text(made))
    assert REWRITES[name](changed) is changed
    shown = [to_text(made).rstrip(), to_text(changed).rstrip() if did else "no changes"]
    if update:
        path.write_text("\n---\n".join([title, lines, *shown]) + "\n", encoding="utf-8")
        return
    assert shown == [before, after.rstrip()]


def test_every_pass_has_a_fixture() -> None:
    assert {path.stem.partition("-")[0] for path in PASS_FIXTURES} == set(REWRITES)


def test_planner_passes_can_be_disabled() -> None:
    made = graph(HEAD + experiment("patch L0H0 at last token with fewer", DELTA))
    assert rewrite_graph(made, without=frozenset(PASS_NAMES)) == (made, ())
    changed, (did,) = rewrite_graph(made)
    assert did.changed
    assert to_text(changed) != to_text(made)


# --- drawing ---


def test_every_node_and_edge_is_drawn() -> None:
    made = graph(HEAD + experiment(*RULE))
    nodes, edges = made.number_of_nodes(), made.number_of_edges()
    dot, mermaid, svg = to_dot(made), to_mermaid(made), to_svg(made)
    assert (dot.count("[label="), dot.count(" -> ")) == (nodes, edges)
    assert (len(re.findall(r'n\d+\["', mermaid)), mermaid.count(" --> ")) == (nodes, edges)
    assert (svg.count("<g>"), svg.count('marker-end="url(#arrow)"')) == (nodes, edges)


def test_quotes_and_brackets_are_escaped() -> None:
    made = graph(HEAD + experiment('replace last-item token with "fig"', DELTA))
    assert '\\"fig\\"' in to_dot(made)
    assert "#quot;fig#quot;" in to_mermaid(made)
    assert "&quot;fig&quot;" in to_svg(made)


def test_drawings_do_not_depend_on_the_order_of_experiments() -> None:
    a, b = experiment(*RULE, name="a"), experiment(*RULE[:2], "measure loss as delta", name="b")
    assert to_text(graph(HEAD + a + b)) == to_text(graph(HEAD + b + a))


def test_different_sites_are_separate_nodes() -> None:
    lines = [(FROM, f"patch {site} at last token", DELTA) for site in ("L0H1", "L0H2", "L0H1.q")]
    text = HEAD + "".join(experiment(*each, name=f"e{n}") for n, each in enumerate(lines))
    assert kinds(graph(text), WriteNode) == 3
