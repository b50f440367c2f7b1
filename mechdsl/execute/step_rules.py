"""What rules do while a model writes: in the prefill, to what it keeps, at the newest token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Ints
from mechdsl.execute.means_and_donors import MeansAndDonors
from mechdsl.execute.while_writing import WhileWriting
from mechdsl.execute.writes import LanesOf, acting
from mechdsl.generate.records import StepEdge, StepRules
from mechdsl.hooks.inside_attention import EdgeWrite
from mechdsl.hooks.reads_and_writes import SiteWrite
from mechdsl.hooks.rule_writes import RuleWrites
from mechdsl.models.shape import ModelShape
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.rule_rows import EVERY, NEWEST, NOTHING, Rows, RulePlan


def prefill_of(plan: ExperimentPlan) -> ExperimentPlan:
    """The plan with the rules that act in the prefill."""
    if plan.experiment.generation is None:
        return plan
    rules: list[RulePlan] = []
    for rule in plan.rules:
        if rule.rule.in_prefill:
            there = None if rule.steps is None else rule.steps[:, 0] == 0
            rules.append(rule if there is None or there.all() else rule.within(there))
    return replace(plan, rules=tuple(rules))


def while_writing(
    plan: ExperimentPlan,
    rows: Rows,
    draws: Ints,
    lanes_of: LanesOf,
    means_and_donors: MeansAndDonors,
    shape: ModelShape,
) -> WhileWriting:
    """What the rules of these rows do behind the prefill. At the newest token a rule writes what it
    writes at the last of its tokens in the prompt."""
    kept: list[SiteWrite] = []
    steps: list[StepRules] = []
    for rule in plan.rules:
        alone = replace(plan, rules=(rule,))

        def of(own: Ints, alone: ExperimentPlan = alone) -> RuleWrites:
            given = (lanes_of, means_and_donors, shape)
            found = acting(alone, rows.take(own), draws[own], *given)
            return found.moved(torch.from_numpy(own))

        if rule.rule.after_prefill:
            kept += of(np.arange(len(rows))).writes
            continue
        for also, following in _following(rule, rows):
            for first, last, own in _when(rule, rows, following):
                found = of(own)
                steps.append(
                    StepRules(
                        first=max(first, 1),
                        last=last,
                        writes=tuple(map(_last, found.writes)),
                        edges=tuple(StepEdge(_last_edge(e, also), also) for e in found.edges),
                        blocks=found.blocks,
                    )
                )
    return WhileWriting(tuple(kept), tuple(steps))


Also = Literal["", "newest", "written"]


def _following(rule: RulePlan, rows: Rows) -> Iterator[tuple[Also, Ints]]:
    """The rows in which a rule follows the newest token, by what is a key there beside tokens of
    the prompt."""
    follows = rule.acts(rows) & (rule.follows[rule.position_of_cell[rows.cell]] != NOTHING)
    keys = np.full(len(rows), NOTHING)
    if rule.key_of_cell is not None:
        keys = rule.keys_follow[rule.key_of_cell[rows.cell]]
    kinds: tuple[tuple[Also, Bools], ...] = (
        ("", keys == NOTHING),
        ("newest", keys == NEWEST),
        ("written", keys == EVERY),
    )
    for also, own in kinds:
        found = np.flatnonzero(follows & own)
        if len(found):
            yield also, found


def _when(rule: RulePlan, rows: Rows, own: Ints) -> Iterator[tuple[int, int | None, Ints]]:
    """(first, last step, those of these rows in which a rule acts then), but for step 0 alone."""
    if rule.steps is None:
        yield 0, None, own  # of the last token too, which is read in replies and predicts none
        return
    ends, which = np.unique(rule.steps[rows.cell[own]], axis=0, return_inverse=True)
    for number, (first, last) in enumerate(ends.tolist()):
        if last > 0:
            yield first, last, own[which.reshape(-1) == number]


def _at_the_end(rows: Tensor, positions: Tensor) -> Tensor:
    """[K] which of the places are the last of their row."""
    if not len(rows):
        return torch.zeros(0, dtype=torch.bool)
    last = torch.full((int(rows.max()) + 1,), -1)
    last = last.scatter_reduce(0, rows, positions, "amax")
    return positions == last[rows]


def _last(write: SiteWrite) -> SiteWrite:
    """Of each row, what is written at the last of its tokens."""
    return write.some(_at_the_end(write.rows, write.positions))


def _last_edge(edge: EdgeWrite, also: Also) -> EdgeWrite:
    """Of each row, the query that is the last of its tokens; its own token, which the newest one
    stands for, is no key."""
    edge = edge.some(_at_the_end(edge.rows, edge.queries))
    if also != "newest":
        return edge
    others = edge.keys != edge.queries[edge.entries]
    return replace(edge, entries=edge.entries[others], keys=edge.keys[others])
