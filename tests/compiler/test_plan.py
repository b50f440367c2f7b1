"""Cells and rows: what a run will do, counted before it does it."""

from __future__ import annotations

import pytest

import mechdsl.plan.cost
from mechdsl.plan.make_plan import make_plan
from mechdsl.plan.passes import NAMES, RESTARTS, unknown_passes
from mechdsl.plan.plan import ExperimentPlan
from mechdsl.plan.savings import plan_cost
from mechdsl.show.plan import unpatched_rows

from .support import DELTA, FROM, HEAD, experiment, resolved


def planned(*lines: str, limit: int = 64) -> ExperimentPlan:
    plan = make_plan(resolved(HEAD + experiment(*lines, limit=limit)))
    (found,) = [e for panel in plan.panels for e in panel.experiments]
    return found


@pytest.mark.parametrize(
    ("rule", "cells"),
    [
        ("patch layer * head * at last token", 16),
        ("patch layers * head * at last token", 4),
        ("patch resid_post layer * at first-item token, last token", 8),
    ],
)
def test_each_cell_is_a_row_of_every_prompt(rule: str, cells: int) -> None:
    plan = planned(FROM, rule, DELTA)
    assert plan.n_cells == cells
    assert plan.count() == cells * 64
    assert unpatched_rows(plan) == 2 * 64


def test_prompts_without_the_position_have_no_row() -> None:
    plan = planned(FROM, "patch resid_post layer 0 at each item token", DELTA)
    fewer = plan.experiment.table.runs["fewer"].rows
    assert plan.count() == sum(int(row.values["count"]) for row in fewer)


def test_an_experiment_without_a_rule_has_no_patched_rows() -> None:
    plan = planned("measure correct as raw")
    assert plan.count() == 0
    assert unpatched_rows(plan) == 64


def test_all_experiments_are_planned_once() -> None:
    names = ["a", "b", "c"]
    text = HEAD + "".join(experiment("measure correct as raw", name=name) for name in names)
    plan = make_plan(resolved(text))
    found = [e.experiment.name for panel in plan.panels for e in panel.experiments]
    assert sorted(found) == names


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_is_switched_off_by_its_name(name: str) -> None:
    experiments = resolved(HEAD + experiment(FROM, "patch layer 0 head * at last token", DELTA))
    plan = make_plan(experiments, without=frozenset({name}))
    assert [other for other in NAMES if not plan.does(other)] == [name]
    assert plan.restarts
    assert [n for n in RESTARTS if not getattr(plan.shortcuts, n)] == (
        [name] if name in RESTARTS else []
    )
    assert not unknown_passes([name])


def test_rows_that_take_nothing_over_are_whole_passes() -> None:
    experiments = resolved(HEAD + experiment(FROM, "patch layer 0 head * at last token", DELTA))
    assert not make_plan(experiments, without=frozenset(RESTARTS)).restarts
    for name in RESTARTS:
        assert make_plan(experiments, without=frozenset(RESTARTS) - {name}).restarts


def test_work_is_the_same_where_it_is_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are laid out some at a time; cells and unpatched runs are counted once."""
    lines = (FROM, "patch layer * head * at first-item token, last token", DELTA)
    plan = make_plan(resolved(HEAD + experiment(*lines)))
    whole = plan_cost(plan)
    monkeypatch.setattr(mechdsl.plan.cost, "BATCH_ROWS", 1)
    parts = plan_cost(plan)
    assert parts.plain == whole.plain
    for one, other in zip(parts.savings, whole.savings, strict=True):
        assert (one.name, one.on) == (other.name, other.on)
        if one.name != "join":  # a pass takes no rows of other prompts then
            assert one.after == other.after, one.name
    assert parts.planned.forwards > whole.planned.forwards
