"""Cells and rows of a plan, counted before the run."""

from __future__ import annotations

import numpy as np
import pytest

import mechdsl.planner.cost
from mechdsl.planner.cost import Cost, PanelCount, RowSharer, combine_columns
from mechdsl.planner.passes import (
    PASS_NAMES,
    RESTART_PASSES,
    PlanCost,
    check_pass_names,
    make_plan,
    plan_cost,
)
from mechdsl.planner.plan import ExperimentPlan
from mechdsl.show.plan import count_unpatched_rows

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
def test_each_cell_has_a_row_per_prompt(rule: str, cells: int) -> None:
    plan = planned(FROM, rule, DELTA)
    assert plan.n_cells == cells
    assert plan.count() == cells * 64
    assert count_unpatched_rows(plan) == 2 * 64


def test_prompts_without_the_position_have_no_row() -> None:
    plan = planned(FROM, "patch resid_post layer 0 at each item token", DELTA)
    fewer = plan.experiment.table.runs["fewer"].rows
    assert plan.count() == sum(int(row.values["count"]) for row in fewer)


def test_tokens_under_one_label_are_separate_rows() -> None:
    """A second rule in the same row makes no difference."""
    sweep = "ablate z layer 0 head 1 at each token between first token and last token with zero"
    for rules in ([sweep], [sweep, "ablate z layer 0 head 0 at last token with zero"]):
        plan = planned(*rules, DELTA)
        assert [cell.label for cell in plan.rules[0].positions] == [
            "between first", "between middle", "between last"
        ]  # fmt: skip
        base = plan.experiment.table.runs["clean"].rows
        between = sum(row.special.count(False) for row in base)
        assert plan.count() == between


def test_experiment_without_a_rule_has_no_patched_rows() -> None:
    plan = planned("measure correct as raw")
    assert plan.count() == 0
    assert count_unpatched_rows(plan) == 64


def test_all_experiments_are_planned_once() -> None:
    names = ["a", "b", "c"]
    text = HEAD + "".join(experiment("measure correct as raw", name=name) for name in names)
    plan = make_plan(resolved(text))
    found = [e.experiment.name for panel in plan.panels for e in panel.experiments]
    assert sorted(found) == names


@pytest.mark.parametrize("name", PASS_NAMES)
def test_pass_is_disabled_by_its_name(name: str) -> None:
    experiments = resolved(HEAD + experiment(FROM, "patch layer 0 head * at last token", DELTA))
    plan = make_plan(experiments, without=frozenset({name}))
    assert [other for other in PASS_NAMES if not plan.does(other)] == [name]
    assert plan.restarts
    assert [n for n in RESTART_PASSES if not getattr(plan.shortcuts, n)] == (
        [name] if name in RESTART_PASSES else []
    )
    assert not check_pass_names([name])


def test_plan_without_restart_passes_has_no_restarts() -> None:
    experiments = resolved(HEAD + experiment(FROM, "patch layer 0 head * at last token", DELTA))
    assert not make_plan(experiments, without=frozenset(RESTART_PASSES)).restarts
    for name in RESTART_PASSES:
        assert make_plan(experiments, without=frozenset(RESTART_PASSES) - {name}).restarts


HEADS = "patch z layer 0..2 head * at last-item token"


def cost_of(
    *lines: str, pass_tokens: int = 1 << 20, without: frozenset[str] = frozenset()
) -> tuple[ExperimentPlan, PlanCost]:
    plan = make_plan(resolved(HEAD + experiment(FROM, *lines)), without=without)
    (found,) = [each for panel in plan.panels for each in panel.experiments]
    return found, plan_cost(plan, pass_tokens)


@pytest.mark.parametrize(("measure", "inert"), [("logit(answer)", True), ("loss", False)])
def test_write_after_the_last_attention_is_inert_unless_its_token_is_read(
    measure: str, inert: bool
) -> None:
    rule = "ablate resid_post layer 3 at first token with zero"
    assert planned(rule, f"measure {measure} as delta").inert.tolist() == [inert]


def test_forward_passes_are_counted_by_tokens_from_the_first_write() -> None:
    found, cost = cost_of(HEADS, DELTA, pass_tokens=100)
    (hits,) = found.rules[0].positions
    base = found.experiment.table.runs["fewer"].rows
    tokens = sum(len(row.ids) - hits.hits[n][0][0] for n, row in enumerate(base)) * found.n_cells
    assert cost.planned.rows == found.count()
    assert cost.planned.forwards == 2 + -(-tokens // 100)


@pytest.mark.parametrize(("measure", "narrow"), [("logit(answer)", True), ("prob(answer)", False)])
def test_unembed_pass_computes_only_needed_logits_without_softmax(
    measure: str, narrow: bool
) -> None:
    found, cost = cost_of(HEADS, f"measure {measure} as delta")
    names = [one.name for one in cost.savings]
    at = names.index("unembed")
    before, after = (cost.savings[n].after.multiply_adds for n in (at - 1, at))
    shape = found.experiment.model.shape
    logits = shape.d_model * (shape.vocab_size - 2)
    assert before - after == (found.count() * logits if narrow else 0)


def test_resume_pass_counts_whole_prompts_from_the_first_written_layer() -> None:
    """Rows of all layers are counted together."""
    without = frozenset({"prefix", "inside", "last"})
    found, cost = cost_of(HEADS, DELTA, without=without)
    _, nothing = cost_of(HEADS, DELTA, without=without | {"resume"})
    lengths = sum(len(row.ids) for row in found.experiment.table.runs["fewer"].rows)
    assert nothing.planned.tokens - cost.planned.tokens == 4 * lengths * (0 + 1 + 2)


def test_path_rule_with_frozen_sublayers_computes_only_the_sender() -> None:
    found, cost = cost_of("path z layer 0..2 head * -> logits at last token", DELTA)
    shape = found.experiment.model.shape
    (panel,) = make_plan(resolved(HEAD + experiment(FROM, HEADS, DELTA))).panels
    unpatched = PanelCount(panel, 1, 4096).unpatched(stopped=False)
    each = shape.blocks[0].heads * shape.blocks[0].d_head * shape.d_model + 2 * shape.d_model
    assert cost.planned.multiply_adds - unpatched.multiply_adds == found.count() * each


def test_file_without_experiments_has_no_cost() -> None:
    found = plan_cost(make_plan([]))
    assert (found.plain, found.planned, found.blocks) == (Cost(), Cost(), 0)
    assert Cost(multiply_adds=3.0).flops == 6


def test_rows_whose_write_has_no_effect_are_inert() -> None:
    rule = "reweight attention layer 0 head * from last token to first token by c"
    found, cost = cost_of(f"for c in [1, 2] {{ {rule} }}", DELTA)
    (inert,) = [one.after.rows for one in cost.savings if one.name == "inert"]
    assert inert == found.count() / 2


ZEROED = "ablate z layer * head * at last token with zero"


def distinct(*rules: str, share: bool = True) -> tuple[int, int]:
    """Return the number of rows and of distinct rows, with one experiment per rule."""
    bodies = enumerate(rules)
    text = HEAD + "".join(experiment(rule, DELTA, name=f"e{n}") for n, rule in bodies)
    (panel,) = make_plan(resolved(text)).panels
    prompts = np.arange(len(panel.table), dtype=np.int64)
    rows = [each.rows(prompts) for each in panel.experiments]
    return sum(map(len, rows)), len(RowSharer(panel.experiments, share=share).of(rows))


def test_equal_rows_are_shared_only_if_sharing_is_on() -> None:
    twice = (ZEROED,) * 2
    assert distinct(*twice) == (2 * 16 * 64, 16 * 64)
    assert distinct(*twice, share=False) == (2 * 16 * 64, 2 * 16 * 64)


@pytest.mark.parametrize(
    "rules",
    [
        [
            f"ablate z layer 0 head 0 at {at} with zero"
            for at in ("token 0..5", "tokens 1..2", "{token 1, token 3}", "tokens 1..3")
        ],
        [
            f"block attention layer 0 from last token to {at}"
            for at in ("token 0..5", "tokens 1..2")
        ],
        [ZEROED, f"{ZEROED}\n  block attention layer 0 from last token to first token"],
    ],
    ids=["tokens", "keys", "rules"],
)  # fmt: skip
def test_rows_with_different_writes_are_not_shared(rules: list[str]) -> None:
    every, once = distinct(*rules)
    assert once == every


def test_combined_columns_distinguish_many_combinations() -> None:
    """The columns have more combinations than there are 64-bit numbers."""
    columns = np.random.default_rng(0).integers(0, 2, (200, 24)) * np.arange(200)[:, None]
    _, expected = np.unique(columns, axis=0, return_inverse=True)
    found = combine_columns([list(columns.T)], [len(columns)])
    np.testing.assert_array_equal(np.unique(found, return_inverse=True)[1], expected.reshape(-1))


def test_cost_does_not_depend_on_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are counted in batches; cells and unpatched runs are counted once."""
    lines = (FROM, "patch layer * head * at first-item token, last token", DELTA)
    plan = make_plan(resolved(HEAD + experiment(*lines)))
    whole = plan_cost(plan)
    monkeypatch.setattr(mechdsl.planner.cost, "BATCH_ROWS", 1)
    parts = plan_cost(plan)
    assert parts.plain == whole.plain
    for one, other in zip(parts.savings, whole.savings, strict=True):
        assert (one.name, one.on) == (other.name, other.on)
        if one.name != "join":  # forward passes then have no rows of other prompts
            assert one.after == other.after, one.name
    assert parts.planned.forwards > whole.planned.forwards
