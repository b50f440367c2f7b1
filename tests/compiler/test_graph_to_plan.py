"""The plan is built from the graph: it contains what the graph needs, and no more.

What a changed graph computes is in tests/execute/test_changed_graphs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mechdsl.checks.file_check import check_source
from mechdsl.planner.graph import (
    EffectNode,
    ExpectNode,
    ForwardNode,
    Node,
    ReportNode,
    check_graph,
    graph_experiments,
    graph_from_leaves,
    graph_leaves,
    map_nodes,
)
from mechdsl.planner.passes import build_file_graph, make_plan, plan_graph
from mechdsl.planner.plan import ExperimentPlan, Plan
from mechdsl.resolve.expansion import expand_controls
from mechdsl.resolve.types import ResolvedExperiment
from mechdsl.syntax.frontend import read_source

from .support import DELTA, FROM, HEAD, experiment, resolved

ROOT = Path(__file__).parents[2]
EXAMPLES = ("counting", "countscope", "induction", "mediators", "system2")
LINES = {
    "patch": (FROM, "patch layer * head * at last token", DELTA),
    "another layer": (FROM, "patch resid_post layer * at last token into layer 3", DELTA),
    "onto": (FROM, "patch resid_post layer 1 at first-item token onto last token", DELTA),
    "two runs": (
        FROM,
        "patch L0H0 at last token",
        "patch L1H1 at last token with other_fruit",
        DELTA,
    ),
    "replace": (
        "ablate z layer * head 0 at last token with zero",
        'replace last-item token with "fig"',
        DELTA,
    ),
    "mean": ("ablate layer * head * at last token with mean of fewer", DELTA),
    "resample": ("ablate mlp_out layer * at last token with resample of other_fruit", DELTA),
    "set": ("for x in [1, 2] { set mlp_out layer 1 at last token to x }", DELTA),
    "path": (FROM, "path z layer 0 head * -> q layer 2 head * at last token", DELTA),
    "edges": ("block attention layer * head * from last token to each item token", DELTA),
    "observe": (
        "observe attention layer * head * from last token to first-item token",
        "ablate L0H1 at last token with zero",
    ),
    "control": (FROM, "patch layer 1 head 0 at last token", DELTA, "against random(3)"),
    "kept": (FROM, "patch z layer 1 head 0 at last token", "keep correct", DELTA),
    "accuracy": (FROM, "patch L1H0 at last token", DELTA, "expect accuracy(other_fruit) > 0%"),
    "no rule": ("measure correct as raw", "measure kl(fewer) as raw"),
}


def same(experiments: Sequence[ResolvedExperiment]) -> None:
    """Assert that a graph's experiments equal those it was built from."""
    given = expand_controls(experiments)
    found = graph_experiments(build_file_graph(experiments))
    for one, own in zip(found, given, strict=True):
        assert one.experiment == own
        assert [r.spec for r in one.experiment.rules] == [r.spec for r in own.rules]
        assert one.experiment.rules == own.rules


@pytest.mark.parametrize("name", list(LINES))
def test_experiment_is_recovered_from_its_graph(name: str) -> None:
    same(resolved(HEAD + experiment(*LINES[name])))


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_recovered_from_their_graphs(name: str) -> None:
    source, _ = read_source(ROOT / "examples" / f"{name}.mech")
    assert source is not None
    same(check_source(source).experiments)


# --- edited graphs ---

SECOND = "ablate z layer 1 head * at last token with mean of other_fruit"


def planned(plan: Plan) -> list[ExperimentPlan]:
    return [each for panel in plan.panels for each in panel.experiments]


def drop(node: Node) -> Node:
    """A forward pass without its last write."""
    return replace(node, writes=node.writes[:-1]) if isinstance(node, ForwardNode) else node


def test_plan_has_no_rows_for_a_removed_write() -> None:
    one = (FROM, "patch resid_post layer * at last token")
    made = build_file_graph(resolved(HEAD + experiment(*one, SECOND, DELTA)))
    plan = plan_graph(map_nodes(made, drop))
    expected = make_plan(resolved(HEAD + experiment(*one, DELTA)))
    (found,), (alone,), (both,) = planned(plan), planned(expected), planned(plan_graph(made))
    assert (found.n_cells, found.count(), found.runs) == (4, 4 * 64, ("fewer", "clean"))
    assert (both.n_cells, both.runs) == (16, ("fewer", "clean", "other_fruit"))
    assert found.experiment.rules == alone.experiment.rules
    assert found.experiment.axes == alone.experiment.axes
    assert [panel.runs for panel in plan.panels] == [panel.runs for panel in expected.panels]


def test_plan_drops_the_measure_of_a_removed_effect() -> None:
    """A run that only this effect compares with is dropped, too."""
    lines = (FROM, "patch layer 0 head * at last token", DELTA, "measure kl(other_fruit) as raw")
    made = build_file_graph(resolved(HEAD + experiment(*lines)))

    def first(node: Node) -> Node:
        held = isinstance(node, (ReportNode, ExpectNode))
        return replace(node, effects=node.effects[:1]) if held else node

    (before,), (found,) = planned(plan_graph(made)), planned(plan_graph(map_nodes(made, first)))
    assert (len(before.experiment.measures), before.runs[2:]) == (2, ("other_fruit",))
    assert (len(found.experiment.measures), found.runs[2:]) == (1, ())
    assert len(found.experiment.spec.measures) == 1


def test_plan_keeps_an_effect_that_an_expectation_needs() -> None:
    lines = (FROM, "patch L0H0 at last token", DELTA, "measure kl(other_fruit) as raw")
    made = build_file_graph(resolved(HEAD + experiment(*lines, "expect accuracy(clean) > 0%")))

    def first(node: Node) -> Node:
        return replace(node, effects=node.effects[:1]) if isinstance(node, ReportNode) else node

    (found,) = planned(plan_graph(map_nodes(made, first)))
    assert [measure.label for measure in found.experiment.measures] == [
        measure.label for measure in planned(plan_graph(made))[0].experiment.measures
    ]


def test_check_graph_rejects_an_experiment_measured_in_several_passes() -> None:
    """Only a bug in mechdsl could build such a graph."""
    lines = (FROM, "patch L0H0 at last token", DELTA, "measure loss as raw")
    made = build_file_graph(resolved(HEAD + experiment(*lines)))
    (leaf,) = graph_leaves(made)
    other = leaf.effects[0].base.forward
    broken = replace(leaf.effects[0], patched=replace(leaf.effects[0].patched, forward=other))
    with pytest.raises(AssertionError, match="several passes"):
        check_graph(graph_from_leaves([replace(leaf, effects=(broken, leaf.effects[1]))]))


def test_plan_drops_a_source_run_that_nothing_measures() -> None:
    rule = "patch L0H0 at last token with other_fruit"
    made = build_file_graph(resolved(HEAD + experiment(FROM, rule, DELTA)))

    def alone(node: Node) -> Node:
        return replace(node, source=None) if isinstance(node, EffectNode) else node

    (panel,) = plan_graph(map_nodes(made, alone)).panels
    assert list(panel.runs) == ["fewer", "other_fruit"]
    assert panel.experiments[0].experiment.spec.source is None


def test_unmeasured_run_stops_at_the_layer_in_the_graph() -> None:
    made = build_file_graph(
        resolved(HEAD + experiment("patch L2H0 at last token with fewer", DELTA))
    )
    (panel,) = plan_graph(made).panels
    needs = panel.runs["fewer"]
    assert (needs.reads, needs.stop, needs.measured) == (frozenset({("z", 2)}), 3, False)
    assert panel.runs["clean"].measured

    def lower(node: Node) -> Node:
        return (
            replace(node, stop=1) if isinstance(node, ForwardNode) and node.run == "fewer" else node
        )

    (panel,) = plan_graph(map_nodes(made, lower)).panels
    assert panel.runs["fewer"].stop == 1


def test_plan_contains_only_experiments_of_the_graph_leaves() -> None:
    lines = (FROM, "patch L0H0 at last token", DELTA)
    text = HEAD + experiment(*lines, name="a", limit=32) + experiment(*lines, name="b")
    made = build_file_graph(resolved(text))
    kept = graph_from_leaves([leaf for leaf in graph_leaves(made) if leaf.experiment == "b"])
    (found,) = planned(plan_graph(kept))
    assert found.experiment.name == "b"
    assert plan_graph(graph_from_leaves([])).panels == ()
