"""Runs a plan: panels of experiments on the same prompts, prompt batch by prompt batch.

The plain executor and the batched one are this code with plan passes off or on: a pass over the
rows of one cell from the first layer, or over rows of many cells from their lowest write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mechdsl.data.types import PromptTable, Run
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e06_experiment import NothingKept
from mechdsl.fillings import Fillings, fillings_of
from mechdsl.gauge import Gauge
from mechdsl.lanes import Lanes, Side
from mechdsl.loaded import LoadedModel
from mechdsl.patched import patched_values
from mechdsl.plan import ExperimentPlan, Ints, Panel, Plan, Rows
from mechdsl.resolve.types import ResolvedExperiment
from mechdsl.results.data import Floats
from mechdsl.results.statistics import check_denominator
from mechdsl.runs import UnpatchedRuns
from mechdsl.vocab.effects import EFFECTS
from mechdsl.writes import readable

PROMPT_TOKENS = 4096
"""Tokens of one batch of unpatched prompts."""
ROW_TOKENS = 4096
"""Tokens of one pass over patched rows; larger ones cost more than they save on a CPU."""

SMALL_PASS = 256
"""Tokens that are worth a pass of their own: fewer cost as much, as the weights are read anyway."""

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
    row_tokens: int = ROW_TOKENS
    prompt_tokens: int = PROMPT_TOKENS


@dataclass
class Execution:
    """What a run of a plan left: values, and why it didn't go on."""

    measured: dict[str, Measured] = field(default_factory=dict[str, Measured])
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])


def execute(
    plan: Plan,
    models: Mapping[str, LoadedModel],
    options: Options | None = None,
    sink: Sink | None = None,
) -> Execution:
    """Run every panel. Denominators and `keep` are checked for all before any cell runs.

    Codes: E0604, E0613. Raises what the model raises; it is left without hooks in any case.
    """
    options = options or Options()
    execution = Execution()
    runners = [
        PanelRunner(panel, models[panel.model], plan, options, sink) for panel in plan.panels
    ]
    for runner in runners:
        execution.diagnostics.extend(runner.prepare())
        execution.measured.update(runner.measured)
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
    return execution


class PanelRunner:
    """Runs the experiments of one panel on shared unpatched runs."""

    def __init__(
        self,
        panel: Panel,
        model: LoadedModel,
        plan: Plan,
        options: Options,
        sink: Sink | None = None,
    ) -> None:
        self.panel = panel
        self.plan = plan
        self.options = options
        self.sink = sink
        self.table: PromptTable = panel.experiments[0].experiment.table
        self.measured: dict[str, Measured] = {}
        self.fillings: dict[str, Fillings] = {}
        self.gauges = {
            p.experiment.name: Gauge.of(p.experiment.measures) for p in panel.experiments
        }
        self.keep = Gauge.of(panel.experiments[0].experiment.keep)
        gauges = (*self.gauges.values(), self.keep)
        self.runs = UnpatchedRuns(
            panel,
            model,
            gauges,
            resumes=plan.resumes,
            reuses=plan.reuses,
            side=options.side,
        )
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
            gauge = self.gauges[experiment.name]
            environments = tuple(dict.fromkeys(plan.items)) if _by_item(gauge) else (None,)
            shape = (plan.n_cells, len(self.kept))
            self.measured[experiment.name] = Measured(
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
            diagnostics.extend(self._denominators(plan.experiment))
        if not has_errors(diagnostics):
            for plan in self.panel.experiments:
                self.fillings[plan.experiment.name] = fillings_of(
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
        size = max(1, self.options.prompt_tokens // (longest * draws))
        return [prompts[i : i + size] for i in range(0, len(prompts), size)]

    def _denominators(self, experiment: ResolvedExperiment) -> list[Diagnostic]:
        """E0604 where a ratio would be taken over something that may be 0."""
        measured = self.measured[experiment.name]
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
        measured = self.measured[experiment.name]
        columns = np.searchsorted(self.kept, batch)
        for run, values in measured.unpatched.items():
            for number, environment in enumerate(measured.environments):
                found = self.runs.values(self.gauges[experiment.name], run, batch, environment)
                for measure, value in zip(values, found, strict=True):
                    measure[number, columns] = value
        for run, correct in experiment.accuracies.items():
            gauge = Gauge.of([correct])
            measured.accuracy[run][columns] = self.runs.values(gauge, run, batch, None)[0]

    # --- cells ------------------------------------------------------------------------------------

    def run(self) -> Iterator[int]:
        """Run all cells; yields how many rows, draws included, each pass has finished."""
        totals = {
            plan.experiment.name: [
                (np.zeros(values.shape), np.zeros(values.shape))
                for values in self.measured[plan.experiment.name].patched
            ]
            for plan in self.panel.experiments
        }
        for batch in self.batches:
            for plan in self.panel.experiments:
                name = plan.experiment.name
                if not plan.rules:
                    self._copy_base(plan)
                    continue
                rows = plan.rows(batch)
                good = readable(plan, rows, self.fillings[name])
                self.measured[name].dropped += len(rows) - len(good)
                if len(good) < len(rows):
                    yield (len(rows) - len(good)) * plan.draws
                for part, values in self._passes(plan, rows.take(good), batch):
                    columns = np.searchsorted(self.kept, part.prompt)
                    self._base_where_inert(plan, part, columns, values)
                    for (sums, counts), value in zip(totals[name], values, strict=True):
                        np.add.at(sums, (part.cell, columns), value)
                        np.add.at(counts, (part.cell, columns), 1)
                    if self.sink is not None:
                        self.sink.rows(self.measured[name], part, values)
                    yield len(part) * plan.draws
            self._forget()
        for plan in self.panel.experiments:
            if plan.rules:
                for found, (sums, counts) in zip(
                    self.measured[plan.experiment.name].patched,
                    totals[plan.experiment.name],
                    strict=True,
                ):
                    with np.errstate(invalid="ignore"):
                        found[:] = np.where(counts > 0, sums / counts, np.nan)
        self.runs.forget()

    def _base_where_inert(
        self, plan: ExperimentPlan, rows: Rows, columns: Ints, values: Sequence[Floats]
    ) -> None:
        """What can't differ from the base run is equal to it, not off by a rounding error."""
        inert = plan.inert[rows.cell]
        if not inert.any():
            return
        experiment = plan.experiment
        for number, value in enumerate(values):
            measured = self.measured[experiment.name]
            base = base_per_cell(plan, measured, experiment.spec.base, number)
            cell = rows.cell if len(base) > 1 else np.zeros_like(rows.cell)
            value[inert] = base[cell, columns][inert]

    def _copy_base(self, plan: ExperimentPlan) -> None:
        """Without rules the patched run is the base run."""
        measured = self.measured[plan.experiment.name]
        base = measured.unpatched[plan.experiment.spec.base]
        for found, values in zip(measured.patched, base, strict=True):
            found[:] = values

    def _passes(
        self, plan: ExperimentPlan, rows: Rows, batch: Ints
    ) -> Iterator[tuple[Rows, list[Floats]]]:
        """The rows in passes of equal start and input, with their values per measure."""
        draws = plan.draws
        for start, run, group in self._groups(plan, rows):
            lanes = self.runs.lanes(run, batch)
            for part in self._sized(plan, group, lanes, draws):
                repeated = part.take(np.repeat(np.arange(len(part)), draws))
                draw = np.tile(np.arange(draws), len(part))
                values = patched_values(
                    plan,
                    self.gauges[plan.experiment.name],
                    self.fillings[plan.experiment.name],
                    self.runs,
                    repeated,
                    draw,
                    run,
                    start,
                    batch,
                )
                yield part, [v.reshape(len(part), draws).mean(axis=1) for v in values]

    def _sized(self, plan: ExperimentPlan, rows: Rows, lanes: Lanes, draws: int) -> Iterator[Rows]:
        """Rows in parts of a good size; with kept keys and values, those that start late first."""
        length = int(lanes.batch.ids.shape[1])
        first = np.zeros(len(rows), dtype=np.int64)
        if lanes.past is not None:
            lane = lanes.lane(rows.prompt, np.zeros(len(rows), dtype=np.int64))
            first = lanes.batch.starts.cpu().numpy()[lane] + plan.leftmost(rows)
            order = np.argsort(-first, kind="stable")
            rows, first = rows.take(order), first[order]
        begin = 0
        while begin < len(rows):
            # The keys and values that are kept take memory, though no time worth counting.
            width = max(length - int(first[begin]), length // 2, 1)
            end = min(begin + max(1, self.options.row_tokens // (width * draws)), len(rows))
            # A part computes all columns from its earliest row on, so it ends where the columns
            # change, unless it would be too small to be worth a pass.
            change = np.flatnonzero(np.diff(first[begin:end])) + 1
            tokens = change * draws * (length - first[begin + change - 1])
            large = change[tokens >= SMALL_PASS]
            if len(large):
                end = begin + int(large[0])
            yield rows.take(np.arange(begin, end))
            begin = end

    def _groups(self, plan: ExperimentPlan, rows: Rows) -> Iterator[tuple[int, Run, Rows]]:
        """Rows that can share a pass: same start layer, same input, and one cell if not batched."""
        base = self.runs.named(plan.experiment.spec.base)
        replaced = next((r for r in plan.rules if r.rule.fill == "text"), None)
        key = [plan.starts[rows.cell]]
        if replaced is not None:
            key.append(replaced.position_of_cell[rows.cell])
        if not self.plan.batches:
            key.append(rows.cell)
        _, inverse = np.unique(np.stack(key), axis=1, return_inverse=True)
        for number in range(int(inverse.max()) + 1 if len(rows) else 0):
            group = rows.take(np.flatnonzero(inverse.reshape(-1) == number))
            run = base
            if replaced is not None:
                inputs = list(replaced.rule.inputs.values())
                run = inputs[int(replaced.position_of_cell[group.cell[0]])]
            yield int(plan.starts[group.cell[0]]), run, group


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
