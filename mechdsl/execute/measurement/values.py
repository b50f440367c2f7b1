"""Measured values of cells and unpatched runs, and the reasons for missing values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.text import count_noun
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.statistics import NotFinite, UndefinedCells, UndefinedMeasure
from mechdsl.execute.measurement.readout import ListedToken, MeasureFailure, Readout, ReadoutResult
from mechdsl.forward.hooks.batch import array_to_device
from mechdsl.planner.plan import ExperimentPlan, Panel
from mechdsl.planner.rows import RowTable
from mechdsl.resolve.types import ResolvedExperiment, ResolvedMeasure
from mechdsl.vocab.metrics import Reply


@dataclass(frozen=True, eq=False)
class TokenMeans:
    """Sums over the rows of cells, as passes over them are done; equal rows count each."""

    top: int
    """How many are listed of a cell; 0 for none."""
    sums: dict[int, Floats] = field(default_factory=dict[int, Floats])
    """Cell → [vocab] probabilities."""
    firsts: dict[int, Floats] = field(default_factory=dict[int, Floats])
    """Cell → [vocab] rows in which the token is the most likely one."""
    rows: dict[int, float] = field(default_factory=dict[int, float])

    def add(self, rows: RowTable, whole: RowTable, found: Tensor) -> None:
        """Take rows of a pass. whole: all rows of these cells and prompts; of several runs of one
        prompt (the middle tokens of a span) each counts as a part of it. found: [row, vocab]."""
        weights = array_to_device(_weigh_rows(rows, whole), found.device).to(found.dtype)
        cells, place = np.unique(rows.cell, return_inverse=True)
        index = array_to_device(place.reshape(-1), found.device)
        sums = found.new_zeros(len(cells), found.shape[1])
        firsts = torch.zeros_like(sums)
        sums.index_add_(0, index, found * weights[:, None])
        firsts.index_put_((index, found.argmax(-1)), weights, accumulate=True)
        counts = weights.new_zeros(len(cells)).index_add_(0, index, weights).tolist()
        for number, cell in enumerate(cells.tolist()):
            for total, own in ((self.sums, sums), (self.firsts, firsts)):
                more = own[number].double().cpu().numpy()
                total[cell] = total[cell] + more if cell in total else more
            self.rows[cell] = self.rows.get(cell, 0.0) + counts[number]

    def forget(self) -> None:
        """List nothing: rows that are in the sums have been left out."""
        for each in (self.sums, self.firsts, self.rows):
            each.clear()

    def listed(self) -> dict[int, list[ListedToken]]:
        """Cell → its tokens, the most likely one first."""
        return {
            cell: [
                ListedToken(
                    token,
                    (float(sums[token]) / count, float(self.firsts[cell][token]) / count),
                )
                for token in np.argsort(-sums, kind="stable")[: self.top].tolist()
            ]
            for (cell, sums), count in zip(self.sums.items(), self.rows.values(), strict=True)
        }


def _weigh_rows(rows: RowTable, whole: RowTable) -> Floats:
    """[row] 1 over how many runs there are of its prompt in its cell."""
    width = 1 + int(whole.prompt.max())
    every, counts = np.unique(whole.cell * width + whole.prompt, return_counts=True)
    found: Ints = counts[np.searchsorted(every, rows.cell * width + rows.prompt)]
    return 1 / found


@dataclass(frozen=True)
class UnusableRow:
    """A row with NaN, or with an infinity that a metric can't use."""

    row: int
    """Of the table."""
    run: str
    cell: str | None = None
    """The cell's coordinates, where it is the patched run; empty where it has none."""
    place: str = ""
    """Where in the model, as far as was looked."""


RunReader = Callable[[Readout, str, Ints, int | None, float], ReadoutResult]
"""What is read of an unpatched run on some rows, by occurrence and rounding."""


@dataclass(frozen=True)
class Accuracies:
    """Of the runs that `accuracy(RUN)` asks for, filled as batches finish."""

    experiment: ResolvedExperiment
    values: dict[str, Floats]
    """Run → [row of the table], 1 where the answer is the best token, else 0."""
    rounding: dict[str, Floats]
    """The same: 1 where rounding may decide it."""
    unusable: dict[int, UnusableRow] = field(default_factory=dict[int, UnusableRow])
    """Rows in which a run can't be used."""

    def readouts(self) -> Iterator[tuple[str, Readout]]:
        """What is read of which run."""
        for run, correct in self.experiment.accuracies.items():
            yield run, Readout.of([correct])

    def measure(self, read: RunReader, rounding: float, batch: Ints) -> None:
        """Read the runs on some rows.

        rounding: how far it may move a logit, relative to the largest one.
        """
        for run, readout in self.readouts():
            found = read(readout, run, batch, None, rounding)
            self.values[run][batch] = found.values[0]
            self.rounding[run][batch] = found.rounding[0]
            for row in batch[found.broken].tolist():
                self.unusable.setdefault(row, UnusableRow(row, run))


def create_accuracies(panel: Panel) -> dict[str, Accuracies]:
    """Of each experiment by its key, NaN everywhere."""
    rows = len(panel.table)

    def unknown(experiment: ResolvedExperiment) -> dict[str, Floats]:
        return {run: np.full(rows, np.nan) for run in experiment.accuracies}

    every = [plan.experiment for plan in panel.experiments]
    return {each.key: Accuracies(each, unknown(each), unknown(each)) for each in every}


@dataclass
class CellGap:
    """Rows of a cell in which a measure is no number."""

    reason: str
    """Of the first of them."""
    first: UnusableRow
    rows: int = 0


@dataclass
class MeasuredValues:
    """The values of one experiment, filled as batches finish."""

    experiment: ResolvedExperiment
    kept: Ints
    """Rows of the table that are in the experiment."""
    patched: list[Floats]
    """Per measure, [cell, kept row]; NaN where the row isn't part of the cell."""
    unpatched: dict[str, list[Floats]]
    """Run → per measure, [environment, kept row]."""
    accuracies: Accuracies
    environments: tuple[int | None, ...]
    dropped: int = 0
    """Rows of cells that are left out, as what they read, such as the donor of a `resample`, lacks
    the position."""
    rows: int = 0
    """Rows of cells, run or not."""
    inert: int = 0
    """Of these, the ones that can't differ from the base run by structure."""
    rounding: list[Floats] = field(default_factory=list[Floats])
    """Per measure, [environment, kept row]: how far rounding may move the base run's value."""
    refused: dict[int, Diagnostic] = field(default_factory=dict[int, Diagnostic])
    """Numbers of the measures that can't be computed → why."""
    failed: set[int] = field(default_factory=set[int])
    """Those of them that aren't even read in further rows, as their function fails."""
    gaps: dict[tuple[int, int], CellGap] = field(default_factory=dict[tuple[int, int], CellGap])
    """(number of the measure, cell) → why it has no value there; the other cells have one."""
    lengths: Mapping[str, float] = field(default_factory=dict[str, float])
    """Of the directions that rules use, by name."""
    tokens: TokenMeans = field(default_factory=lambda: TokenMeans(0))
    """What tokens that are listed are found by."""
    listed: dict[int, list[ListedToken]] = field(default_factory=dict[int, list[ListedToken]])
    """Cell → the tokens that an observation lists of it, the first one first."""
    unusable: dict[int, UnusableRow] = field(default_factory=dict[int, UnusableRow])
    """Rows of the table → where they first were seen to be so."""
    replies: dict[tuple[int, int], tuple[Reply, ...]] = field(
        default_factory=dict[tuple[int, int], tuple[Reply, ...]]
    )
    """(cell, row of the table) → what was written: a text for each sample."""
    unpatched_replies: dict[tuple[str, int], tuple[Reply, ...]] = field(
        default_factory=dict[tuple[str, int], tuple[Reply, ...]]
    )
    """(run, row of the table) → the same."""

    @classmethod
    def unmeasured(
        cls, plan: ExperimentPlan, readout: Readout, kept: Ints, accuracies: Accuracies
    ) -> MeasuredValues:
        """NaN everywhere but in the accuracies."""
        experiment, n_rows = plan.experiment, len(kept)
        by_item = any(atom.by_item for _, atom in readout.atoms)
        environments = tuple(dict.fromkeys(plan.items)) if by_item else (None,)

        def unknown(*shape: int) -> Floats:
            return np.full(shape, np.nan)

        return cls(
            experiment,
            kept,
            [unknown(plan.n_cells, n_rows) for _ in experiment.measures],
            {
                run: [unknown(len(environments), n_rows) for _ in experiment.measures]
                for run in _list_measured_runs(experiment)
            },
            accuracies,
            environments,
            rounding=[unknown(len(environments), n_rows) for _ in experiment.measures],
            tokens=TokenMeans(plan.lists),
        )

    def saw(self, found: Iterable[UnusableRow]) -> None:
        """Take down rows that can't be used, each as it was first seen to be so."""
        for unusable in found:
            self.unusable.setdefault(unusable.row, unusable)

    def unusable_rows(self) -> set[int]:
        """Those that can't be used in an unpatched run, of the kept ones and, for an accuracy, of
        all."""
        self.saw(self.accuracies.unusable.values())
        return self.unusable.keys() & {*self.kept.tolist(), *self.accuracies.unusable}

    def read_unpatched(
        self, run: str, environment: int, columns: Ints, found: ReadoutResult
    ) -> None:
        """Take what an unpatched run gave on some rows, and how far rounding may move the base."""
        for values, own in zip(self.unpatched[run], found.values, strict=True):
            values[environment, columns] = own
        rows = self.kept[columns].tolist()
        for row, own in zip(rows, found.replies, strict=bool(found.replies)):
            self.unpatched_replies[run, row] = own
        if run == self.experiment.spec.base:
            for values, own in zip(self.rounding, found.rounding, strict=True):
                values[environment, columns] = own

    def wrote(self, rows: RowTable, replies: Sequence[tuple[Reply, ...]]) -> None:
        """Take what rows of cells wrote, those of one cell and prompt side by side."""
        places = zip(rows.cell.tolist(), rows.prompt.tolist(), strict=True)
        for place, own in zip(places, replies, strict=bool(replies)):
            self.replies[place] = (*self.replies.get(place, ()), *own)

    def wrote_as_base(self, rows: RowTable, draws: int) -> None:
        """Rows of cells that are equal to the base run write what that writes.

        draws: of noise, of each row; a base run without noise writes the same in all of them.
        """
        if not self.unpatched_replies:
            return
        base = self.experiment.spec.base
        times = draws // self.experiment.table.runs[base].draws
        there = [
            self.unpatched_replies.get((base, row), ()) * times for row in rows.prompt.tolist()
        ]
        self.wrote(rows, there)

    def lacks(self, number: int, cell: int, row: UnusableRow, reason: str) -> None:
        """Take down a row of a cell in which a measure is no number."""
        self.gaps.setdefault((number, cell), CellGap(reason, row)).rows += 1

    def empty_gaps(self) -> None:
        """A cell has no value where one of its rows has none: the others are not what was asked."""
        for number, cell in self.gaps:
            self.patched[number][cell] = np.nan

    def among(self, batch: Ints) -> Ints:
        """The rows of a batch that are in the experiment."""
        return batch[np.isin(batch, self.kept)]

    def leave_out(self, rows: Sequence[int]) -> None:
        """Drop rows of the table from everything; accuracies are read without what is unusable."""
        good = ~np.isin(self.kept, np.array(rows, dtype=np.int64))
        self.kept = self.kept[good]
        self.patched = [values[:, good] for values in self.patched]
        self.unpatched = {
            run: [values[:, good] for values in found] for run, found in self.unpatched.items()
        }
        self.rounding = [values[:, good] for values in self.rounding]

    def copy_base(self) -> None:
        """Without rules the patched run is the base run."""
        base = self.unpatched[self.experiment.spec.base]
        for found, values in zip(self.patched, base, strict=True):
            found[:] = values
        for (run, row), replies in self.unpatched_replies.items():
            if run == self.experiment.spec.base:
                self.replies.update({(n, row): replies for n in range(self.experiment.n_cells)})

    def base_of(self, plan: ExperimentPlan, rows: RowTable) -> list[Floats]:
        """Per measure, [row], what the base run has."""
        columns = np.searchsorted(self.kept, rows.prompt)
        found: list[Floats] = []
        for number in range(len(self.experiment.measures)):
            base = expand_base_values(plan, self, self.experiment.spec.base, number)
            cell = rows.cell if len(base) > 1 else np.zeros_like(rows.cell)
            found.append(base[cell, columns])
        return found


def _list_measured_runs(experiment: ResolvedExperiment) -> list[str]:
    """Runs whose metrics effects need, in order: base, source."""
    runs = [experiment.spec.base]
    if experiment.spec.source is not None:
        runs.append(experiment.spec.source)
    return list(dict.fromkeys(runs))


def expand_base_values(
    plan: ExperimentPlan, measured: MeasuredValues, run: str, number: int
) -> Floats:
    """[1 or cell, row]: the metric of an unpatched run, per cell where its text differs by cell."""
    return expand_to_cells(plan, measured, measured.unpatched[run][number])


def expand_to_cells(plan: ExperimentPlan, measured: MeasuredValues, values: Floats) -> Floats:
    """[1 or cell, row] of [environment, row]."""
    if len(measured.environments) == 1:
        return values
    index = [measured.environments.index(item) for item in plan.items]
    return values[index]


def describe_cell(plan: ExperimentPlan, cell: int) -> str:
    """The coordinates of a cell; empty where the experiment has one only."""
    axes = zip(plan.experiment.axes, plan.coordinates, strict=True)
    found = [(axis.name, axis.labels[int(index[cell])]) for axis, index in axes]
    return ", ".join(str(at) if name == "position" else f"{name} {at}" for name, at in found)


def describe_run(unusable: UnusableRow, experiment: ResolvedExperiment) -> str:
    """The run, or the cell, in which a row can't be used."""
    if unusable.cell is None:
        return f"run `{unusable.run}`"
    return f"patched run of {unusable.cell or f'`{experiment.key}`'}"


def describe_row(unusable: UnusableRow, experiment: ResolvedExperiment) -> str:
    """The run or cell, and the row."""
    row = f"row {experiment.table.row_ids[unusable.row]} of `{experiment.table.name}`"
    return f"{describe_run(unusable, experiment)}, {row}"


def report_not_finite(experiment: ResolvedExperiment, first: UnusableRow, count: int) -> Diagnostic:
    """E0621 for an experiment.

    first: with its place. count: rows in which there is such a number, as far as is known.
    """
    rows = len(experiment.table)
    return NotFinite(
        span=experiment.spec.measures[0].span,
        model=experiment.model.name,
        run=describe_run(first, experiment),
        row=experiment.table.row_ids[first.row],
        prompts=experiment.table.name,
        where=", ".join(
            [
                *([f"first {first.place}"] if first.place else []),
                *([f"in {count} of {rows} rows"] if count > 1 or not first.place else []),
            ]
        ),
    )


def explain_missing_values(
    found: ReadoutResult,
    experiment: ResolvedExperiment,
    measures: Sequence[ResolvedMeasure],
    run: str,
    batch: Ints,
) -> dict[int, Diagnostic]:
    """By number, the measures that an unpatched run has no value of: E0223, E0631.

    measures: those that were read. batch: [row] the rows of the table that `found` is of.
    """
    reasons: dict[int, Diagnostic] = {}
    for number, failed in found.failed.items():
        seen = UnusableRow(int(batch[failed.row or 0]), run)
        reasons[number] = report_function_failure(failed, experiment, seen)
    for number, gap in found.gaps.items():
        expression = measures[number].expression
        reasons[number] = UndefinedMeasure(
            span=expression.span,
            text=expression.span.written,
            place=describe_row(UnusableRow(int(batch[gap.rows[0]]), run), experiment),
            reason=gap.reason,
        )
    return reasons


def report_function_failure(
    failed: MeasureFailure, experiment: ResolvedExperiment, seen: UnusableRow
) -> Diagnostic:
    """E0223 with the run or cell, and the row.

    seen: the row that it fails at, or, where none is known, the first of those together
    """
    if failed.row is not None or failed.rows == 1:
        return replace(failed.problem, place=f", in the {describe_row(seen, experiment)}")
    if not failed.rows:
        return failed.problem
    words = describe_row(seen, experiment)
    return replace(
        failed.problem, place=f", called with {count_noun(failed.rows, 'row')} from the {words}, on"
    )


def report_missing_cells(measured: MeasuredValues) -> list[Diagnostic]:
    """W0762: per measure the cells that have no value."""
    experiment = measured.experiment
    found: list[Diagnostic] = []
    for number, measure in enumerate(experiment.measures):
        cells = [gap for (n, _), gap in measured.gaps.items() if n == number]
        if not cells or number in measured.refused:
            continue
        found.append(
            UndefinedCells(
                span=measure.expression.span,
                text=measure.expression.span.written,
                count=len(cells),
                cells=len(measured.patched[number]),
                experiment=experiment.key,
                reason=cells[0].reason,
                place=describe_row(cells[0].first, experiment),
            )
        )
    return found


def describe_gap(measured: MeasuredValues, number: int, cell: int) -> str:
    """Why a cell has no value of a measure; empty where it has one."""
    gap = measured.gaps.get((number, cell))
    if gap is None:
        return ""
    rows = count_noun(gap.rows, "row")
    first = measured.experiment.table.row_ids[gap.first.row]
    return f"{gap.reason}, in {rows}, first in row {first}"
