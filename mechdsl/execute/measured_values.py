"""The values of an experiment's cells and of its unpatched runs, as they are measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.reply import Reply
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.execute.accuracies import Accuracies
from mechdsl.execute.found import Found
from mechdsl.execute.listed_tokens import ListedToken, TokenMeans
from mechdsl.execute.readout import Readout
from mechdsl.execute.unusable import Unusable
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.rule_rows import Rows
from mechdsl.resolve.resolved import ResolvedExperiment


@dataclass
class CellGap:
    """Rows of a cell in which a measure is no number."""

    reason: str
    """Of the first of them."""
    first: Unusable
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
    unusable: dict[int, Unusable] = field(default_factory=dict[int, Unusable])
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
                for run in _measured_runs(experiment)
            },
            accuracies,
            environments,
            rounding=[unknown(len(environments), n_rows) for _ in experiment.measures],
            tokens=TokenMeans(plan.lists),
        )

    def saw(self, found: Iterable[Unusable]) -> None:
        """Take down rows that can't be used, each as it was first seen to be so."""
        for unusable in found:
            self.unusable.setdefault(unusable.row, unusable)

    def unusable_rows(self) -> set[int]:
        """Those that can't be used in an unpatched run, of the kept ones and, for an accuracy, of
        all."""
        self.saw(self.accuracies.unusable.values())
        return self.unusable.keys() & {*self.kept.tolist(), *self.accuracies.unusable}

    def read_unpatched(self, run: str, environment: int, columns: Ints, found: Found) -> None:
        """Take what an unpatched run gave on some rows, and how far rounding may move the base."""
        for values, own in zip(self.unpatched[run], found.values, strict=True):
            values[environment, columns] = own
        rows = self.kept[columns].tolist()
        for row, own in zip(rows, found.replies, strict=bool(found.replies)):
            self.unpatched_replies[run, row] = own
        if run == self.experiment.spec.base:
            for values, own in zip(self.rounding, found.rounding, strict=True):
                values[environment, columns] = own

    def wrote(self, rows: Rows, replies: Sequence[tuple[Reply, ...]]) -> None:
        """Take what rows of cells wrote, those of one cell and prompt side by side."""
        places = zip(rows.cell.tolist(), rows.prompt.tolist(), strict=True)
        for place, own in zip(places, replies, strict=bool(replies)):
            self.replies[place] = (*self.replies.get(place, ()), *own)

    def wrote_as_base(self, rows: Rows, draws: int) -> None:
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

    def lacks(self, number: int, cell: int, row: Unusable, reason: str) -> None:
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

    def base_of(self, plan: ExperimentPlan, rows: Rows) -> list[Floats]:
        """Per measure, [row], what the base run has."""
        columns = np.searchsorted(self.kept, rows.prompt)
        found: list[Floats] = []
        for number in range(len(self.experiment.measures)):
            base = base_per_cell(plan, self, self.experiment.spec.base, number)
            cell = rows.cell if len(base) > 1 else np.zeros_like(rows.cell)
            found.append(base[cell, columns])
        return found


def _measured_runs(experiment: ResolvedExperiment) -> list[str]:
    """Runs whose metrics effects need, in order: base, source."""
    runs = [experiment.spec.base]
    if experiment.spec.source is not None:
        runs.append(experiment.spec.source)
    return list(dict.fromkeys(runs))


def base_per_cell(plan: ExperimentPlan, measured: MeasuredValues, run: str, number: int) -> Floats:
    """[1 or cell, row]: the metric of an unpatched run, per cell where its text differs by cell."""
    return per_cell(plan, measured, measured.unpatched[run][number])


def per_cell(plan: ExperimentPlan, measured: MeasuredValues, values: Floats) -> Floats:
    """[1 or cell, row] of [environment, row]."""
    if len(measured.environments) == 1:
        return values
    index = [measured.environments.index(item) for item in plan.items]
    return values[index]
