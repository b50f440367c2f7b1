"""What the rules of an experiment's own runs write (`run healed { … }`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.execute.directions import DirectionFits, FittedDirections
from mechdsl.execute.made_of_cells import CellFailed, made_of_cells
from mechdsl.execute.means_and_donors import MeansAndDonors, donors_of, means_of
from mechdsl.execute.no_value import cell_failed
from mechdsl.execute.readout import Readout
from mechdsl.execute.unpatched_batch import UnpatchedBatch
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.execute.writes import acting
from mechdsl.hooks.rule_writes import RuleWrites
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.rule_rows import Rows, RulePlan
from mechdsl.plan.whole_cells import WholeCells, whole_cells
from mechdsl.prompts.prompt_table import Run


@dataclass(frozen=True, eq=False)
class DerivedRuns:
    """The runs with rules of one panel; each may read those before it."""

    plans: Mapping[str, ExperimentPlan]
    runs: UnpatchedRuns
    donors: Mapping[str, Mapping[int, Ints]]
    """By name and number of the rule, [prompt] the row that replaces it, for `resample`."""
    cells: Mapping[str, Mapping[int, WholeCells]]
    """By name and number of the rule, the rows that a function is given at once."""
    directions: Mapping[str, FittedDirections]
    batches: Sequence[Ints]
    """Prompts that means are of."""
    _written: dict[str, MeansAndDonors] = field(default_factory=dict[str, MeansAndDonors])

    @staticmethod
    def define(
        plans: Mapping[str, ExperimentPlan],
        runs: UnpatchedRuns,
        batches: Sequence[Ints],
        fits: DirectionFits,
    ) -> tuple[DerivedRuns, list[Diagnostic]]:
        """The runs, which can be read from then on; and why one can't be made: E0223 for a function
        that fails, E0641 for a direction that is nothing.

        batches: of the rows that means and donors are of, and that functions are given.
        """
        kept = np.concatenate([np.arange(0), *batches])
        directions = {name: fits.of(plan) for name, plan in plans.items()}
        found = DerivedRuns(
            plans,
            runs,
            {name: donors_of(plan, runs.table, runs.seed, kept) for name, plan in plans.items()},
            {name: whole_cells(plan, plan.rows(kept)) for name, plan in plans.items()},
            {name: own for name, (own, _) in directions.items()},
            batches,
        )
        problems = [problem for _, own in directions.values() for problem in own]
        runs.rules_of = found.rules
        for name, plan in plans.items() if not problems else ():
            if found.cells[name]:  # functions that fail do so before anything else is run
                try:
                    found.written(name)
                except CellFailed as failed:
                    return found, [cell_failed(failed, plan)]
        return found, problems

    def written(self, name: str) -> MeansAndDonors:
        """What the rules of a run write beside what runs have on the same prompt. Means are taken
        when something is first read of it: its values may all be known."""
        if name not in self._written:
            plan, cells, readout = self.plans[name], self.cells[name], Readout.of(())
            means, behind = means_of(plan, self.runs, self.batches, readout)
            made = made_of_cells(plan, cells, self.runs, self.batches, readout)
            directions = self.directions[name]
            self._written[name] = MeansAndDonors(means, behind, self.donors[name], made, directions)
        return self._written[name]

    def rules(self, run: Run, prompts: Ints, draw: Ints, batch: Ints) -> RuleWrites:
        """What the rules of a run write in rows that start there; those of the run that it is made
        of are still in place, where its own set nothing else.

        prompts, draw: [row]; batch: the prompts in work.
        """
        if run.derived is None:
            return RuleWrites()
        plan, written = self.plans[run.name], self.written(run.name)
        none = np.zeros(len(prompts), dtype=np.int64)
        rows = Rows(none, prompts, none)

        def lanes_of(rule: RulePlan) -> UnpatchedBatch:
            donors, apart = written.donors.get(rule.number), rule.rule.apart
            due = batch if donors is None else np.unique(donors[batch])
            if apart is not None:
                places = {(point.site, point.layer) for point in rule.source_table}
                return self.runs.apart(apart.table, apart.table.runs[apart.run], due, places)
            return self.runs.lanes(self.runs.named(rule.rule.run), due, alone=donors is not None)

        shape = self.runs.model.shape
        before = self.rules(self.runs.named(run.derived.base), prompts, draw, batch)
        return before.then(acting(plan, rows, draw, lanes_of, written, shape))
