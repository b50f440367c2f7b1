"""Runs a plan: panels of experiments on the same prompts, prompt batch by prompt batch.

The plain executor and the planned one are this code with plan passes off or on: whole passes over
the rows of one cell, or passes over what changes in the rows of many cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e06_experiment import NothingKept
from mechdsl.execute.means_and_donors import MeansAndDonors, means_and_donors_of
from mechdsl.execute.measured_values import MeasuredValues, Sink
from mechdsl.execute.pass_size import WORTH_MEASURING, Sizes, out_of_memory, release, stopwatch
from mechdsl.execute.patched_rows import Member, Patcher
from mechdsl.execute.profile import Profile
from mechdsl.execute.readout import Readout
from mechdsl.execute.row_groups import extent, groups, members_of
from mechdsl.execute.unpatched_batch import Side
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.execute.writes import readable
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.plan.plan import BATCH_ROWS, ExperimentPlan, Panel, Plan
from mechdsl.plan.rule_rows import Rows
from mechdsl.plan.share import SharedRows, Sharer
from mechdsl.program.python_files import PythonFailure
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.resolve.resolved import ResolvedExperiment

FULL_SHARE = 0.7
"""Of its size, what a pass must hold to tell how fast that size is."""

Progress = Callable[[int, int], None]
"""(rows done, rows in all)."""

Check = Callable[[MeasuredValues], list[Diagnostic]]
"""What is wrong with an experiment by its unpatched runs, before a cell is run."""


@dataclass(frozen=True)
class Options:
    """How an execution goes about it; results don't depend on it but for their last bits."""

    side: Side = "left"
    """Prompts end in one column then, so that writes near the end need few columns."""
    on_progress: Progress | None = None
    pass_tokens: int | None = None
    """Most tokens of one pass over patched rows; chosen by device, free memory and measuring where
    none are given."""
    prompt_tokens: int | None = None
    """Most tokens of one batch of unpatched prompts; fewer than usual where memory is short and
    neither is given."""


@dataclass
class Execution:
    """What a run of a plan left: values, and why it didn't go on."""

    measured: dict[str, MeasuredValues] = field(default_factory=dict[str, MeasuredValues])
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])
    profile: Profile = field(default_factory=Profile)


def sizes_of(
    experiments: Iterable[ResolvedExperiment],
    models: Mapping[str, LoadedModel],
    options: Options,
) -> Sizes:
    """What a run of these experiments is laid out by, before anything is measured."""
    uses = [(models[name], each.table) for each in experiments for name in each.models]
    return Sizes.of(options.pass_tokens, options.prompt_tokens, uses)


def execute(
    plan: Plan,
    models: Mapping[str, LoadedModel],
    options: Options | None = None,
    sink: Sink | None = None,
    sizes: Sizes | None = None,
    *,
    check: Check,
) -> Execution:
    """Run every panel. `keep` and what `check` looks at are checked for all before any cell runs.

    sizes: of the run that this is a part of; they are settled here if they aren't yet.
    Codes: E0223, E0613 and those of `check`. Raises what the model raises; it is left without hooks
    in any case.
    """
    options = options or Options()
    if sizes is None:
        experiments = [each.experiment for panel in plan.panels for each in panel.experiments]
        sizes = sizes_of(experiments, models, options)
    execution = Execution()
    runners = _prepared(plan, models, options, sizes, execution, sink, check)
    if has_errors(execution.diagnostics):
        return execution
    if sink is not None:
        for measured in execution.measured.values():
            sink.unpatched(measured)
    if runners and not sizes.settled:
        max(runners, key=lambda runner: runner.total_rows()).measure_sizes()
    sizes.settled = True
    total = sum(runner.total_rows() for runner in runners)
    done = 0
    for runner in runners:
        for count in runner.run():
            done += count
            if options.on_progress is not None:
                options.on_progress(done, total)
        execution.profile.unpatched_passes += runner.runs.passes
    return execution


def refused(
    plan: Plan,
    models: Mapping[str, LoadedModel],
    options: Options,
    sizes: Sizes,
    *,
    check: Check,
) -> list[Diagnostic]:
    """What `execute` would refuse after the unpatched runs, for experiments that run later."""
    execution = Execution()
    _prepared(plan, models, options, sizes, execution, None, check)
    return execution.diagnostics


def _prepared(
    plan: Plan,
    models: Mapping[str, LoadedModel],
    options: Options,
    sizes: Sizes,
    execution: Execution,
    sink: Sink | None,
    check: Check,
) -> list[PanelRunner]:
    """Runners whose unpatched runs are done; what is wrong with them is in the execution."""
    runners = [
        PanelRunner(
            panel,
            models[panel.model],
            plan,
            options.side,
            sizes,
            execution.profile,
            sink,
            others={name: models[name] for name in panel.models[1:]},
        )
        for panel in plan.panels
    ]
    for runner in runners:
        with stopwatch(runner.runs.model.device) as seconds:
            try:
                execution.diagnostics.extend(runner.prepare(check))
            except PythonFailure as failure:  # on an unpatched run: no cell was run
                execution.diagnostics.append(failure.diagnostic)
        execution.profile.unpatched_seconds += seconds[0]
        execution.measured.update(runner.measured)
    return runners


@dataclass(frozen=True)
class _SortedOut:
    """The rows of an experiment on a batch of prompts."""

    live: Rows
    left_out: Rows
    """Those that aren't run, as they can't differ from the base run."""
    dropped: int
    """How many have no donor."""
    inert: int
    """How many can't differ, left out or not."""


class PanelRunner:
    """Runs the experiments of one panel on shared unpatched runs."""

    def __init__(
        self,
        panel: Panel,
        model: LoadedModel,
        plan: Plan,
        side: Side,
        sizes: Sizes,
        profile: Profile,
        sink: Sink | None = None,
        *,
        others: Mapping[str, LoadedModel] | None = None,
    ) -> None:
        self.panel = panel
        self.plan = plan
        self.sizes = sizes
        self.sink = sink
        self.table: PromptTable = panel.table
        self.measured: dict[str, MeasuredValues] = {}
        self.means_and_donors: dict[str, MeansAndDonors] = {}
        self.readouts = {
            p.experiment.key: Readout.of(p.experiment.measures) for p in panel.experiments
        }
        self.keep = Readout.of(panel.experiments[0].experiment.keep)
        readouts = (*self.readouts.values(), self.keep)
        self.runs = UnpatchedRuns(panel, model, readouts, plan=plan, side=side, others=others)
        self.profile = profile
        self.kept = np.arange(len(self.table), dtype=np.int64)
        self.batches: list[Ints] = []

    # --- before any cell --------------------------------------------------------------------------

    def prepare(self, check: Check) -> list[Diagnostic]:
        """Filter rows, measure and check the unpatched runs, average ablations."""
        diagnostics = self._keep()
        if diagnostics:
            return diagnostics
        self.batches = self._batches(self.kept)
        for plan in self.panel.experiments:
            experiment = plan.experiment
            readout = self.readouts[experiment.key]
            self.measured[experiment.key] = MeasuredValues.unmeasured(plan, readout, self.kept)
        for batch in self.batches:
            for plan in self.panel.experiments:
                self._measure_unpatched(plan, batch)
            self._forget()
        for plan in self.panel.experiments:
            if plan.experiment.control_of is None:  # else it has been said of that one
                diagnostics.extend(check(self.measured[plan.experiment.key]))
        if not has_errors(diagnostics):
            for plan in self.panel.experiments:
                self.means_and_donors[plan.experiment.key] = means_and_donors_of(
                    plan, self.runs, self.kept, self.batches
                )
        return diagnostics

    def total_rows(self) -> int:
        """Patched rows of all experiments, draws included."""
        return sum(plan.count(batch) for plan in self.panel.experiments for batch in self.batches)

    def _keep(self) -> list[Diagnostic]:
        if not self.keep.measures:
            return []
        good = np.ones(len(self.table), dtype=np.bool_)
        for batch in self._batches(self.kept):
            for values in self.runs.values(self.keep, "clean", batch, None):
                good[batch] &= values != 0
            self.runs.forget()
        self.kept = np.flatnonzero(good)
        if len(self.kept):
            return []
        spec = self.panel.experiments[0].experiment.spec
        return [NothingKept(span=spec.keep[0].span, rows=len(self.table))]

    def _batches(self, prompts: Ints) -> list[Ints]:
        """Prompts in groups of similar size in tokens, in the order of the table."""
        draws = max((r.noise.samples for r in self.table.runs.values() if r.noise), default=1)
        cells = sum(each.n_cells for each in self.panel.experiments)
        tokens = self.sizes.prompt_tokens // (self._longest() * draws)
        size = max(1, min(tokens, BATCH_ROWS // max(1, cells)))
        return [prompts[i : i + size] for i in range(0, len(prompts), size)]

    def _longest(self) -> int:
        """Tokens of the longest prompt in any run."""
        return max(
            (len(row.ids) for run in self.table.runs.values() for row in run.rows), default=1
        )

    def _forget(self) -> None:
        """Free what the finished batch computed; with a single batch it serves all stages."""
        if len(self.batches) > 1:
            self.runs.forget()

    def _measure_unpatched(self, plan: ExperimentPlan, batch: Ints) -> None:
        """Base, source and accuracies of one experiment on one batch."""
        experiment = plan.experiment
        measured = self.measured[experiment.key]
        columns = np.searchsorted(self.kept, batch)
        for run, values in measured.unpatched.items():
            for number, environment in enumerate(measured.environments):
                found = self.runs.values(self.readouts[experiment.key], run, batch, environment)
                for measure, value in zip(values, found, strict=True):
                    measure[number, columns] = value
        for run, correct in experiment.accuracies.items():
            readout = Readout.of([correct])
            measured.accuracy[run][columns] = self.runs.values(readout, run, batch, None)[0]

    # --- cells ------------------------------------------------------------------------------------

    def run(self) -> Iterator[int]:
        """Run all cells; yields how many rows, draws included, have been finished."""
        plans = self.panel.experiments
        totals = [
            [
                (np.zeros(values.shape), np.zeros(values.shape))
                for values in self.measured[plan.experiment.key].patched
            ]
            for plan in plans
        ]
        patcher, sharer = self._patcher(), self._sharer()
        for batch in self.batches:
            rows: list[Rows] = []
            for number, plan in enumerate(plans):
                measured = self.measured[plan.experiment.key]
                if not plan.rules:
                    measured.copy_base()
                found = self._sorted_out(plan, batch)
                measured.dropped += found.dropped
                measured.rows += len(found.live) + len(found.left_out)
                measured.inert += found.inert
                rows.append(found.live)
                if len(found.left_out):
                    values = measured.base_of(plan, found.left_out)
                    self._finish(number, found.left_out, values, totals[number])
                yield (found.dropped + len(found.left_out)) * plan.draws
            shared = sharer.of(rows)
            self.profile.rows += sum(len(one) for one in rows)
            self.profile.distinct += len(shared)
            for member, values in self._patched(patcher, shared, batch):
                plan = plans[member.number]
                self._finish(member.number, member.rows, values, totals[member.number])
                yield len(member.rows) * plan.draws
            self._forget()
        for plan, sums_and_counts in zip(plans, totals, strict=True):
            if plan.rules:
                patched = self.measured[plan.experiment.key].patched
                for found, (sums, counts) in zip(patched, sums_and_counts, strict=True):
                    with np.errstate(invalid="ignore"):
                        found[:] = np.where(counts > 0, sums / counts, np.nan)
        self.runs.forget()

    def _patcher(self) -> Patcher:
        plans = self.panel.experiments
        means_and_donors = [self.means_and_donors[plan.experiment.key] for plan in plans]
        readouts = [self.readouts[plan.experiment.key] for plan in plans]
        return Patcher(self.plan, plans, readouts, means_and_donors, self.runs)

    def _sharer(self) -> Sharer:
        return Sharer(self.panel.experiments, share=self.plan.shares_rows)

    def _sorted_out(self, plan: ExperimentPlan, batch: Ints) -> _SortedOut:
        """Which rows of an experiment have to be run."""
        every = plan.rows(batch) if plan.rules else Rows.none()
        good = readable(plan, every, self.means_and_donors[plan.experiment.key])
        rows = every.take(good)
        inert = plan.is_inert(rows)
        out = inert if self.plan.skips_inert else np.zeros_like(inert)
        return _SortedOut(
            live=rows.take(np.flatnonzero(~out)),
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
        """Add values of rows to their cells, and hand them on."""
        columns = np.searchsorted(self.kept, rows.prompt)
        for (sums, counts), value in zip(totals, values, strict=True):
            np.add.at(sums, (rows.cell, columns), value)
            np.add.at(counts, (rows.cell, columns), 1)
        if self.sink is not None:
            experiment = self.panel.experiments[number].experiment
            self.sink.rows(self.measured[experiment.key], rows, values)

    # --- the size of a pass ---------------------------------------------------------------------

    def measure_sizes(self) -> None:
        """Settle the size of a pass by trying some on rows of the first batch, where there is
        enough to run. Their values are thrown away."""
        enough = WORTH_MEASURING * self.sizes.pass_tokens
        if self.total_rows() * self._longest() < enough:
            return
        plans, batch = self.panel.experiments, self.batches[0]
        shared = self._sharer().of([self._sorted_out(plan, batch).live for plan in plans])
        widths, work = extent(shared, self.runs.shortcuts, plans)
        if int(widths.sum()) * len(self.batches) < enough:
            return
        run, group = max(
            groups(shared, self.plan, plans, widths), key=lambda each: int(widths[each[1]].sum())
        )
        group = group[len(group) // 2 :]  # by width: the first ones are the narrowest
        ends = np.cumsum(widths[group])
        patcher = self._patcher()

        def rate(tokens: int) -> float:
            """Work per second of a pass of this size, the better of two."""
            chosen = group[: int(np.searchsorted(ends, tokens, side="right"))]
            if int(widths[chosen].sum()) < FULL_SHARE * tokens:
                return 0.0
            members = members_of(shared, chosen)
            took: list[float] = []
            try:
                for _ in range(2):
                    with stopwatch(self.runs.model.device) as seconds:
                        list(patcher.values(shared, chosen, members, run, batch))
                    took += seconds
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                release()
                return 0.0
            return float(work[chosen].sum()) / max(min(took), 1e-9)

        self.sizes.measure(rate)
        self._forget()

    # --- passes -----------------------------------------------------------------------------------

    def _patched(
        self, patcher: Patcher, shared: SharedRows, batch: Ints
    ) -> Iterator[tuple[Member, list[Floats]]]:
        """All distinct rows in passes of a good size, with the values of their members."""
        widths, _ = extent(shared, self.runs.shortcuts, self.panel.experiments)
        for run, group in groups(shared, self.plan, self.panel.experiments, widths):
            begin = 0
            while begin < len(group):
                ends = np.cumsum(widths[group[begin:]])
                count = max(1, int(np.searchsorted(ends, self.sizes.pass_tokens, side="right")))
                chosen = group[begin : begin + count]
                members = members_of(shared, chosen)
                tokens = int(widths[chosen].sum())
                try:
                    with stopwatch(self.runs.model.device) as seconds:
                        found = list(patcher.values(shared, chosen, members, run, batch))
                except (RuntimeError, MemoryError) as error:
                    if len(chosen) == 1 or not out_of_memory(error) or not self.sizes.halve():
                        raise
                    self.profile.halved += 1
                    continue
                self.profile.passed(tokens, seconds[0])
                yield from found
                begin += count
