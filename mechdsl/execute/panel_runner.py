"""Runs the experiments of one panel: the same prompts, prompt batch by prompt batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e06_experiment import NothingKept
from mechdsl.execute.accuracies import unmeasured_accuracies
from mechdsl.execute.kept_values import KeptRun, KeptValues, PatchedValues
from mechdsl.execute.means_and_donors import MeansAndDonors, donors_of, means_of
from mechdsl.execute.measured_values import MeasuredValues
from mechdsl.execute.no_value import function_failed, no_value
from mechdsl.execute.not_finite import cell_words, in_cell, in_run, not_finite
from mechdsl.execute.options import PaddingSide
from mechdsl.execute.pass_size import Sizes, out_of_memory, stopwatch
from mechdsl.execute.patched_rows import Member, Patcher
from mechdsl.execute.profile import Profile
from mechdsl.execute.readout import Failed, Found, Readout
from mechdsl.execute.row_groups import extent, groups, members_of
from mechdsl.execute.try_sizes import WORTH_MEASURING, try_sizes
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.execute.unusable import Unusable
from mechdsl.execute.writes import readable
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.plan.plan import BATCH_ROWS, ExperimentPlan, Panel, Plan
from mechdsl.plan.rule_rows import Rows
from mechdsl.plan.share import SharedRows, Sharer
from mechdsl.program.python_files import PythonFailure, PythonNotLoaded
from mechdsl.prompts.prompt_table import PromptTable, Run

Check = Callable[[MeasuredValues], dict[int, Diagnostic]]
"""By number, the measures of an experiment that can't be computed, by its unpatched runs."""


@dataclass(frozen=True)
class _SortedOut:
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


class PanelRunner:
    """Runs the experiments of one panel on shared unpatched runs."""

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
        self.readouts = {
            p.experiment.key: Readout.of(p.experiment.measures) for p in panel.experiments
        }
        self.keep = Readout.of(panel.experiments[0].experiment.keep)
        self.accuracies = unmeasured_accuracies(panel)
        readouts = (*self.readouts.values(), self.keep)
        self.runs = UnpatchedRuns(panel, model, readouts, plan=plan, side=side, others=others)
        self.profile = profile
        self.kept = np.arange(len(self.table), dtype=np.int64)
        self.known_batches: list[Ints] = []
        """Prompts of which every value was there before the run."""
        self.batches: list[Ints] = []
        """The others."""
        self.values = kept and KeptValues.of(kept, panel, self.runs.seed)
        self.patched_values: dict[str, PatchedValues] = {}
        """By the key of an experiment; without those that can't be told apart by their content."""

    @property
    def _sound(self) -> tuple[ExperimentPlan, ...]:
        """Of the experiments that nothing is known against."""
        return tuple(plan for plan in self.panel.experiments if _owner(plan) not in self.lost)

    def _lose(self, plan: ExperimentPlan, *reasons: Diagnostic) -> None:
        """An experiment can't be computed; with it goes what it is set against."""
        self.lost.setdefault(_owner(plan), []).extend(reasons)

    # --- before any cell --------------------------------------------------------------------------

    def prepare(self, check: Check) -> None:
        """Filter rows, measure and check the unpatched runs, average ablations."""
        unusable = self._keep()
        for plan in self._sound:
            experiment = plan.experiment
            readout, accuracies = self.readouts[experiment.key], self.accuracies[experiment.key]
            measured = MeasuredValues.unmeasured(plan, readout, self.kept, accuracies)
            measured.unusable.update(unusable)
            owner = self.measured.get(_owner(plan))
            if owner is not None:  # a measure that fails on a control fails as a whole
                measured.refused, measured.failed = owner.refused, owner.failed
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
        self.running = self._sound
        for plan in self.running:
            kept = self.measured[plan.experiment.key].kept
            donors = donors_of(plan, self.table.row_keys, self.runs.seed, kept)
            self.means_and_donors[plan.experiment.key] = MeansAndDonors({}, {}, donors)
            self._look_up(plan, kept, donors)
        due = self._due()
        self.batches = self._batches(due)
        self.known_batches = self._batches(np.setdiff1d(self.kept, due))
        if len(due):
            self._average()

    def _average(self) -> None:
        """The means that rules write, over all rows of their experiments."""
        every = self._batches(self.kept)
        for plan in self.running:
            measured, readout = self.measured[plan.experiment.key], self.readouts
            batches = [own for batch in every if len(own := measured.among(batch))]
            own = self.means_and_donors[plan.experiment.key]
            means, behind = means_of(plan, self.runs, batches, readout[plan.experiment.key])
            found = MeansAndDonors(means, behind, own.donors)
            self.means_and_donors[plan.experiment.key] = found

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
        for accuracies in self.accuracies.values() if self.values is not None else ():
            for run, readout in accuracies.readouts():
                missing |= ~self.values.unpatched(readout, run, prompts, None, relative)
        return missing

    def _relative(self, plan: ExperimentPlan, run: str) -> float:
        """How far rounding may move a logit, where that is asked: of base runs."""
        return self.runs.model.rounding if run == plan.experiment.spec.base else 0.0

    def _look_up(self, plan: ExperimentPlan, kept: Ints, donors: Ints | None) -> None:
        """What there is of an experiment's patched values."""
        if self.values is None or not plan.rules:
            return
        try:
            found = self.values.patched(plan, kept, donors)
        except TypeError as error:  # what a rule or metric from outside hangs on can't be compared
            self.profile.not_kept[plan.experiment.key] = str(error)
            return
        self.patched_values[plan.experiment.key] = found

    def _due(self) -> Ints:
        """The prompts of which some row has to be run; all, where nothing is known."""
        if not any(found.any_earlier for found in self.patched_values.values()):
            return self.kept if any(plan.rules for plan in self.running) else self.kept[:0]
        due: list[Ints] = [self.kept[:0]]
        for batch in self._batches(self.kept):
            due += [self._sorted_out(plan, batch).live.prompt for plan in self.running]
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
        draws = max((r.noise.samples for r in self.table.runs.values() if r.noise), default=1)
        cells = sum(each.n_cells for each in self.panel.experiments)
        tokens = self.sizes.prompt_tokens // (self._longest * draws)
        size = max(1, min(tokens, BATCH_ROWS // max(1, cells)))
        return [prompts[i : i + size] for i in range(0, len(prompts), size)]

    @cached_property
    def _longest(self) -> int:
        """Tokens of the longest prompt in any run."""
        return max(
            (len(row.ids) for run in self.table.runs.values() for row in run.rows), default=1
        )

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

    # --- cells ------------------------------------------------------------------------------------

    def run(self) -> Iterator[int]:
        """Run all cells; yields how many rows, draws included, have been finished."""
        plans = self.running
        if not plans:
            self.runs.forget()
            return
        totals = [
            [
                (np.zeros(values.shape), np.zeros(values.shape))
                for values in self.measured[plan.experiment.key].patched
            ]
            for plan in plans
        ]
        patcher, sharer = self._patcher(), self._sharer()
        for batch in [*self.known_batches, *self.batches]:
            rows: list[Rows] = []
            for number, plan in enumerate(plans):
                measured = self.measured[plan.experiment.key]
                if _owner(plan) in self.lost:
                    rows.append(Rows.none())
                    yield self._count(plan, batch)
                    continue
                if not plan.rules:
                    measured.copy_base()
                found = self._sorted_out(plan, batch)
                measured.dropped += found.dropped
                measured.rows += len(found.live) + len(found.known) + len(found.left_out)
                measured.inert += found.inert
                rows.append(found.live)
                if len(found.left_out):
                    values = measured.base_of(plan, found.left_out)
                    self._finish(number, found.left_out, values, totals[number])
                if len(found.known):
                    self._finish(number, found.known, found.values, totals[number])
                    self.profile.stored += len(found.known)
                yield (found.dropped + len(found.left_out) + len(found.known)) * plan.draws
            shared = sharer.of(rows)
            self.profile.rows += sum(len(one) for one in rows)
            self.profile.distinct += len(shared)
            for member, values in self._patched(patcher, shared, batch):
                self._finish(member.number, member.rows, values, totals[member.number])
                yield len(member.rows) * plans[member.number].draws
            self._finish_batch()
        for plan, sums_and_counts in zip(plans, totals, strict=True):
            if plan.rules:
                patched = self.measured[plan.experiment.key].patched
                for found, (sums, counts) in zip(patched, sums_and_counts, strict=True):
                    with np.errstate(invalid="ignore"):
                        found[:] = np.where(counts > 0, sums / counts, np.nan)
                self.measured[plan.experiment.key].empty_gaps()
        self.runs.forget()
        self._drop_unusable()

    def _drop_unusable(self) -> None:
        """Drop the rows that can't be used in some cell from all cells, and from those of what an
        experiment is set against."""
        rows: dict[str, set[int]] = {}
        for plan in self.running:
            own = self.measured[plan.experiment.key].unusable
            rows.setdefault(_owner(plan), set()).update(own)
        for plan in self._sound:
            measured = self.measured[plan.experiment.key]
            out = rows[_owner(plan)] & set(measured.kept.tolist())
            if out and len(out) == len(measured.kept):
                first = next(iter(measured.unusable.values()))
                self._lose(plan, not_finite(plan.experiment, first, len(out)))
            elif out:
                measured.leave_out(sorted(out))

    def _saw_unusable(
        self,
        patcher: Patcher,
        shared: SharedRows,
        chosen: Ints,
        batch: Ints,
        run: Run,
        member: Member,
        broken: Bools,
    ) -> None:
        """Rows of a pass can't be used; without `allow_nan` that loses their experiment."""
        plan = self.running[member.number]
        measured = self.measured[plan.experiment.key]
        seen = [self._row_of(member, row) for row in np.flatnonzero(broken).tolist()]
        measured.saw(seen)
        if self.allow_nan or _owner(plan) in self.lost:
            return
        row = int(chosen[member.at[int(broken.argmax())]])
        place = in_cell(patcher, shared, row, run, batch, seen[0])
        self._lose(plan, not_finite(plan.experiment, place, 1))

    def _saw_no_value(self, member: Member, found: Found) -> None:
        """Measures that can't be computed in rows of a pass, and cells that have no value."""
        plan = self.running[member.number]
        measured = self.measured[plan.experiment.key]
        for number, failed in found.failed.items():
            seen = self._row_of(member, failed.row or 0)
            measured.refused.setdefault(number, function_failed(failed, plan.experiment, seen))
            measured.failed.add(number)
        none_left = len(measured.refused) == len(plan.experiment.measures)
        if none_left and _owner(plan) not in self.lost:
            self._lose(plan, *measured.refused.values())
        for number, gap in found.gaps.items():
            for row in gap.rows.tolist():
                cell = int(member.rows.cell[row])
                measured.lacks(number, cell, self._row_of(member, row), gap.reason)

    def _row_of(self, member: Member, row: int) -> Unusable:
        """A row of a pass, as it is named."""
        plan, rows = self.running[member.number], member.rows
        words = cell_words(plan, int(rows.cell[row]))
        return Unusable(int(rows.prompt[row]), plan.experiment.spec.base, words)

    def _patcher(self) -> Patcher:
        plans = self.running
        means_and_donors = [self.means_and_donors[plan.experiment.key] for plan in plans]
        readouts = [self.readouts[plan.experiment.key] for plan in plans]
        skip = [self.measured[plan.experiment.key].failed for plan in plans]
        return Patcher(self.plan, plans, readouts, means_and_donors, self.runs, skip)

    def _sharer(self) -> Sharer:
        return Sharer(self.running, share=self.plan.shares_rows)

    def _sorted_out(self, plan: ExperimentPlan, batch: Ints) -> _SortedOut:
        """Which rows of an experiment have to be run."""
        kept = self.measured[plan.experiment.key].among(batch)
        every = plan.rows(kept) if plan.rules else Rows.none()
        key = plan.experiment.key
        good = readable(plan, every, self.means_and_donors[key], self.readouts[key].passes)
        rows = every.take(good)
        inert = plan.is_inert(rows)
        out = inert if self.plan.skips_inert else np.zeros_like(inert)
        live, known, values = rows.take(np.flatnonzero(~out)), Rows.none(), list[Floats]()
        if key in self.patched_values:
            there, every = self.patched_values[key].earlier(live)
            known, values = live.take(np.flatnonzero(there)), [each[there] for each in every]
            live = live.take(np.flatnonzero(~there))
        return _SortedOut(
            live=live,
            known=known,
            values=values,
            left_out=rows.take(np.flatnonzero(out)),
            dropped=len(every) - len(rows),
            inert=int(inert.sum()),
        )

    def _finish(
        self,
        number: int,
        rows: Rows,
        values: Sequence[Floats],
        totals: Sequence[tuple[Floats, Floats]],
    ) -> None:
        """Add values of rows to their cells."""
        measured = self.measured[self.running[number].experiment.key]
        columns = np.searchsorted(measured.kept, rows.prompt)
        for (sums, counts), value in zip(totals, values, strict=True):
            np.add.at(sums, (rows.cell, columns), value)
            np.add.at(counts, (rows.cell, columns), 1)

    # --- the size of a pass ---------------------------------------------------------------------

    def measure_sizes(self) -> None:
        """Settle the size of a pass by trying some on rows of the first batch, where there is
        enough to run. Their values are thrown away."""
        enough = WORTH_MEASURING * self.sizes.pass_tokens
        if not self.batches or self.due_rows() * self._longest < enough:
            return
        plans, batch = self.running, self.batches[0]
        shared = self._sharer().of([self._sorted_out(plan, batch).live for plan in plans])
        widths, work = extent(shared, self.runs.shortcuts, plans)
        if int(widths.sum()) * len(self.batches) < enough:
            return
        run, group = max(
            groups(shared, self.plan, plans, widths), key=lambda each: int(widths[each[1]].sum())
        )
        patcher = self._patcher()

        def one_pass(chosen: Ints) -> None:
            list(patcher.values(shared, chosen, members_of(shared, chosen), run, batch))

        device = self.runs.model.device
        self.sizes.measure(try_sizes(one_pass, group, widths, work, device))
        self._finish_batch()

    # --- passes -----------------------------------------------------------------------------------

    def _patched(
        self, patcher: Patcher, shared: SharedRows, batch: Ints
    ) -> Iterator[tuple[Member, list[Floats]]]:
        """All distinct rows in passes of a good size, with the values of their members."""
        widths, _ = extent(shared, self.runs.shortcuts, self.running)
        for run, group in groups(shared, self.plan, self.running, widths):
            begin = 0
            while begin < len(group):
                ends = np.cumsum(widths[group[begin:]])
                count = max(1, int(np.searchsorted(ends, self.sizes.pass_tokens, side="right")))
                chosen = group[begin : begin + count]
                tokens = int(widths[chosen].sum())
                own = self._own(shared, chosen)
                if own is not None:
                    self.profile.stored += sum(len(member.rows) for member, _ in own)
                    yield from own
                    begin += count
                    continue
                try:
                    with stopwatch(self.runs.model.device) as seconds:
                        every = range(len(self.running))
                        passed = self._pass(patcher, shared, chosen, run, batch, every)
                except (RuntimeError, MemoryError) as error:
                    if len(chosen) == 1 or not out_of_memory(error) or not self.sizes.halve():
                        raise
                    self.profile.halved += 1
                    continue
                self.profile.passed(tokens, seconds[0])
                self._keep_pass([(member, found) for _, member, found in passed])
                for rows, member, found in passed:
                    if found.broken.any():
                        self._saw_unusable(patcher, shared, rows, batch, run, member, found.broken)
                    self._saw_no_value(member, found)
                    yield member, found.values
                begin += count

    def _own(self, shared: SharedRows, chosen: Ints) -> list[tuple[Member, list[Floats]]] | None:
        """What a pass gave, where this run has been through it before it was cut short."""
        if not any(found.any_own for found in self.patched_values.values()):
            return None
        read: list[tuple[Member, list[Floats]]] = []
        for member in members_of(shared, chosen):
            plan = self.running[member.number]
            if _owner(plan) in self.lost:
                continue
            values = self.patched_values.get(plan.experiment.key)
            found = None if values is None else values.own(member.rows)
            if found is None:
                return None
            read.append((member, found))
        return read

    def _keep_pass(self, passed: Sequence[tuple[Member, Found]]) -> None:
        """Keep what a pass gave."""
        if self.values is None:
            return
        known = self.patched_values
        keys = [self.running[member.number].experiment.key for member, _ in passed]
        every = zip(keys, passed, strict=True)
        self.values.keep(
            [part for key, pair in every if key in known for part in known[key].parts(*pair)]
        )

    def _pass(
        self,
        patcher: Patcher,
        shared: SharedRows,
        chosen: Ints,
        run: Run,
        batch: Ints,
        wanted: Collection[int],
    ) -> list[tuple[Ints, Member, Found]]:
        """One pass over the chosen distinct rows: what is found in those of each member, and which
        rows were run. Where a function fails that makes what some of them write, each experiment
        has a pass of its own, so that it costs one alone.

        wanted: numbers of experiments; those that are lost are left out.
        """
        wanted = [n for n in wanted if _owner(self.running[n]) not in self.lost]
        members = [each for each in members_of(shared, chosen) if each.number in wanted]
        if not members:
            return []
        used = np.unique(np.concatenate([member.at for member in members]))
        if len(used) < len(chosen):
            return self._pass(patcher, shared, chosen[used], run, batch, wanted)
        try:
            every = patcher.values(shared, chosen, members, run, batch)
            return [(chosen, member, found) for member, found in every]
        except PythonFailure as failure:
            if len(members) == 1:
                self._cannot_write(members[0], failure)
                return []
        alone = (self._pass(patcher, shared, chosen, run, batch, [m.number]) for m in members)
        return [each for own in alone for each in own]

    def _cannot_write(self, member: Member, failure: PythonFailure) -> None:
        """Lose an experiment whose function makes no vectors for the rows of a pass."""
        plan = self.running[member.number]
        rows = 0 if isinstance(failure, PythonNotLoaded) else len(member.rows)
        failed = Failed(failure.diagnostic, None, rows)
        self._lose(plan, function_failed(failed, plan.experiment, self._row_of(member, 0)))


def _owner(plan: ExperimentPlan) -> str:
    """The experiment itself, or the one that it is a control of."""
    return plan.experiment.control_of or plan.experiment.key
