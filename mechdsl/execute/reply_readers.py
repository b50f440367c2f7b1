"""Who reads what in replies, and how what is found there goes with the rest."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.reply import Reply
from mechdsl.execute.found import Found, over
from mechdsl.execute.readout import Readout
from mechdsl.execute.wanted_places import Member
from mechdsl.execute.while_writing import WhileWriting
from mechdsl.hooks.rule_writes import RuleWrites
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.rule_rows import Rows, RulePlan
from mechdsl.prompts.prompt_table import Run
from mechdsl.resolve.replies import in_reply, looks
from mechdsl.resolve.resolved import Env


@dataclass(frozen=True, eq=False)
class HaveWritten:
    """Rows of a pass that have written, with what acted in them."""

    run: Run
    prompts: Ints
    """[row]"""
    replies: Sequence[Reply]
    """[row]"""
    prefill: RuleWrites = field(default_factory=RuleWrites)
    later: WhileWriting = field(default_factory=WhileWriting)


@dataclass(frozen=True, eq=False)
class Reader:
    """What one experiment reads of some of these rows."""

    plan: ExperimentPlan | None
    """None of an unpatched run, of which nothing is observed."""
    readout: Readout
    rows: Rows
    at: Ints
    """[row] the row of the pass."""
    items: Sequence[Env]
    """[row]"""
    skip: Collection[int] = ()

    @property
    def as_base(self) -> bool:
        """Whether it reads without rules."""
        return self.plan is not None and self.plan.experiment.as_base

    @cached_property
    def looks(self) -> RulePlan | None:
        """What looks at replies."""
        observes = None if self.plan is None else self.plan.observes
        return observes if observes is not None and in_reply(observes.rule) else None

    @cached_property
    def seen(self) -> tuple[int, ...]:
        """Numbers of the measures that are of what is looked at."""
        every = enumerate(self.readout.measures) if self.looks is not None else ()
        return tuple(n for n, each in every if looks(each) and n not in self.skip)


def readers_of(
    members: Sequence[Member],
    plans: Sequence[ExperimentPlan],
    readouts: Sequence[Readout],
    skip: Sequence[Collection[int]],
) -> dict[int, Reader]:
    """By the number of its experiment, who reads something in the replies of these rows."""
    found: dict[int, Reader] = {}
    for each in members:
        plan = plans[each.number]
        items = [plan.items[cell] for cell in each.rows.cell]
        given = (plan, readouts[each.number], each.rows, each.at, items, skip[each.number])
        reader = Reader(*given)
        if reader.readout.in_replies or reader.seen:
            found[each.number] = reader
    return found


def with_replies(found: Found, behind: Found) -> Found:
    """What was found on prompts, with what was found behind them."""
    pairs = zip(found.values, behind.values, strict=True)
    rounding = zip(found.rounding, behind.rounding, strict=True)
    return replace(
        found,
        values=[np.where(np.isnan(a), b, a) for a, b in pairs],
        rounding=[a + b for a, b in rounding],
        broken=found.broken | behind.broken,
        failed={**found.failed, **behind.failed},
        gaps={**found.gaps, **behind.gaps},
    )


def averaged(samples: Sequence[Found]) -> Found:
    """Over samples, those that have a value."""
    if len(samples) == 1:
        return samples[0]

    def mean(every: Sequence[Floats]) -> Floats:
        found = np.stack(every, axis=1)
        return over(found, ~np.isnan(found))

    return Found(
        [mean(own) for own in zip(*(each.values for each in samples), strict=True)],
        np.any([each.broken for each in samples], axis=0),
        [mean(own) for own in zip(*(each.rounding for each in samples), strict=True)],
        {n: each for one in samples for n, each in one.failed.items()},
        {n: each for one in samples for n, each in one.gaps.items()},
    )
