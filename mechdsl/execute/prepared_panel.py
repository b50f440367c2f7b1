"""The experiments of one panel before any cell: rows kept, unpatched runs measured, means taken."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e06_experiment import NothingKept
from mechdsl.execute.accuracies import unmeasured_accuracies
from mechdsl.execute.derived_runs import DerivedRuns
from mechdsl.execute.directions import DirectionFits, FittedDirections
from mechdsl.execute.found import Found
from mechdsl.execute.kept_values import KeptRun, KeptValues, PatchedValues
from mechdsl.execute.made_of_cells import CellFailed, MadeOfCells, made_of_cells
from mechdsl.execute.means_and_donors import MeansAndDonors, donors_of, means_of
from mechdsl.execute.measured_values import MeasuredValues
from mechdsl.execute.no_value import cell_failed, no_value
from mechdsl.execute.not_finite import in_run, not_finite
from mechdsl.execute.options import PaddingSide
from mechdsl.execute.over_rows import Together, observe_together
from mechdsl.execute.pass_size import Sizes
from mechdsl.execute.profile import Profile
from mechdsl.execute.readout import Readout
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.execute.unusable import Unusable
from mechdsl.execute.writer import ends_of
from mechdsl.execute.writes import readable
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.plan import Panel, Plan
from mechdsl.plan.rule_rows import Rows
from mechdsl.plan.sweeps import batch_size
from mechdsl.plan.whole_cells import WholeCells, whole_cells
from mechdsl.prompts.prompt_table import PromptTable

Check = Callable[[MeasuredValues], dict[int, Diagnostic]]
"""By number, the measures of an experiment that can't be computed, by its unpatched runs."""


@dataclass(frozen=True)
class SortedOut:
    """The rows of an experiment on a batch of prompts."""

    live: Rows
    """Those that have to be run."""
    known: Rows
    """Those whose values were there before the run."""
    values: Sequence[Floats]
    """Per measure, of the known ones."""
    left_out: Rows
    """Those that aren't run, as they can't differ from the base run."""
    dropped: int
    """How many don't find what they read."""
    inert: int
    """How many can't differ, left out or not."""


class PreparedPanel:
    """What is known of the experiments of one panel before their cells are run."""

    def __init__(
        self,
        panel: Panel,
        model: LoadedModel,
        plan: Plan,
        side: PaddingSide | None,
        sizes: Sizes,
        profile: Profile,
        kept: KeptRun | None = None,
        *,
        allow_nan: bool = False,
        others: Mapping[str, LoadedModel] | None = None,
    ) -> None:
        self.panel = panel
        self.allow_nan = allow_nan
        self.lost: dict[str, list[Diagnostic]] = {}
        self.running: tuple[ExperimentPlan, ...] = ()
        """Those whose cells are run."""
        self.plan = plan
        self.sizes = sizes
        self.table: PromptTable = panel.table
        self.measured: dict[str, MeasuredValues] = {}
        self.means_and_donors: dict[str, MeansAndDonors] = {}
        self.whole_cells: dict[str, Mapping[int, WholeCells]] = {}
        self.readouts = {
            p.experiment.key: Readout.of(p.experiment.measures) for p in panel.experiments
        }
        self.keep = Readout.of(panel.experiments[0].experiment.keep)
        self.accuracies = unmeasured_accuracies(panel)
        readouts = (*self.readouts.values(), self.keep)
        self.runs = UnpatchedRuns(panel, model, readouts, plan=plan, side=side, others=others)
        self.defined: dict[str, float] = {}
        """The lengths of the directions of the panel's own runs, by their names."""
        self.fits = DirectionFits(model, self.runs.others, self.runs.seed, side)
        self.profile = profile
        self.kept = np.arange(len(self.table), dtype=np.int64)
        self.known_batches: list[Ints] = []
        """Prompts of which every value was there before the run."""
        self.batches: list[Ints] = []
        """The others."""
        self.stored = kept and KeptValues.of(kept, panel, self.runs.seed)
        self.values = self.stored
        writer = self.runs.writer
        if writer is not None:  # what they write is kept, and measured again
            self.values = None
            writer.kept = self.stored and self.stored.replies(
                writer.generation.key(self.runs.seed), ends_of(model)
            )
        self.together: dict[str, Together] = {}
        """What is observed of all rows at once, by the key of an experiment."""
        self.patched_values: dict[str, PatchedValues] = {}
        """By the key of an experiment; without those that can't be told apart by their content."""

    @property
    def _sound(self) -> tuple[ExperimentPlan, ...]:
        """Of the experiments that nothing is known against."""
        return tuple(plan for plan in self.panel.experiments if owner(plan) not in self.lost)

    def _lose(self, plan: ExperimentPlan, *reasons: Diagnostic) -> None:
        """An experiment can't be computed; with it goes what it is set against."""
        self.lost.setdefault(owner(plan), []).extend(reasons)

    # --- before any cell --------------------------------------------------------------------------

    def prepare(self, check: Check) -> None:
        """Filter rows, measure and check the unpatched runs, average ablations."""
        over_rows = any(
            rule.rule.does.of_all_rows
            for plan in self.panel.derived.values()
            for rule in plan.rules
        )
        if not over_rows:  # accuracies are of rows too that a `keep` drops
            self._define_runs()
        unusable = self._keep()
        if over_rows:
            self._define_runs()
        for plan in self._sound:
            experiment = plan.experiment
            readout, accuracies = self.readouts[experiment.key], self.accuracies[experiment.key]
            measured = MeasuredValues.unmeasured(plan, readout, self.kept, accuracies)
            measured.unusable.update(unusable)
            whole = self.measured.get(owner(plan))
            if whole is not None:  # a measure that fails on a control fails as a whole
                measured.refused, measured.failed = whole.refused, whole.failed
            self.measured[experiment.key] = measured
        for batch in self._by_known(self.kept, self._unmeasured(self.kept)):
            for plan in self._sound:
                self._measure_unpatched(plan, batch)
            self._finish_batch()
        for plan in self._sound:
            self._look_at_unusable(plan)
        for plan in self._sound:
            if plan.experiment.control_of is not None:  # it is said of the experiment itself
                continue
            measured = self.measured[plan.experiment.key]
            for number, problem in check(measured).items():
                measured.refused.setdefault(number, problem)
            if len(measured.refused) == len(plan.experiment.measures):
                self._lose(plan, *measured.refused.values())
        directions = self._directions()
        self.running = self._sound
        for plan in self.running:
            key = plan.experiment.key
            kept = self.measured[key].kept
            donors = donors_of(plan, self.table, self.runs.seed, kept)
            self.means_and_donors[key] = MeansAndDonors({}, {}, donors, {}, directions[key])
            self.whole_cells[key] = self._whole_cells(plan, kept)
            together = observe_together(plan, self.runs, self.measured[key], self.values)
            if together is None:
                self._look_up(plan, kept, donors)
            else:
                self.together[key] = together
        due = self._due()
        self.batches = self._batches(due)
        self.known_batches = self._batches(np.setdiff1d(self.kept, due))
        if len(due):
            self._average()

    def _define_runs(self) -> None:
        """What the rules of the panel's own runs write; means and donors are of the kept rows."""
        if not self.panel.derived:
            return
        plans, batches = self.panel.derived, self._batches(self.kept)
        derived, problems = DerivedRuns.define(plans, self.runs, batches, self.fits)
        for found in derived.directions.values():
            self.defined.update(found.lengths)
        for plan in self._sound if problems else ():
            self._lose(plan, *problems)
        if self.stored is not None:
            self.stored.define(plans, self.kept, derived.donors, derived.cells)

    def _directions(self) -> dict[str, FittedDirections]:
        """Those of each experiment's rules; one with a direction that is nothing is lost."""
        fits = self.fits
        found: dict[str, FittedDirections] = {}
        for plan in self._sound:
            own, problems = fits.of(plan)
            found[plan.experiment.key] = own
            self.measured[plan.experiment.key].lengths = {**self.defined, **own.lengths}
            if problems:
                self._lose(plan, *problems)
        self.runs.passes += fits.passes
        return found

    def _average(self) -> None:
        """The means that rules write, over all rows of their experiments."""
        every = self._batches(self.kept)
        for plan in self.running:
            measured, readout = self.measured[plan.experiment.key], self.readouts
            batches = [own for batch in every if len(own := measured.among(batch))]
            own = self.means_and_donors[plan.experiment.key]
            means, behind = means_of(plan, self.runs, batches, readout[plan.experiment.key])
            made = self._made(plan, batches)
            found = MeansAndDonors(means, behind, own.donors, made, own.directions)
            self.means_and_donors[plan.experiment.key] = found
        self.running = self._sound

    def _made(
        self, plan: ExperimentPlan, batches: Sequence[Ints]
    ) -> Mapping[tuple[int, int | None], MadeOfCells]:
        """What rules write that is made of whole cells; a failure loses the experiment."""
        key, cells = plan.experiment.key, self.whole_cells[plan.experiment.key]
        if owner(plan) in self.lost:
            return {}
        try:
            return made_of_cells(plan, cells, self.runs, batches, self.readouts[key])
        except CellFailed as failed:
            self._lose(plan, cell_failed(failed, plan))
            return {}

    def _whole_cells(self, plan: ExperimentPlan, kept: Ints) -> Mapping[int, WholeCells]:
        """By number of the rule, all rows of each cell, where a rule is given them at once."""
        if not any(rule.rule.does.reads == "cell" for rule in plan.rules):
            return {}
        every = plan.rows(kept)
        key = plan.experiment.key
        good = readable(plan, every, self.means_and_donors[key], self.readouts[key].passes)
        return whole_cells(plan, every.take(good))

    def total_rows(self) -> int:
        """Patched rows of all experiments, draws included."""
        every = [*self.known_batches, *self.batches]
        return sum(self._count(plan, batch) for plan in self.running for batch in every)

    def due_rows(self) -> int:
        """The same of the prompts of which something has to be run."""
        return sum(self._count(plan, batch) for plan in self.running for batch in self.batches)

    def _count(self, plan: ExperimentPlan, batch: Ints) -> int:
        return plan.count(self.measured[plan.experiment.key].among(batch))

    # --- what is known ----------------------------------------------------------------------------

    def _by_known(self, prompts: Ints, due: Ints) -> list[Ints]:
        """Batches of the prompts of which all is known, then of those that are due: what a pass
        holds is to be the same when it is run again."""
        return [*self._batches(np.setdiff1d(prompts, due)), *self._batches(due)]

    def _unmeasured(self, prompts: Ints) -> Ints:
        """Those of which an unpatched run has to be measured; all, where nothing is known."""
        if self.values is None:
            return prompts
        missing = np.zeros(len(prompts), dtype=np.bool_)
        for plan in self._sound:
            key, measured = plan.experiment.key, self.measured[plan.experiment.key]
            for run in measured.unpatched:
                for item in measured.environments:
                    readout, relative = self.readouts[key], self._relative(plan, run)
                    missing |= ~self.values.unpatched(readout, run, prompts, item, relative)
        if not self.keep.measures:
            missing |= self._inaccurate(prompts)
        return prompts[missing]

    def _inaccurate(self, prompts: Ints) -> Bools:
        """[prompt] whether an accuracy has to be measured."""
        missing = np.zeros(len(prompts), dtype=np.bool_)
        relative = self.runs.model.rounding
        for accuracies in self.accuracies.values():
            for run, readout in accuracies.readouts() if self.values is not None else ():
                assert self.values is not None
                missing |= ~self.values.unpatched(readout, run, prompts, None, relative)
        return missing

    def _relative(self, plan: ExperimentPlan, run: str) -> float:
        """How far rounding may move a logit, where that is asked: of base runs."""
        return self.runs.model.rounding if run == plan.experiment.spec.base else 0.0

    def _look_up(self, plan: ExperimentPlan, kept: Ints, donors: Mapping[int, Ints]) -> None:
        """What there is of an experiment's patched values."""
        if self.stored is None or not plan.rules:
            return
        if self.measured[plan.experiment.key].tokens.top:
            said = "the tokens that it lists are made of all of its rows"
            self.profile.not_kept[plan.experiment.key] = said
            return
        try:
            cells = self.whole_cells[plan.experiment.key]
            keys = self.stored.keys(plan, kept, donors, cells)
        except TypeError as error:  # what a rule or metric from outside hangs on can't be compared
            self.profile.not_kept[plan.experiment.key] = str(error)
            return
        if self.runs.writer is not None and self.runs.writer.kept is not None:
            self.runs.writer.kept.keys[plan.experiment.key] = keys
        else:
            self.patched_values[plan.experiment.key] = self.stored.patched(keys)

    def _due(self) -> Ints:
        """The prompts of which some row has to be run; all, where nothing is known."""
        if not any(found.any_earlier for found in self.patched_values.values()):
            run = (plan for plan in self.running if plan.experiment.key not in self.together)
            return self.kept if any(plan.rules for plan in run) else self.kept[:0]
        due: list[Ints] = [self.kept[:0]]
        for batch in self._batches(self.kept):
            due += [self.sorted_out(plan, batch).live.prompt for plan in self.running]
        return np.unique(np.concatenate(due))

    def _values(
        self,
        readout: Readout,
        run: str,
        batch: Ints,
        item: int | None,
        relative: float = 0.0,
        skip: Collection[int] = (),
    ) -> Found:
        """What an unpatched run gives on a batch: known, or measured and kept."""
        if self.values is not None:
            found = self.values.own_unpatched(readout, run, batch, item, relative)
            if found is not None:
                return found
        found = self.runs.values(readout, run, batch, item, relative=relative, skip=skip)
        if self.values is not None:
            self.values.measured(readout, run, batch, item, relative, found)
        return found

    def _keep(self) -> dict[int, Unusable]:
        """Leave the rows that a `keep` keeps, and, with `allow_nan`, drop those that it can't be
        decided on."""
        if not self.keep.measures:
            return {}
        good = np.ones(len(self.table), dtype=np.bool_)
        broken = np.zeros(len(self.table), dtype=np.bool_)
        due = self.kept
        if self.values is not None:
            missing = ~self.values.unpatched(self.keep, "clean", self.kept, None, 0.0)
            due = self.kept[missing | self._inaccurate(self.kept)]
        for batch in self._by_known(self.kept, due):
            found = self._values(self.keep, "clean", batch, None)
            broken[batch] = found.broken
            for values in found.values:
                good[batch] &= values != 0
            for accuracies in self.accuracies.values():  # of the rows that are dropped too
                accuracies.measure(self._values, self.runs.model.rounding, batch)
            self._finish_batch()
            self.runs.forget()
            for plan in self.panel.experiments if found.failed or found.gaps else ():
                reasons = no_value(found, plan.experiment, plan.experiment.keep, "clean", batch)
                self._lose(plan, *reasons.values())
            if self.lost:
                return {}
        self.kept = np.flatnonzero(good & ~broken)
        unusable = {int(row): Unusable(int(row), "clean") for row in np.flatnonzero(broken)}
        if unusable and not (self.allow_nan and len(self.kept)):
            place = in_run(self.runs, self.keep, next(iter(unusable.values())))
            for plan in self.panel.experiments:
                self._lose(plan, not_finite(plan.experiment, place, len(unusable)))
        elif not len(self.kept):
            for plan in self.panel.experiments:
                span = plan.experiment.spec.keep[0].span
                self._lose(plan, NothingKept(span=span, rows=len(self.table)))
        return unusable

    def _look_at_unusable(self, plan: ExperimentPlan) -> None:
        """Rows that can't be used in an unpatched run: lose the experiment, or, with `allow_nan`,
        drop them from it and from what it is set against."""
        measured = self.measured[plan.experiment.key]
        rows = measured.unusable_rows()
        if not rows:
            return
        if self.allow_nan and not rows.issuperset(measured.kept.tolist()):
            measured.leave_out(sorted(rows))
            return
        first = measured.unusable[min(rows)]
        first = in_run(self.runs, self.readouts[plan.experiment.key], first)
        self._lose(plan, not_finite(plan.experiment, first, len(rows)))

    def _batches(self, prompts: Ints) -> list[Ints]:
        """Prompts in groups of similar size in tokens, in the order of the table."""
        size = self._batch_size
        return [prompts[i : i + size] for i in range(0, len(prompts), size)]

    @cached_property
    def _batch_size(self) -> int:
        return batch_size(self.panel, self.sizes.prompt_tokens)

    def _finish_batch(self) -> None:
        """Keep what a batch gave and free what it computed; a single one serves all stages."""
        if self.values is not None:
            self.values.flush()
        if len(self._batches(self.kept)) > 1:
            self.runs.forget()

    def _measure_unpatched(self, plan: ExperimentPlan, batch: Ints) -> None:
        """Base, source and accuracies of one experiment on one batch."""
        experiment = plan.experiment
        measured = self.measured[experiment.key]
        columns = np.searchsorted(self.kept, batch)
        readout = self.readouts[experiment.key]
        for run in measured.unpatched:
            relative = self._relative(plan, run)
            for number, environment in enumerate(measured.environments):
                found = self._values(readout, run, batch, environment, relative, measured.failed)
                measured.read_unpatched(run, number, columns, found)
                measured.saw(Unusable(int(row), run) for row in batch[found.broken])
                reasons = no_value(found, experiment, experiment.measures, run, batch)
                for refused, reason in reasons.items():
                    measured.refused.setdefault(refused, reason)
                measured.failed.update(reasons)
        if not self.keep.measures:
            measured.accuracies.measure(self._values, self.runs.model.rounding, batch)

    def sorted_out(self, plan: ExperimentPlan, batch: Ints) -> SortedOut:
        """Which rows of an experiment have to be run."""
        kept = self.measured[plan.experiment.key].among(batch)
        every = plan.rows(kept) if plan.rules else Rows.none()
        key = plan.experiment.key
        good = readable(plan, every, self.means_and_donors[key], self.readouts[key].passes)
        rows = every.take(good)
        inert = plan.is_inert(rows)
        out = inert if self.plan.skips_inert else np.zeros_like(inert)
        live, known, values = rows.take(np.flatnonzero(~out)), Rows.none(), list[Floats]()
        if key in self.together:
            known, values, live = live, self.together[key].of(live), Rows.none()
        elif key in self.patched_values:
            there, found = self.patched_values[key].earlier(live)
            known, values = live.take(np.flatnonzero(there)), [each[there] for each in found]
            live = live.take(np.flatnonzero(~there))
        return SortedOut(
            live=live,
            known=known,
            values=values,
            left_out=rows.take(np.flatnonzero(out)),
            dropped=len(every) - len(rows),
            inert=int(inert.sum()),
        )


def owner(plan: ExperimentPlan) -> str:
    """The experiment itself, or the one that it is a control of."""
    return plan.experiment.control_of or plan.experiment.key
