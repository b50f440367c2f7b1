"""Runs a plan: panels of experiments on the same prompts, prompt batch by prompt batch.

The plain executor and the planned one are this code with plan passes off or on: whole passes over
the rows of one cell, or passes over what changes in the rows of many cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e06_experiment import NothingKept
from mechdsl.execute.means_and_donors import Fillings, fillings_of
from mechdsl.execute.measuring import Gauge
from mechdsl.execute.pass_size import (
    KEPT_SHARE,
    PassSize,
    bytes_per_token,
    free_memory,
    kept_bytes,
    out_of_memory,
    stopwatch,
)
from mechdsl.execute.patched_rows import Member, Patcher
from mechdsl.execute.profile import Profile
from mechdsl.execute.row_groups import extent, groups, members_of
from mechdsl.execute.unpatched_batch import Side
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.execute.writes import readable
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.plan.plan import BATCH_ROWS, INERT, PROMPT_TOKENS, SHARE, ExperimentPlan, Panel, Plan
from mechdsl.plan.rules import Rows
from mechdsl.plan.share import SharedRows, Sharer
from mechdsl.program.python_files import PythonFailure
from mechdsl.prompts.table import PromptTable
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.statistics.cells import check_denominator
from mechdsl.vocab.effects import EFFECTS

Progress = Callable[[int, int], None]
"""(rows done, rows in all)."""


@dataclass
class Measured:
    """The values of one experiment, filled as batches finish."""

    experiment: ResolvedExperiment
    kept: Ints
    """Rows of the table that are in the experiment."""
    patched: list[Floats]
    """Per measure, [cell, kept row]; NaN where the row isn't part of the cell."""
    unpatched: dict[str, list[Floats]]
    """Run → per measure, [environment, kept row]."""
    accuracy: dict[str, Floats]
    environments: tuple[int | None, ...]
    dropped: int = 0
    """Rows of cells that a `resample` donor without the position took out."""
    rows: int = 0
    """Rows of cells, run or not."""
    inert: int = 0
    """Of these, the ones that can't differ from the base run by structure."""


class Sink(Protocol):
    """Takes values as they are finished, to keep them."""

    def unpatched(self, measured: Measured) -> None:
        """Base and source runs of an experiment, before its cells."""
        ...

    def rows(self, measured: Measured, rows: Rows, values: Sequence[Floats]) -> None:
        """The rows of one pass with their values per measure."""
        ...


@dataclass(frozen=True)
class Options:
    """How an execution goes about it; results don't depend on it."""

    side: Side = "left"
    """Prompts end in one column then, so that writes near the end need few columns."""
    on_progress: Progress | None = None
    row_tokens: int | None = None
    """Tokens of one pass over patched rows; found by measuring where none are given."""
    prompt_tokens: int = PROMPT_TOKENS


@dataclass
class Execution:
    """What a run of a plan left: values, and why it didn't go on."""

    measured: dict[str, Measured] = field(default_factory=dict[str, Measured])
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])
    profile: Profile = field(default_factory=Profile)


def execute(
    plan: Plan,
    models: Mapping[str, LoadedModel],
    options: Options | None = None,
    sink: Sink | None = None,
) -> Execution:
    """Run every panel. Denominators and `keep` are checked for all before any cell runs.

    Codes: E0223, E0604, E0613. Raises what the model raises; it is left without hooks in any case.
    """
    options = options or Options()
    execution = Execution()
    runners = _prepared(plan, models, options, execution, sink)
    if has_errors(execution.diagnostics):
        return execution
    if sink is not None:
        for measured in execution.measured.values():
            sink.unpatched(measured)
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
    plan: Plan, models: Mapping[str, LoadedModel], options: Options | None = None
) -> list[Diagnostic]:
    """What `execute` would refuse after the unpatched runs, for experiments that run later."""
    execution = Execution()
    _prepared(plan, models, options or Options(), execution, None)
    return execution.diagnostics


def _prepared(
    plan: Plan,
    models: Mapping[str, LoadedModel],
    options: Options,
    execution: Execution,
    sink: Sink | None,
) -> list[PanelRunner]:
    """Runners whose unpatched runs are done; what is wrong with them is in the execution."""
    runners = [
        PanelRunner(
            panel,
            models[panel.model],
            plan,
            options,
            execution.profile,
            sink,
            others={name: models[name] for name in panel.models[1:]},
        )
        for panel in plan.panels
    ]
    for runner in runners:
        with stopwatch(runner.runs.model.device) as seconds:
            try:
                execution.diagnostics.extend(runner.prepare())
            except PythonFailure as failure:  # on an unpatched run: no cell was run
                execution.diagnostics.append(failure.diagnostic)
        execution.profile.unpatched_seconds += seconds[0]
        execution.measured.update(runner.measured)
    return runners


class PanelRunner:
    """Runs the experiments of one panel on shared unpatched runs."""

    def __init__(
        self,
        panel: Panel,
        model: LoadedModel,
        plan: Plan,
        options: Options,
        profile: Profile,
        sink: Sink | None = None,
        *,
        others: Mapping[str, LoadedModel] | None = None,
    ) -> None:
        self.panel = panel
        self.plan = plan
        self.options = options
        self.sink = sink
        self.table: PromptTable = panel.table
        self.measured: dict[str, Measured] = {}
        self.fillings: dict[str, Fillings] = {}
        self.gauges = {p.experiment.key: Gauge.of(p.experiment.measures) for p in panel.experiments}
        self.keep = Gauge.of(panel.experiments[0].experiment.keep)
        gauges = (*self.gauges.values(), self.keep)
        self.runs = UnpatchedRuns(panel, model, gauges, plan=plan, side=options.side, others=others)
        self.profile = profile
        self.size = PassSize(model.device, bytes_per_token(model), fixed=options.row_tokens)
        self.kept = np.arange(len(self.table), dtype=np.int64)
        self.batches: list[Ints] = []

    # --- before any cell --------------------------------------------------------------------------

    def prepare(self) -> list[Diagnostic]:
        """Filter rows, measure the unpatched runs, check denominators, average ablations."""
        diagnostics = self._keep()
        if diagnostics:
            return diagnostics
        self.batches = self._batches(self.kept)
        for plan in self.panel.experiments:
            experiment = plan.experiment
            gauge = self.gauges[experiment.key]
            environments = tuple(dict.fromkeys(plan.items)) if _by_item(gauge) else (None,)
            shape = (plan.n_cells, len(self.kept))
            self.measured[experiment.key] = Measured(
                experiment,
                self.kept,
                [np.full(shape, np.nan) for _ in experiment.measures],
                {
                    run: [
                        np.full((len(environments), len(self.kept)), np.nan)
                        for _ in experiment.measures
                    ]
                    for run in _measured_runs(experiment)
                },
                {run: np.full(len(self.kept), np.nan) for run in experiment.accuracies},
                environments,
            )
        for batch in self.batches:
            for plan in self.panel.experiments:
                self._measure_unpatched(plan, batch)
            self._forget()
        for plan in self.panel.experiments:
            if plan.experiment.control_of is None:  # else it has been said of that one
                diagnostics.extend(self._denominators(plan.experiment))
        if not has_errors(diagnostics):
            for plan in self.panel.experiments:
                self.fillings[plan.experiment.key] = fillings_of(
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
        longest = max(
            (len(row.ids) for run in self.table.runs.values() for row in run.rows), default=1
        )
        model = self.runs.model
        room = int(free_memory(model.device) * KEPT_SHARE) // kept_bytes(model, self.table)
        tokens = max(1, min(self.options.prompt_tokens, room))
        cells = sum(each.n_cells for each in self.panel.experiments)
        size = max(1, min(tokens // (longest * draws), BATCH_ROWS // max(1, cells)))
        return [prompts[i : i + size] for i in range(0, len(prompts), size)]

    def _denominators(self, experiment: ResolvedExperiment) -> list[Diagnostic]:
        """E0604 where a ratio would be taken over something that may be 0."""
        measured = self.measured[experiment.key]
        found: list[Diagnostic] = []
        for number, measure in enumerate(experiment.spec.measures):
            effect = EFFECTS[measure.effect]
            source = experiment.spec.source
            if effect.denominator is None or experiment.measures[number].kind == "category":
                continue
            base = measured.unpatched[experiment.spec.base][number]
            other = measured.unpatched[source][number] if source is not None else None
            if effect.needs_source and other is None:
                continue
            if experiment.spec.variant:  # which one of them
                effect = replace(effect, divisor=f"{effect.divisor} of {experiment.key}")
            found.extend(
                check_denominator(
                    base,
                    other,
                    experiment.spec.statistics,
                    experiment.seed,
                    measure.span,
                    effect=effect,
                    groups=groups_of(experiment, self.kept),
                    ids=[self.table.row_ids[i] for i in self.kept],
                )
            )
        return found

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
                found = self.runs.values(self.gauges[experiment.key], run, batch, environment)
                for measure, value in zip(values, found, strict=True):
                    measure[number, columns] = value
        for run, correct in experiment.accuracies.items():
            gauge = Gauge.of([correct])
            measured.accuracy[run][columns] = self.runs.values(gauge, run, batch, None)[0]

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
        fillings = [self.fillings[plan.experiment.key] for plan in plans]
        gauges = [self.gauges[plan.experiment.key] for plan in plans]
        patcher = Patcher(self.plan, plans, gauges, fillings, self.runs)
        sharer = Sharer(plans, share=self.plan.does(SHARE))
        for batch in self.batches:
            rows: list[Rows] = []
            for number, plan in enumerate(plans):
                every = plan.rows(batch) if plan.rules else Rows.none()
                if not plan.rules:
                    self._copy_base(plan)
                live, dropped, inert = self._sorted_out(plan, every, fillings[number])
                rows.append(live)
                if len(inert):
                    self._finish(number, inert, self._base_values(plan, inert), totals[number])
                yield (dropped + len(inert)) * plan.draws
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

    def _sorted_out(
        self, plan: ExperimentPlan, rows: Rows, fillings: Fillings
    ) -> tuple[Rows, int, Rows]:
        """(rows to run, how many have no donor, rows that can't differ from the base run)."""
        good = readable(plan, rows, fillings)
        dropped = len(rows) - len(good)
        measured = self.measured[plan.experiment.key]
        measured.dropped += dropped
        rows = rows.take(good)
        inert = plan.is_inert(rows)
        measured.rows += len(rows)
        measured.inert += int(inert.sum())
        if not self.plan.does(INERT):
            return rows, dropped, Rows.none()
        return rows.take(np.flatnonzero(~inert)), dropped, rows.take(np.flatnonzero(inert))

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

    def _base_values(self, plan: ExperimentPlan, rows: Rows) -> list[Floats]:
        """Per measure, [row], what the base run has."""
        experiment = plan.experiment
        measured = self.measured[experiment.key]
        columns = np.searchsorted(self.kept, rows.prompt)
        found: list[Floats] = []
        for number in range(len(experiment.measures)):
            base = base_per_cell(plan, measured, experiment.spec.base, number)
            cell = rows.cell if len(base) > 1 else np.zeros_like(rows.cell)
            found.append(base[cell, columns])
        return found

    def _copy_base(self, plan: ExperimentPlan) -> None:
        """Without rules the patched run is the base run."""
        measured = self.measured[plan.experiment.key]
        base = measured.unpatched[plan.experiment.spec.base]
        for found, values in zip(measured.patched, base, strict=True):
            found[:] = values

    # --- passes -----------------------------------------------------------------------------------

    def _patched(
        self, patcher: Patcher, shared: SharedRows, batch: Ints
    ) -> Iterator[tuple[Member, list[Floats]]]:
        """All distinct rows in passes of a good size, with the values of their members."""
        widths, work = extent(shared, self.runs.shortcuts, self.panel.experiments)
        for run, group in groups(shared, self.plan, self.panel.experiments, widths):
            begin = 0
            while begin < len(group):
                ends = np.cumsum(widths[group[begin:]])
                count = max(1, int(np.searchsorted(ends, self.size.current, side="right")))
                chosen = group[begin : begin + count]
                members = members_of(shared, chosen)
                tokens, blocks = int(widths[chosen].sum()), float(work[chosen].sum())

                try:
                    with stopwatch(self.runs.model.device) as seconds:
                        found = list(patcher.values(shared, chosen, members, run, batch))
                except (RuntimeError, MemoryError) as error:
                    if len(chosen) == 1 or not out_of_memory(error) or not self.size.halve():
                        raise
                    self.profile.halved += 1
                    continue
                self.profile.passed(tokens, seconds[0])
                self.size.measured(tokens, blocks, seconds[0])
                yield from found
                begin += count


def _by_item(gauge: Gauge) -> bool:
    return any(atom.by_item for _, atom in gauge.atoms)


def _measured_runs(experiment: ResolvedExperiment) -> list[str]:
    """Runs whose metrics effects need, in order: base, source."""
    runs = [experiment.spec.base]
    if experiment.spec.source is not None:
        runs.append(experiment.spec.source)
    return list(dict.fromkeys(runs))


def groups_of(experiment: ResolvedExperiment, kept: Ints) -> np.ndarray | None:
    """The groups that `stats by` resamples."""
    by = experiment.spec.statistics.by
    if by is None:
        return None
    rows = experiment.table.runs["clean"].rows
    return np.array([str(rows[i].values[by]) for i in kept])


def base_per_cell(plan: ExperimentPlan, measured: Measured, run: str, number: int) -> Floats:
    """[1 or cell, row]: the metric of an unpatched run, per cell where its text differs by cell."""
    values = measured.unpatched[run][number]
    if len(measured.environments) == 1:
        return values
    index = [measured.environments.index(item) for item in plan.items]
    return values[index]
