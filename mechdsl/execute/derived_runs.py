"""What the rules of an experiment's own runs write (`run healed { … }`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.execute.means_and_donors import MeansAndDonors, donors_of, means_of
from mechdsl.execute.readout import Readout
from mechdsl.execute.unpatched_batch import RuleWrites, UnpatchedBatch
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.execute.writes import build_edges, build_writes
from mechdsl.plan.plan import ExperimentPlan
from mechdsl.plan.rule_rows import Rows
from mechdsl.prompts.prompt_table import Run


@dataclass(frozen=True, eq=False)
class DerivedRuns:
    """The runs with rules of one panel; each may read those before it."""

    plans: Mapping[str, ExperimentPlan]
    runs: UnpatchedRuns
    written: dict[str, MeansAndDonors]
    """By name, what is written beside what runs have on the same prompt."""

    @staticmethod
    def of(
        plans: Mapping[str, ExperimentPlan], runs: UnpatchedRuns, keys: Sequence[int], kept: Ints
    ) -> DerivedRuns:
        """keys: [prompt] of its content. kept: rows that donors are drawn from."""
        written = {
            name: MeansAndDonors({}, {}, donors_of(plan, keys, runs.seed, kept))
            for name, plan in plans.items()
        }
        return DerivedRuns(plans, runs, written)

    @property
    def over_rows(self) -> bool:
        """Whether what some rule writes hangs on other rows."""
        return any(rule.rule.does.over_rows for plan in self.plans.values() for rule in plan.rules)

    def average(self, batches: Sequence[Ints]) -> None:
        """The means that rules write, over these rows."""
        for name, plan in self.plans.items():
            means, behind = means_of(plan, self.runs, batches, Readout.of(()))
            self.written[name] = MeansAndDonors(means, behind, self.written[name].donors)

    def rules(self, run: Run, prompts: Ints, draw: Ints, batch: Ints) -> RuleWrites:
        """What the rules of a run write in rows that start there; those of the run that it is made
        of are still in place, where its own set nothing else.

        prompts, draw: [row]; batch: the prompts in work.
        """
        if run.derived is None:
            return RuleWrites()
        plan, written = self.plans[run.name], self.written[run.name]
        none = np.zeros(len(prompts), dtype=np.int64)
        rows = Rows(none, prompts, none)

        def lanes_of(source: str, donors: bool) -> UnpatchedBatch:
            due = batch
            if donors and written.donors is not None:
                due = np.unique(written.donors[batch])
            return self.runs.lanes(self.runs.named(source), due, alone=donors)

        shape = self.runs.model.shape
        before = self.rules(self.runs.named(run.derived.base), prompts, draw, batch)
        own = RuleWrites(
            build_writes(plan, rows, draw, lanes_of, written, shape), build_edges(plan, rows, shape)
        )
        return before.then(own)
