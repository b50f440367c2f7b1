"""Estimated seconds: the terms that each file's work adds."""

from __future__ import annotations

from pathlib import Path

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.planner.passes import make_plan, plan_cost
from mechdsl.show.plan import REFERENCE_PACE, TimeEstimate, count_work, estimate_time

HEAD = """mech 1

model toy = zoo("induction")

prompts repeats {
  word in words(toy)
  half = list(word, 4, sep: " ", distinct: true)
  template "{half} {again = half} {cue = half[1]}"
  answer " {half[2]}"
}
"""


def seconds(*lines: str, rows: int = 50) -> TimeEstimate:
    body = "\n".join(f"  {line}" for line in lines)
    text = f"{HEAD}\nexperiment e {{\n  model toy\n  prompts repeats limit {rows}\n{body}\n}}\n"
    plan = make_plan(check_source(Source(text, Path("seconds.mech"))).experiments)
    cost = plan_cost(plan)
    work = count_work(plan, cost.planned, cost.blocks)
    return estimate_time(work, cost.planned.multiply_adds, 2e10, REFERENCE_PACE)


def test_estimate_of_statistics_grows_with_cells_and_rows() -> None:
    test = "stats test bootstrap"
    few = seconds("for c in 1..4 { scale resid_post layer 1 at last token by c }", DELTA, test)
    cells = seconds("for c in 1..40 { scale resid_post layer 1 at last token by c }", DELTA, test)
    rows = seconds(
        "for c in 1..4 { scale resid_post layer 1 at last token by c }", DELTA, test, rows=500
    )
    formula = seconds("for c in 1..40 { scale resid_post layer 1 at last token by c }", DELTA)
    assert formula.statistics < 0.5 * cells.statistics
    assert cells.statistics > 1.5 * few.statistics
    assert rows.statistics > 8 * few.statistics
    assert rows.prompts > 8 * few.prompts


def test_estimate_of_a_probe_counts_its_fits() -> None:
    norm = seconds("observe norm resid_post layer * at last token")
    rank = seconds("observe effective_rank resid_post layer * at last token")
    assert rank.passes > norm.passes + 0.05


def test_estimate_of_replies_grows_with_their_tokens() -> None:
    short, long = (
        seconds(
            f"generate {tokens}",
            "scale resid_post layer 1 at tokens * by 0.9",
            'measure contains("apple") as raw',
        )
        for tokens in (4, 40)
    )
    assert long.passes > 5 * short.passes


def test_loading_is_part_of_the_total() -> None:
    found = seconds("ablate layer 0 head 0 at last token with zero", RAW)
    assert found.total > found.loading > 1


DELTA = "measure logit(answer) as delta"
RAW = "measure logit(answer) as raw"
