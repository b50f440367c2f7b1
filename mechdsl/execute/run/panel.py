"""Run a plan panel by panel and batch by batch: `execute` and its `PanelRunner`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.experiments import NoEstimate, NoRowsKept
from mechdsl.execute.cache import PanelCache, PatchedCache, RunCache
from mechdsl.execute.measurement.readout import Readout, ReadoutResult
from mechdsl.execute.measurement.values import (
    MeasuredValues,
    UnusableRow,
    create_accuracies,
    describe_cell,
    explain_missing_values,
    report_function_failure,
    report_missing_cells,
    report_not_finite,
)
from mechdsl.execute.observation.joint import JointObservation, observe_jointly
from mechdsl.execute.pass_layout import (
    MIN_TRIAL_PASSES,
    GroupGenerator,
    PassSizer,
    build_size_trial,
    compute_row_widths,
    estimate_reply_bytes,
    group_rows,
    list_members,
    measure_seconds,
)
from mechdsl.execute.patching.estimates import GradientEstimates
from mechdsl.execute.patching.rows import Patcher, locate_in_cell, locate_in_run
from mechdsl.execute.patching.rule_inputs import (
    CellFunctionFailed,
    DerivedRuns,
    FeatureActivity,
    ReconstructionErrors,
    choose_donors,
    compute_cell_vectors,
    compute_means,
    find_inactive_rows,
    report_cell_failure,
)
from mechdsl.execute.patching.writes import (
    CellVectors,
    RuleInputs,
    RuleReader,
    select_readable_rows,
)
from mechdsl.execute.run_record import ExecutionOptions, ExecutionProfile
from mechdsl.execute.unpatched_runs import UnpatchedRuns, find_end_tokens
from mechdsl.execute.vectors import DirectionFits, FittedDirections
from mechdsl.forward.hooks.backward_rules import AutogradFailed, RuleNotApplied
from mechdsl.forward.hooks.batch import is_out_of_memory, release_memory
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.models.shape import PaddingSide
from mechdsl.planner.cost import RowSharer, SharedRows
from mechdsl.planner.plan import (
    ExperimentPlan,
    Panel,
    Plan,
    WholeCells,
    batch_size,
    collect_whole_cells,
    longest_prompt,
)
from mechdsl.planner.rows import PassMember, RowTable
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PromptRun
from mechdsl.resolve.types import ResolvedExperiment

MeasureCheck = Callable[[MeasuredValues], dict[int, Diagnostic]]
"""From the values of unpatched runs to the measures that can't be computed: number → reason."""


@dataclass(frozen=True)
class RowSelection:
    """Rows of an experiment on a batch of prompts, sorted by whether they must be run."""

    live: RowTable
    """Rows that must be run."""
    known: RowTable
    """Rows whose values were already computed or cached before the run."""
    values: Sequence[Floats]
    """Values of the known rows, per measure."""
    left_out: RowTable
    """Rows that aren't run, because they can't differ from the base run."""
    dropped: int
    """Number of rows that lack a position or donor that they read."""
    inert: int
    """Number of rows whose structure makes them equal to the base run, left out or not."""
    inactive: Ints
    """Cells of further rows that can't differ, because all features that they change are 0."""
    changing: Ints
    """Cells of the rows that may differ from the base run."""


def get_owner_key(plan: ExperimentPlan) -> str:
    """Return the key of the experiment, or of the experiment that it is a control of."""
    return plan.experiment.control_of or plan.experiment.key


class PanelRunner:
    """Runner for the experiments of one panel, which share unpatched runs."""

    def __init__(
        self,
        panel: Panel,
        model: LoadedModel,
        plan: Plan,
        side: PaddingSide | None,
        sizes: PassSizer,
        profile: ExecutionProfile,
        kept: RunCache | None = None,
        *,
        allow_nan: bool = False,
        others: Mapping[str, LoadedModel] | None = None,
    ) -> None:
        self.panel = panel
        self.allow_nan = allow_nan
        self.lost: dict[str, list[Diagnostic]] = {}
        self.running: tuple[ExperimentPlan, ...] = ()
        """Experiments whose cells are run."""
        self.plan = plan
        self.sizes = sizes
        self.table: PromptTable = panel.table
        self.measured: dict[str, MeasuredValues] = {}
        self.means_and_donors: dict[str, RuleInputs] = {}
        self.whole_cells: dict[str, Mapping[int, WholeCells]] = {}
        self.readouts = {
            p.experiment.key: Readout.of(p.experiment.measures) for p in panel.experiments
        }
        self.keep = Readout.of(panel.experiments[0].experiment.keep)
        self.accuracies = create_accuracies(panel)
        readouts = (*self.readouts.values(), self.keep)
        self.runs = UnpatchedRuns(panel, model, readouts, plan=plan, side=side, others=others)
        self.defined: dict[str, float] = {}
        """Lengths of the directions in the panel's runs with rules, by name."""
        self.fits = DirectionFits(model, self.runs.others, self.runs.seed, side)
        self.profile = profile
        self.kept = np.arange(len(self.table), dtype=np.int64)
        self.known_batches: list[Ints] = []
        """Batches of prompts whose values were all known before the run."""
        self.batches: list[Ints] = []
        """Batches of the other prompts."""
        self.stored = kept and PanelCache.of(kept, panel, self.runs.seed)
        self.values = self.stored
        writer = self.runs.writer
        if writer is not None:  # what they write is kept, and measured again
            self.values = None
            writer.kept = self.stored and self.stored.replies(
                writer.generation.key(self.runs.seed), find_end_tokens(model)
            )
        self.together: dict[str, JointObservation] = {}
        """Observations of all rows at once, by the key of the experiment."""
        self.patched_values: dict[str, PatchedCache] = {}
        """Cached patched values by the key of the experiment, without experiments whose content has
        no key."""
        self.activity: dict[str, FeatureActivity] = {}
        """Rows whose features are inactive, by the key of the experiment."""
        self.errors: dict[str, ReconstructionErrors] = {}
        """Reconstruction errors of bases, by the key of the experiment."""

    @property
    def _sound(self) -> tuple[ExperimentPlan, ...]:
        """Experiments that can still be computed."""
        return tuple(
            plan for plan in self.panel.experiments if get_owner_key(plan) not in self.lost
        )

    def _lose(self, plan: ExperimentPlan, *reasons: Diagnostic) -> None:
        """Record that an experiment, with its controls, can't be computed."""
        self.lost.setdefault(get_owner_key(plan), []).extend(reasons)

    def _lose_not_finite(self, plan: ExperimentPlan, first: UnusableRow, count: int) -> None:
        """Record that an experiment can't be computed, because the model gives NaN or infinity."""
        self._lose(plan, report_not_finite(plan.experiment, first, count, self.runs.model))

    # --- before any cell --------------------------------------------------------------------------

    def prepare(self, check: MeasureCheck) -> None:
        """Filter rows, measure and check the unpatched runs, and compute means for ablations."""
        over_rows = any(
            rule.rule.does.of_all_rows
            for plan in self.panel.derived.values()
            for rule in plan.rules
        )
        if not over_rows:  # accuracies also cover rows that `keep` drops
            self._define_runs()
        unusable = self._apply_keep_conditions()
        if over_rows:
            self._define_runs()
        for plan in self._sound:
            experiment = plan.experiment
            readout, accuracies = self.readouts[experiment.key], self.accuracies[experiment.key]
            measured = MeasuredValues.unmeasured(plan, readout, self.kept, accuracies)
            measured.unusable.update(unusable)
            whole = self.measured.get(get_owner_key(plan))
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
            if plan.experiment.control_of is not None:  # reported for the experiment itself
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
            donors = choose_donors(plan, self.table, self.runs.seed, kept)
            self.means_and_donors[key] = RuleInputs({}, {}, donors, {}, directions[key])
            self.whole_cells[key] = self._whole_cells(plan, kept)
            together = observe_jointly(
                plan, self.runs, self.measured[key], directions[key].systems, self.values
            )
            if together is None:
                self._look_up(plan, kept, donors)
                self._look_up_activity(plan, kept)
            else:
                self.together[key] = together
        due = self._due()
        self.batches = self._batches(due)
        self.known_batches = self._batches(np.setdiff1d(self.kept, due))
        if len(due):
            self._average()

    def _define_runs(self) -> None:
        """Define the panel's runs with rules; means and donors come from the kept rows."""
        if not self.panel.derived:
            return
        plans, batches = self.panel.derived, self._batches(self.kept)
        derived, problems = DerivedRuns.define(plans, self.runs, batches, self.fits)
        for direction in derived.directions.values():
            self.defined.update(direction.lengths)
        for plan in self._sound if problems else ():
            self._lose(plan, *problems)
        if self.stored is not None:
            self.stored.define(plans, self.kept, derived.donors, derived.cells)

    def _directions(self) -> dict[str, FittedDirections]:
        """Return the directions of each experiment's rules; an invalid one loses the experiment."""
        fits = self.fits
        directions: dict[str, FittedDirections] = {}
        for plan in self._sound:
            own, problems = fits.of(plan)
            directions[plan.experiment.key] = own
            self.measured[plan.experiment.key].lengths = {**self.defined, **own.lengths}
            if problems:
                self._lose(plan, *problems)
        self.runs.passes += fits.passes
        return directions

    def _average(self) -> None:
        """Compute the means that rules write, over all rows of their experiments."""
        every = self._batches(self.kept)
        for plan in self.running:
            measured, readout = self.measured[plan.experiment.key], self.readouts
            batches = [numbers for batch in every if len(numbers := measured.among(batch))]
            numbers = self.means_and_donors[plan.experiment.key]
            means, of_texts = compute_means(
                plan, self.runs, batches, readout[plan.experiment.key], numbers.directions
            )
            made = self._made(plan, batches)
            rule_inputs = RuleInputs(means, of_texts, numbers.donors, made, numbers.directions)
            self.means_and_donors[plan.experiment.key] = rule_inputs
        self.running = self._sound

    def _made(
        self, plan: ExperimentPlan, batches: Sequence[Ints]
    ) -> Mapping[tuple[int, int | None], CellVectors]:
        """Return the vectors of rules on whole cells; a failure loses the experiment."""
        key, cells = plan.experiment.key, self.whole_cells[plan.experiment.key]
        if get_owner_key(plan) in self.lost:
            return {}
        try:
            return compute_cell_vectors(plan, cells, self.runs, batches, self.readouts[key])
        except CellFunctionFailed as failed:
            self._lose(plan, report_cell_failure(failed, plan))
            return {}

    def _whole_cells(self, plan: ExperimentPlan, kept: Ints) -> Mapping[int, WholeCells]:
        """Return all rows of each cell for the rules that read whole cells, by rule number."""
        if not any(rule.rule.does.reads == "cell" for rule in plan.rules):
            return {}
        every = plan.rows(kept)
        key = plan.experiment.key
        good = select_readable_rows(
            plan, every, self.means_and_donors[key], self.readouts[key].passes
        )
        return collect_whole_cells(plan, every.take(good))

    def total_rows(self) -> int:
        """Return the number of patched rows of all experiments, including noise draws."""
        every = [*self.known_batches, *self.batches]
        return sum(self._count(plan, batch) for plan in self.running for batch in every)

    def due_rows(self) -> int:
        """Return the number of patched rows, with noise draws, on prompts with rows to run."""
        return sum(self._count(plan, batch) for plan in self.running for batch in self.batches)

    def _count(self, plan: ExperimentPlan, batch: Ints) -> int:
        return plan.count(self.measured[plan.experiment.key].among(batch))

    # --- what is known ----------------------------------------------------------------------------

    def _by_known(self, prompts: Ints, due: Ints) -> list[Ints]:
        """Return the batches of known prompts, then those of due prompts.

        Passes of a resumed run must have the same rows as in the interrupted run.
        """
        return [*self._batches(np.setdiff1d(prompts, due)), *self._batches(due)]

    def _unmeasured(self, prompts: Ints) -> Ints:
        """Return the prompts on which an unpatched run must be measured; all without a cache."""
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
        """Return whether an accuracy must be measured. Shape [prompt]."""
        missing = np.zeros(len(prompts), dtype=np.bool_)
        relative = self.runs.model.rounding
        for accuracies in self.accuracies.values():
            for run, readout in accuracies.readouts() if self.values is not None else ():
                assert self.values is not None
                missing |= ~self.values.unpatched(readout, run, prompts, None, relative)
        return missing

    def _relative(self, plan: ExperimentPlan, run: str) -> float:
        """Return the relative rounding bound of logits: that of the model for base runs, else 0."""
        return self.runs.model.rounding if run == plan.experiment.spec.base else 0.0

    def _look_up(self, plan: ExperimentPlan, kept: Ints, donors: Mapping[int, Ints]) -> None:
        """Look up the cached patched values of an experiment."""
        if self.stored is None or not plan.rules:
            return
        if self.measured[plan.experiment.key].tokens.top:
            said = "its listed tokens are computed from all of its rows"
            self.profile.not_kept[plan.experiment.key] = said
            return
        try:
            cells = self.whole_cells[plan.experiment.key]
            keys = self.stored.keys(plan, kept, donors, cells)
        except TypeError as error:  # a rule or metric from Python depends on values without a key
            self.profile.not_kept[plan.experiment.key] = str(error)
            return
        if self.runs.writer is not None and self.runs.writer.kept is not None:
            self.runs.writer.kept.keys[plan.experiment.key] = keys
        else:
            self.patched_values[plan.experiment.key] = self.stored.patched(keys)
            if plan.watched_sites:
                activity = FeatureActivity(plan, len(self.table), self.stored.activity(keys))
                self.activity[plan.experiment.key] = activity
            if plan.reconstructed:
                activity = ReconstructionErrors.of(plan, len(self.table), self.stored.errors(keys))
                self.errors[plan.experiment.key] = activity

    def _look_up_activity(self, plan: ExperimentPlan, kept: Ints) -> None:
        """Look up the cached activity and reconstruction errors of an experiment's features."""
        key = plan.experiment.key
        if plan.reconstructed and key not in self.errors:
            self.errors[key] = ReconstructionErrors.of(plan, len(self.table), None)
        if not plan.watched_sites:
            return
        unstored = FeatureActivity(plan, len(self.table), None)
        activity = self.activity.setdefault(plan.experiment.key, unstored)
        for batch in self._batches(kept):
            activity.look_up(plan.rows(batch))

    def _decide_activity(self, plan: ExperimentPlan, batch: Ints, lanes_of: RuleReader) -> None:
        """Determine which rows of a batch have inactive features, if that isn't cached."""
        key = plan.experiment.key
        activity = self.activity.get(key)
        if activity is None:
            return
        rows = plan.rows(self.measured[key].among(batch))
        inputs = self.means_and_donors[key]
        good = select_readable_rows(plan, rows, inputs, self.readouts[key].passes)
        rows = rows.take(good)
        activity.look_up(rows.take(np.flatnonzero(activity.is_unknown(rows))), own=True)
        rows = rows.take(np.flatnonzero(activity.is_unknown(rows)))
        if len(rows):
            (start,) = plan.starting_runs
            base = self.runs.lanes(start, batch, None)
            inactive = find_inactive_rows(plan, rows, base, lanes_of, inputs, self.runs.model.shape)
            stored = list(activity.decide(rows, inactive))
            if self.stored is not None:
                self.stored.keep(stored)

    def _without_errors(self, plan: ExperimentPlan, batch: Ints) -> Ints:
        """Return the prompts without cached reconstruction errors of the experiment's bases."""
        errors = self.errors.get(plan.experiment.key)
        prompts = self.measured[plan.experiment.key].among(batch)
        return prompts[:0] if errors is None else prompts[errors.is_unknown(prompts)]

    def _measure_errors(self, plan: ExperimentPlan, batch: Ints) -> None:
        """Measure the reconstruction errors of the bases on a batch that aren't cached."""
        prompts = self._without_errors(plan, batch)
        if not len(prompts):
            return
        key = plan.experiment.key
        (start,) = plan.starting_runs
        base, directions = (
            self.runs.lanes(start, batch, None),
            self.means_and_donors[key].directions,
        )
        stored = list(self.errors[key].measure(prompts, base, directions))
        if self.stored is not None and self.errors[key].cache is not None:
            self.stored.keep(stored)

    def _due(self) -> Ints:
        """Return the prompts on which some row must be run; all if no values are cached."""
        if not any(cache.any_earlier for cache in self.patched_values.values()):
            run = (plan for plan in self.running if plan.experiment.key not in self.together)
            return self.kept if any(plan.rules for plan in run) else self.kept[:0]
        due: list[Ints] = [self.kept[:0]]
        for batch in self._batches(self.kept):
            due += [self.rows_to_run(plan, batch).live.prompt for plan in self.running]
            due += [self._without_errors(plan, batch) for plan in self.running]
        return np.unique(np.concatenate(due))

    def _values(
        self,
        readout: Readout,
        run: str,
        batch: Ints,
        item: int | None,
        relative: float = 0.0,
        skip: Collection[int] = (),
    ) -> ReadoutResult:
        """Return the values of an unpatched run on a batch: cached ones, or new measurements."""
        if self.values is not None:
            result = self.values.own_unpatched(readout, run, batch, item, relative)
            if result is not None:
                return result
        result = self.runs.values(readout, run, batch, item, relative=relative, skip=skip)
        if self.values is not None:
            self.values.measured(readout, run, batch, item, relative, result)
        return result

    def _apply_keep_conditions(self) -> dict[int, UnusableRow]:
        """Drop the rows that a `keep` line excludes: `self.kept` becomes the remaining rows.

        Returns:
            The rows whose condition has no value. With `allow_nan` they are dropped too; otherwise
            the experiments are lost.
        """
        if not self.keep.measures:
            return {}
        good = np.ones(len(self.table), dtype=np.bool_)
        broken = np.zeros(len(self.table), dtype=np.bool_)
        due = self.kept
        if self.values is not None:
            missing = ~self.values.unpatched(self.keep, "clean", self.kept, None, 0.0)
            due = self.kept[missing | self._inaccurate(self.kept)]
        for batch in self._by_known(self.kept, due):
            result = self._values(self.keep, "clean", batch, None)
            broken[batch] = result.broken
            for values in result.values:
                good[batch] &= values != 0
            for accuracies in self.accuracies.values():  # of the rows that are dropped too
                accuracies.measure(self._values, self.runs.model.rounding, batch)
            self._finish_batch()
            self.runs.forget()
            for plan in self.panel.experiments if result.failed or result.gaps else ():
                reasons = explain_missing_values(
                    result, plan.experiment, plan.experiment.keep, "clean", batch
                )
                self._lose(plan, *reasons.values())
            if self.lost:
                return {}
        self.kept = np.flatnonzero(good & ~broken)
        unusable = {int(row): UnusableRow(int(row), "clean") for row in np.flatnonzero(broken)}
        if unusable and not (self.allow_nan and len(self.kept)):
            place = locate_in_run(self.runs, self.keep, next(iter(unusable.values())))
            for plan in self.panel.experiments:
                self._lose_not_finite(plan, place, len(unusable))
        elif not len(self.kept):
            for plan in self.panel.experiments:
                span = plan.experiment.spec.keep[0].span
                self._lose(plan, NoRowsKept(span=span, rows=len(self.table)))
        return unusable

    def _look_at_unusable(self, plan: ExperimentPlan) -> None:
        """Handle rows with NaN or infinity in an unpatched run.

        The experiment can't be computed; with `allow_nan`, the rows are dropped from it and from
        its controls instead.
        """
        measured = self.measured[plan.experiment.key]
        rows = measured.unusable_rows()
        if not rows:
            return
        if self.allow_nan and not rows.issuperset(measured.kept.tolist()):
            measured.leave_out(sorted(rows))
            return
        first = measured.unusable[min(rows)]
        first = locate_in_run(self.runs, self.readouts[plan.experiment.key], first)
        self._lose_not_finite(plan, first, len(rows))

    def _batches(self, prompts: Ints) -> list[Ints]:
        """Split prompts into batches in the order of the table."""
        size = self._batch_size
        return [prompts[i : i + size] for i in range(0, len(prompts), size)]

    @cached_property
    def _batch_size(self) -> int:
        return batch_size(self.panel, self.sizes.prompt_tokens)

    def _finish_batch(self) -> None:
        """Store the values of a batch and free its activations, unless it is the only batch."""
        if self.values is not None:
            self.values.flush()
        if len(self._batches(self.kept)) > 1:
            self.runs.forget()

    def _measure_unpatched(self, plan: ExperimentPlan, batch: Ints) -> None:
        """Measure the base run, the source run and the accuracies of an experiment on a batch."""
        experiment = plan.experiment
        measured = self.measured[experiment.key]
        columns = np.searchsorted(self.kept, batch)
        readout = self.readouts[experiment.key]
        for run in measured.unpatched:
            relative = self._relative(plan, run)
            for number, environment in enumerate(measured.environments):
                result = self._values(readout, run, batch, environment, relative, measured.failed)
                measured.read_unpatched(run, number, columns, result)
                measured.saw(UnusableRow(int(row), run) for row in batch[result.broken])
                reasons = explain_missing_values(
                    result, experiment, experiment.measures, run, batch
                )
                for refused, reason in reasons.items():
                    measured.refused.setdefault(refused, reason)
                measured.failed.update(reasons)
        if not self.keep.measures:
            measured.accuracies.measure(self._values, self.runs.model.rounding, batch)

    def rows_to_run(self, plan: ExperimentPlan, batch: Ints) -> RowSelection:
        """Return which rows of an experiment must be run on a batch."""
        kept = self.measured[plan.experiment.key].among(batch)
        every = plan.rows(kept) if plan.rules else RowTable.none()
        key = plan.experiment.key
        good = select_readable_rows(
            plan, every, self.means_and_donors[key], self.readouts[key].passes
        )
        rows = every.take(good)
        inert = plan.is_inert(rows)
        activity = self.activity.get(key)
        inactive = np.zeros_like(inert)
        if activity is not None:
            inactive = ~inert & activity.is_inactive(rows)
        out = inert | inactive if self.plan.skips_inert else np.zeros_like(inert)
        live, known, values = rows.take(np.flatnonzero(~out)), RowTable.none(), list[Floats]()
        if key in self.together:
            known, values, live = live, self.together[key].of(live), RowTable.none()
        elif key in self.patched_values:
            there, found = self.patched_values[key].earlier(live)
            known, values = live.take(np.flatnonzero(there)), [each[there] for each in found]
            live = live.take(np.flatnonzero(~there))
        return RowSelection(
            live=live,
            known=known,
            values=values,
            left_out=rows.take(np.flatnonzero(out)),
            dropped=len(every) - len(rows),
            inert=int(inert.sum()),
            inactive=rows.cell[inactive],
            changing=rows.cell[~inert & ~inactive],
        )

    def _sorted_and_counted(
        self, plan: ExperimentPlan, batch: Ints, lanes_of: RuleReader
    ) -> RowSelection:
        """Determine feature activity, return which rows of a batch must be run, and count the
        others."""
        self._decide_activity(plan, batch, lanes_of)
        self._measure_errors(plan, batch)
        rows, measured = self.rows_to_run(plan, batch), self.measured[plan.experiment.key]
        if plan.experiment.key in self.activity:
            measured.watch(plan.n_cells, rows.inactive, rows.changing)
        measured.dropped += rows.dropped
        measured.rows += len(rows.live) + len(rows.known) + len(rows.left_out)
        measured.inert += rows.inert
        return rows

    # --- cells ------------------------------------------------------------------------------------

    def run(self) -> Iterator[int]:
        """Run all cells; yields the numbers of finished rows, including noise draws."""
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
            rows: list[RowTable] = []
            for number, plan in enumerate(plans):
                measured = self.measured[plan.experiment.key]
                if get_owner_key(plan) in self.lost:
                    rows.append(RowTable.none())
                    yield self._count(plan, batch)
                    continue
                if not plan.rules:
                    measured.copy_base()
                found = self._sorted_and_counted(plan, batch, patcher.lanes_of(number, batch, None))
                rows.append(found.live)
                if len(found.left_out):
                    values = measured.base_of(plan, found.left_out)
                    measured.wrote_as_base(found.left_out, plan.draws)
                    self._finish(number, found.left_out, values, totals[number])
                if len(found.known):
                    self._finish(number, found.known, found.values, totals[number])
                    together = self.together.get(plan.experiment.key)
                    stored = found.known.cell.tolist()
                    if together is not None:
                        stored = [cell for cell in stored if cell in together.stored]
                    self.profile.known += len(stored)
                yield (found.dropped + len(found.left_out) + len(found.known)) * plan.draws
            for number, plan in enumerate(plans):
                if plan.experiment.spec.estimator is not None:
                    estimated, rows[number] = rows[number], RowTable.none()
                    for own, values in self._estimated(patcher, number, estimated, batch):
                        self._finish(number, own, values, totals[number])
                        yield len(own) * plan.draws
            self.profile.rows += sum(len(one) for one in rows)
            shared = sharer.of(rows)
            self.profile.distinct += len(shared)
            for member, values in self._patched(patcher, shared, batch, rows):
                self._finish(member.number, member.rows, values, totals[member.number])
                yield len(member.rows) * plans[member.number].draws
            self._finish_batch()
        for plan, sums_and_counts in zip(plans, totals, strict=True):
            if plan.rules:
                self._average_draws(plan, sums_and_counts)
            measured = self.measured[plan.experiment.key]
            if plan.experiment.key in self.errors:
                measured.errors = self.errors[plan.experiment.key].mean(measured.kept)
        self.runs.forget()
        self._drop_unusable()

    def _average_draws(
        self, plan: ExperimentPlan, sums_and_counts: Sequence[tuple[Floats, Floats]]
    ) -> None:
        """Set the patched values of each measure to their means over draws; NaN without any."""
        measured = self.measured[plan.experiment.key]
        for values, (sums, counts) in zip(measured.patched, sums_and_counts, strict=True):
            with np.errstate(invalid="ignore"):
                values[:] = np.where(counts > 0, sums / counts, np.nan)
        measured.empty_gaps()

    def _drop_unusable(self) -> None:
        """Drop rows with NaN or infinity in some cell from all cells of the experiment and its
        controls."""
        rows: dict[str, set[int]] = {}
        for plan in self.running:
            unusable_rows = self.measured[plan.experiment.key].unusable
            rows.setdefault(get_owner_key(plan), set()).update(unusable_rows)
        for plan in self._sound:
            measured = self.measured[plan.experiment.key]
            out = rows[get_owner_key(plan)] & set(measured.kept.tolist())
            if out and len(out) == len(measured.kept):
                first = next(iter(measured.unusable.values()))
                self._lose_not_finite(plan, first, len(out))
            elif out:
                measured.leave_out(sorted(out))
                measured.tokens.forget()
            measured.listed.update(measured.tokens.listed())
            measured.tokens.forget()

    def _saw_unusable(
        self,
        patcher: Patcher,
        shared: SharedRows,
        chosen: Ints,
        batch: Ints,
        run: PromptRun,
        member: PassMember,
        broken: Bools,
    ) -> None:
        """Record rows with NaN or infinity; without `allow_nan`, the experiment is lost."""
        plan = self.running[member.number]
        measured = self.measured[plan.experiment.key]
        seen = [self._row_of(member, row) for row in np.flatnonzero(broken).tolist()]
        measured.saw(seen)
        if self.allow_nan or get_owner_key(plan) in self.lost:
            return
        row = int(chosen[member.at[int(broken.argmax())]])
        place = locate_in_cell(patcher, shared, row, run, batch, seen[0])
        self._lose_not_finite(plan, place, 1)

    def _saw_no_value(self, member: PassMember, result: ReadoutResult) -> None:
        """Record measures that can't be computed in rows of a pass, and cells without a value."""
        plan = self.running[member.number]
        measured = self.measured[plan.experiment.key]
        for number, failed in result.failed.items():
            seen = self._row_of(member, failed.row or 0)
            measured.refused.setdefault(
                number, report_function_failure(failed, plan.experiment, seen)
            )
            measured.failed.add(number)
        none_left = len(measured.refused) == len(plan.experiment.measures)
        if none_left and get_owner_key(plan) not in self.lost:
            self._lose(plan, *measured.refused.values())
        for number, gap in result.gaps.items():
            for row in gap.rows.tolist():
                cell = int(member.rows.cell[row])
                measured.lacks(number, cell, self._row_of(member, row), gap.reason)

    def _row_of(self, member: PassMember, row: int) -> UnusableRow:
        """Return the prompt, run and cell of a row, for a message."""
        plan, rows = self.running[member.number], member.rows
        words = describe_cell(plan, int(rows.cell[row]))
        return UnusableRow(int(rows.prompt[row]), plan.experiment.spec.base, words)

    def _patcher(self) -> Patcher:
        plans = self.running
        means_and_donors = [self.means_and_donors[plan.experiment.key] for plan in plans]
        readouts = [self.readouts[plan.experiment.key] for plan in plans]
        skip = [self.measured[plan.experiment.key].failed for plan in plans]
        return Patcher(self.plan, plans, readouts, means_and_donors, self.runs, skip)

    def _sharer(self) -> RowSharer:
        keys = [plan.experiment.key for plan in self.running]
        cells = [self.whole_cells[key] for key in keys]
        kept = [self.measured[key].kept for key in keys]
        return RowSharer(self.running, share=self.plan.shares_rows, cells=cells, kept=kept)

    def _finish(
        self,
        number: int,
        rows: RowTable,
        values: Sequence[Floats],
        totals: Sequence[tuple[Floats, Floats]],
    ) -> None:
        """Add the values of rows to the sums and counts of their cells."""
        measured = self.measured[self.running[number].experiment.key]
        columns = np.searchsorted(measured.kept, rows.prompt)
        for (sums, counts), value in zip(totals, values, strict=True):
            np.add.at(sums, (rows.cell, columns), value)
            np.add.at(counts, (rows.cell, columns), 1)

    # --- the size of a pass ---------------------------------------------------------------------

    def measure_sizes(self) -> None:
        """Choose the size of a pass by trials on the first batch, if there are enough rows to run.

        The values of the trials are discarded.
        """
        enough = MIN_TRIAL_PASSES * self.sizes.pass_tokens
        if self.runs.writer is not None:  # its passes are laid out by the tokens of replies
            return
        if not self.batches or self.due_rows() * longest_prompt(self.panel) < enough:
            return
        plans, batch, patcher = self.running, self.batches[0], self._patcher()
        for number, plan in enumerate(plans):
            self._decide_activity(plan, batch, patcher.lanes_of(number, batch, None))
        live = [self.rows_to_run(plan, batch).live for plan in plans]
        run = [plan.experiment.spec.estimator is None for plan in plans]
        shared = self._sharer().of(
            [
                row_table if cells else RowTable.none()
                for row_table, cells in zip(live, run, strict=True)
            ]
        )
        shortcuts = self.runs.shortcuts
        widths, work = compute_row_widths(shared, shortcuts, plans)
        if int(widths.sum()) * len(self.batches) < enough:
            return
        run, group = max(
            group_rows(shared, self.plan, plans, widths, packs=shortcuts is not None),
            key=lambda each: int(widths[each[1]].sum()),
        )

        def one_pass(chosen: Ints) -> None:
            list(patcher.values(shared, chosen, list_members(shared, chosen), run, batch))

        self.sizes.measure(build_size_trial(one_pass, group, widths, work))
        self._finish_batch()

    # --- passes -----------------------------------------------------------------------------------

    def _patched(
        self, patcher: Patcher, shared: SharedRows, batch: Ints, rows_of: Sequence[RowTable]
    ) -> Iterator[tuple[PassMember, list[Floats]]]:
        """Run all distinct rows in passes of the chosen size; yields members with their values.

        Args:
            patcher: Runner of the passes.
            shared: The distinct rows.
            batch: The prompts.
            rows_of: All rows of each experiment.
        """
        shortcuts, plans = self.runs.shortcuts, self.running
        widths, _ = compute_row_widths(shared, shortcuts, plans)
        packs = shortcuts is not None
        for run, group in group_rows(shared, self.plan, plans, widths, packs=packs):
            replies = self._group_replies(patcher, shared, group, run, batch)
            begin = 0
            while begin < len(group):
                ends = np.cumsum(widths[group[begin:]])
                count = max(1, int(np.searchsorted(ends, self.sizes.pass_tokens, side="right")))
                chosen = group[begin : begin + count]
                tokens = int(widths[chosen].sum())
                values = self._own(shared, chosen)
                if values is not None:
                    self.profile.resumed += sum(len(member.rows) for member, _ in values)
                    yield from values
                    begin += count
                    continue
                try:
                    with measure_seconds() as seconds:
                        passed = self._pass(patcher, shared, chosen, run, batch, replies)
                except (RuntimeError, MemoryError) as error:
                    if len(chosen) == 1 or not is_out_of_memory(error) or not self.sizes.halve():
                        raise
                    self.profile.halved += 1
                    continue
                self.profile.passed(tokens, seconds[0])
                self._store_pass([(member, result) for _, member, result in passed])
                for rows, member, result in passed:
                    if result.broken.any():
                        self._saw_unusable(patcher, shared, rows, batch, run, member, result.broken)
                    self._saw_no_value(member, result)
                    if result.listed is not None:
                        tokens = self.measured[self.running[member.number].experiment.key].tokens
                        tokens.add(member.rows, rows_of[member.number], result.listed)
                    measured = self.measured[self.running[member.number].experiment.key]
                    measured.wrote(member.rows, result.replies)
                    yield member, result.values
                begin += count

    def _estimated(
        self, patcher: Patcher, number: int, rows: RowTable, batch: Ints
    ) -> Iterator[tuple[RowTable, list[Floats]]]:
        """Estimate the effects of rows; yields rows with their values, some prompts at a time.

        The activations that backward passes need, of all blocks, limit the number of prompts.
        """
        plan, key = self.running[number], self.running[number].experiment.key
        if not len(rows):
            return
        self.profile.estimated += len(rows)
        given = self.readouts[key], self.means_and_donors[key], self.runs
        estimates = GradientEstimates(plan, *given, patcher.lanes_of(number, batch, None), batch)
        due, n_layers = np.unique(rows.prompt), self.runs.model.shape.n_layers
        while len(due):
            most = max(1, self.sizes.pass_tokens // n_layers)
            prompts, tokens = estimates.first(due, most)
            row_table = rows.take(np.flatnonzero(np.isin(rows.prompt, prompts)))
            member = PassMember(number, row_table, np.arange(len(row_table)))
            kept = self.patched_values.get(key)
            known = kept.own(row_table) if kept is not None and kept.any_own else None
            if known is not None:
                self.profile.resumed += len(row_table)
                yield row_table, known
                due = due[len(prompts) :]
                continue
            is_long = tokens * n_layers > self.sizes.limit
            estimates.recompute(is_long)
            try:
                with measure_seconds() as seconds:
                    result = estimates.of(row_table, self.measured[key].base_of(plan, row_table))
            except (RuntimeError, MemoryError) as error:
                if len(prompts) == 1 or not is_out_of_memory(error) or not self.sizes.halve():
                    raise
                self.profile.halved += 1
                continue
            except AutogradFailed as refused:
                self._lose(plan, _report_autograd_failure(plan, refused))
                return
            if is_long:
                self.measured[key].recomputed.update(prompts.tolist())
            self.profile.passed(tokens, seconds[0])
            self._store_pass([(member, result)])
            self._saw_no_value(member, result)
            yield row_table, result.values
            due = due[len(prompts) :]

    def _own(
        self, shared: SharedRows, chosen: Ints
    ) -> list[tuple[PassMember, list[Floats]]] | None:
        """Return the values of a pass if this run computed it before it was interrupted."""
        if not any(cache.any_own for cache in self.patched_values.values()):
            return None
        read: list[tuple[PassMember, list[Floats]]] = []
        for member in list_members(shared, chosen):
            plan = self.running[member.number]
            if get_owner_key(plan) in self.lost:
                continue
            values = self.patched_values.get(plan.experiment.key)
            found = None if values is None else values.own(member.rows)
            if found is None:
                return None
            read.append((member, found))
        return read

    def _store_pass(self, passed: Sequence[tuple[PassMember, ReadoutResult]]) -> None:
        """Store the values of a pass in the cache."""
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
        run: PromptRun,
        batch: Ints,
        replies: GroupGenerator | None,
    ) -> list[tuple[Ints, PassMember, ReadoutResult]]:
        """Run one pass over the chosen distinct rows, without rows of lost experiments.

        Returns:
            For each member: the distinct rows that were run, the member, and its values.
        """
        used = self._used(shared, chosen)
        if not len(used):
            return []
        members = self._members(shared, used)
        written = () if replies is None else replies.of(used)
        every = patcher.values(shared, used, members, run, batch, written)
        return [(used, member, result) for member, result in every]

    def _members(self, shared: SharedRows, chosen: Ints) -> list[PassMember]:
        """Return the members of the chosen distinct rows whose experiments aren't lost."""
        lost = [get_owner_key(plan) in self.lost for plan in self.running]
        return [member for member in list_members(shared, chosen) if not lost[member.number]]

    def _used(self, shared: SharedRows, chosen: Ints) -> Ints:
        """Return the chosen distinct rows that a member of `_members` has."""
        at = [member.at for member in self._members(shared, chosen)]
        return chosen[np.unique(np.concatenate(at))] if at else chosen[:0]

    def _group_replies(
        self, patcher: Patcher, shared: SharedRows, group: Ints, run: PromptRun, batch: Ints
    ) -> GroupGenerator | None:
        """Return the generator of completions for a group of rows; None without `generate`."""
        writer, model = self.runs.writer, self.runs.model
        if writer is None:
            return None
        return GroupGenerator(
            lambda chosen: patcher.written(shared, chosen, run, batch),
            partial(self._used, shared),
            group,
            np.array([plan.draws for plan in self.running])[shared.owner]
            * writer.generation.samples,
            estimate_reply_bytes(shared, self.running, model.dtype.itemsize, model.shape),
            self.sizes,
        )


def _report_autograd_failure(plan: ExperimentPlan, failed: AutogradFailed) -> NoEstimate:
    """Return the diagnostic for an estimate whose gradients can't be computed on the model."""
    estimator = plan.experiment.spec.estimator
    assert estimator is not None
    known = isinstance(failed, RuleNotApplied)
    cause = "its rules don't cover" if known else "autograd can't follow"
    return NoEstimate(
        span=estimator.span,
        statement=f"using {estimator.name}",
        what=f"cells of `{plan.experiment.name}`",
        reason=f"{cause} `{plan.experiment.model.name}` ({str(failed)[:200]})",
        hint="remove `using`, so that each cell is run",
    )


@dataclass
class Execution:
    """Result of running a plan: measured values, and the experiments that could not be computed."""

    measured: dict[str, MeasuredValues] = field(default_factory=dict[str, MeasuredValues])
    lost: dict[str, list[Diagnostic]] = field(default_factory=dict[str, list[Diagnostic]])
    """Experiments that could not be computed → reasons; their controls aren't listed separately."""
    profile: ExecutionProfile = field(default_factory=ExecutionProfile)

    @property
    def diagnostics(self) -> list[Diagnostic]:
        """Reasons why experiments, measures or cells could not be computed, without duplicates."""
        parts = [d for values in self.measured.values() for d in values.refused.values()]
        whole = [d for problems in self.lost.values() for d in problems]
        own = [values for values in self.measured.values() if values.experiment.control_of is None]
        cells = [d for values in own for d in report_missing_cells(values)]
        return list(dict.fromkeys([*whole, *parts, *cells]))


def choose_pass_sizes(
    experiments: Iterable[ResolvedExperiment],
    models: Mapping[str, LoadedModel],
    options: ExecutionOptions,
) -> PassSizer:
    """Return the initial pass sizes of a run, before any trial."""
    uses = [
        (models[name], experiment.table) for experiment in experiments for name in experiment.models
    ]
    return PassSizer.of(options.pass_tokens, options.prompt_tokens, uses)


def execute(
    plan: Plan,
    models: Mapping[str, LoadedModel],
    options: ExecutionOptions | None = None,
    kept: RunCache | None = None,
    sizes: PassSizer | None = None,
    *,
    check: MeasureCheck,
) -> Execution:
    """Run every panel.

    All `keep` conditions and checks are evaluated before any cell runs. An experiment or a measure
    that can't be computed doesn't affect others. The models have no hooks afterwards, also if one
    of them raises an exception.

    Args:
        plan: The plan of a file.
        models: Name in the file → loaded model.
        options: Options of the run.
        kept: Cache of values; None: none.
        sizes: Pass sizes of the enclosing run; chosen here if they aren't settled.
        check: Finds measures that can't be computed from the values of unpatched runs.

    Codes: E0223, E0613, E0621, E0631, W0762 and those of `check`.
    """
    options = options or ExecutionOptions()
    if sizes is None:
        experiments = [
            experiment.experiment for panel in plan.panels for experiment in panel.experiments
        ]
        sizes = choose_pass_sizes(experiments, models, options)
    execution = Execution()
    if kept is not None:
        kept.settle(sizes)  # batches of prompts depend on them too
    runners = _prepare_runners(plan, models, options, sizes, execution, kept, check)
    if runners and not sizes.settled:
        max(runners, key=lambda runner: runner.due_rows()).measure_sizes()
    sizes.settled = True
    if kept is not None:
        kept.settle(sizes)
    total = sum(runner.total_rows() for runner in runners)
    done = 0
    for runner in runners:
        for count in runner.run():
            done += count
            if options.on_progress is not None:
                options.on_progress(done, total)
        execution.profile.unpatched_passes += runner.runs.passes
        execution.lost.update(runner.lost)
    return execution


def _prepare_runners(
    plan: Plan,
    models: Mapping[str, LoadedModel],
    options: ExecutionOptions,
    sizes: PassSizer,
    execution: Execution,
    kept: RunCache | None,
    check: MeasureCheck,
) -> list[PanelRunner]:
    """Create the runners of all panels and compute their unpatched runs."""
    runners: list[PanelRunner] = []
    for panel in plan.panels:
        make = partial(
            PanelRunner,
            panel,
            models[panel.model],
            plan,
            options.side,
            sizes,
            execution.profile,
            kept,
            allow_nan=options.allow_nan,
            others={name: models[name] for name in panel.models[1:]},
        )
        with measure_seconds() as seconds:
            runner = _prepare_runner(make, check)
        execution.profile.unpatched_seconds += seconds[0]
        execution.measured.update(runner.measured)
        runners.append(runner)
    return runners


def _prepare_runner(make: Callable[[], PanelRunner], check: MeasureCheck) -> PanelRunner:
    """Create a runner and compute its unpatched runs, with smaller batches if memory runs out."""
    while True:
        runner = make()
        try:
            runner.prepare(check)
            return runner
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not runner.sizes.reduce_batches(runner.panel):
                raise
            runner.profile.halved += 1
        del runner  # and what it has computed, while the exception no longer refers to it
        release_memory()
