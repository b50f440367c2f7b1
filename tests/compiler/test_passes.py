"""The list of planner passes agrees with the planner and the documentation."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mechdsl.planner.passes import PASS_NAMES, PASSES, PLAN_PASSES, PlanPass, make_plan
from mechdsl.planner.plan import Plan

from .support import DELTA, FROM, HEAD, experiment, resolved

DOCS = Path(__file__).parents[2] / "docs" / "planner.md"
HEADING = "| pass | skipped work | why results don't change |\n|---|---|---|\n"


def switches(plan: Plan) -> dict[str, Any]:
    """Return the shortcut settings of a plan."""
    held = ("graph", "panels", "passes", "rewrites")
    return {f.name: getattr(plan, f.name) for f in fields(plan) if f.name not in held}


@cache
def plain() -> Plan:
    """Return a plan without any pass."""
    text = HEAD + experiment(FROM, "patch layer 0 head * at last token", DELTA)
    return make_plan(resolved(text), without=frozenset(PASS_NAMES))


def test_pass_names_are_unique() -> None:
    assert len(set(PASS_NAMES)) == len(PASS_NAMES)


def test_planner_page_lists_every_pass(update: bool) -> None:
    table = HEADING + "".join(f"| `{p.name}` | {p.leaves_out} | {p.why} |\n" for p in PASSES)
    text = DOCS.read_text(encoding="utf-8")
    before, rest = text.split(HEADING)
    after = rest[rest.index("\n\n") + 1 :]
    if update:
        DOCS.write_text(before + table + after, encoding="utf-8")
        return
    assert text == before + table + after


@pytest.mark.parametrize("one", PLAN_PASSES, ids=lambda one: one.name)
def test_each_pass_enables_exactly_one_shortcut(one: PlanPass) -> None:
    before, plan = switches(plain()), one.apply(plain())
    after = switches(plan)
    changed = [name for name in before if before[name] != after[name]]
    assert len(changed) == 1
    assert switches(one.apply(plan)) == after, "once is enough"
    others = [switches(other.apply(plain())) for other in PLAN_PASSES if other is not one]
    assert after not in others


def test_plan_without_passes_enables_no_shortcut() -> None:
    everything = make_plan(resolved(HEAD + experiment("measure correct as raw")))
    assert everything.passes == PASS_NAMES
    found = plain()
    assert found.passes == ()
    assert found.rewrites == ()
    assert not any(value is True for value in switches(found).values())
    assert not found.restarts
