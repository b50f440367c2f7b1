"""The planned passes over prompts and replies equal those of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechdsl.execute import unpatched_runs
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.cost import PanelCount, PanelWork, ReplyWork
from mechdsl.planner.passes import PASS_NAMES, PASSES
from mechdsl.planner.plan import PASS_TOKENS, PROMPT_TOKENS, Plan

from .support import PROMPTS, bare, experiment, run_file

FROM = "from longer into clean"
RULE = "for c in [1, 2] { set mlp_out layer 1 at last token to c }"
NOISED = "corrupt noised { add gaussian(std: 1.5, samples: 2) to embed at subject tokens }"
CASES: dict[str, tuple[str, ...]] = {
    "with the base run": (RULE, "measure entropy at each step as delta"),
    "beside a run": (FROM, RULE, "measure kl(other) at reply token 2 as raw"),
    "two of one row": (
        RULE,
        "measure entropy at each reply token as raw",
        "measure kl(clean) at each reply token as raw",
    ),
    "what is seen": (RULE, "observe norm resid_post layer 2 at each reply token as seen"),
    "draws of noise": (
        "from clean into noised",
        "patch embed at subject tokens",
        "measure entropy at each step as delta",
    ),
    "no rules": ("measure entropy at last token of reply as raw",),
    "nothing in replies": (RULE, "measure entropy as delta", "measure length as raw"),
}


def read(text: str, folder: Path, options: RunOptions) -> tuple[Plan, ReplyWork]:
    """The plan of a run, and its work after prompts."""
    plans: list[Plan] = []
    found: list[ReplyWork] = []
    run_whole = unpatched_runs.run_full

    def counted(model: Any, batch: Any, **given: Any) -> Any:
        lengths = batch.mask.sum(1).numpy()
        row, _ = given["logits_at"].shape
        assert row == len(lengths)
        logits = sum(len(np.unique(own)) for own in given["logits_at"].numpy())
        pairs = int((lengths * (lengths + 1) // 2).sum())
        found.append(ReplyWork(1, int(lengths.sum()), pairs, logits))
        return run_whole(model, batch, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unpatched_runs, "run_full", counted)
        own = RunOptions(
            without=options.without,
            execution=options.execution,
            on_profile=lambda plan, _: plans.append(plan),
        )
        prompts = PROMPTS.replace("corrupt other", f"{NOISED}\n  corrupt other")
        run_file(text, folder, bare("llama"), own, prompts=prompts)
    return plans[0], sum(found, ReplyWork(0, 0, 0, 0))


def counted(plan: Plan, pass_tokens: int, *, plain: bool) -> ReplyWork:
    """The planned work."""
    found = ReplyWork(0, 0, 0, 0)
    for panel in plan.panels:
        count = PanelCount(panel, pass_tokens, PROMPT_TOKENS)
        for prompts in count.chunks():
            tally = PanelWork(count, prompts)
            for one in PASSES if not plain else ():
                if one.shown is not None:
                    one.shown(tally)
            together = pass_tokens if tally.joins else None
            found += tally.readings.work(count.plans, tally.rows, together, unpatched=tally.first)
    return found


@pytest.mark.parametrize("samples", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_planned_passes_over_replies_equal_those_of_the_run(
    folder: Path, case: str, samples: int
) -> None:
    """Replies have their maximal length, so that the plan is exact."""
    drawn = f" with temperature 1, samples {samples}" if samples > 1 else ""
    text = "seed 1\n" + experiment("e", "prompts p", f"generate 3{drawn}", *CASES[case])
    for plain in (False, True):
        options = RunOptions(
            without=frozenset(PASS_NAMES if plain else ()),
            execution=ExecutionOptions(pass_tokens=PASS_TOKENS),
        )
        plan, done = read(text, folder, options)
        found = counted(plan, PASS_TOKENS, plain=plain)
        assert (found.tokens, found.keys) == (done.tokens, done.keys), plain
        assert found.logits == done.logits, plain
        if not plain:
            assert found.forwards == done.forwards
    assert (done.tokens > 0) == (case != "nothing in replies")
