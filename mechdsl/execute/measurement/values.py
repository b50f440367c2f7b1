"""Measured values of cells and unpatched runs, and the reasons for missing values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.base.text import count_noun
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.experiments import NotFinite, UndefinedCells, UndefinedMeasure
from mechdsl.execute.measurement.readout import ListedToken, MeasureFailure, Readout, ReadoutResult
from mechdsl.forward.hooks.batch import array_to_device
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.planner.plan import ExperimentPlan, Panel
from mechdsl.planner.rows import RowTable
from mechdsl.resolve.types import ResolvedExperiment, ResolvedMeasure
from mechdsl.vocab.metrics import Reply


@dataclass(frozen=True, eq=False)
class TokenMeans:
    """Sums of token probabilities over the rows of cells; equal rows count separately."""

    top: int
    """Number of listed tokens per cell; 0 for none."""
    sums: dict[int, Floats] = field(default_factory=dict[int, Floats])
    """Cell → [vocab] probabilities."""
    firsts: dict[int, Floats] = field(default_factory=dict[int, Floats])
    """Cell → [vocab] number of rows in which the token is the most likely one."""
    rows: dict[int, float] = field(default_factory=dict[int, float])

    def add(self, rows: RowTable, whole: RowTable, found: Tensor) -> None:
        """Add rows of a pass.

        Args:
            whole: All rows of these cells and prompts. Several runs of one prompt (the middle
                tokens of a span) each count as a fraction of it.
            found: [row, vocab] probabilities.
        """
        weights = array_to_device(_weigh_rows(rows, whole), found.device).to(found.dtype)
        cells, place = np.unique(rows.cell, return_inverse=True)
        index = array_to_device(place.reshape(-1), found.device)
        sums = found.new_zeros(len(cells), found.shape[1])
        firsts = torch.zeros_like(sums)
        sums.index_add_(0, index, found * weights[:, None])
        firsts.index_put_((index, found.argmax(-1)), weights, accumulate=True)
        counts = weights.new_zeros(len(cells)).index_add_(0, index, weights).tolist()
        for number, cell in enumerate(cells.tolist()):
            for total, tensor in ((self.sums, sums), (self.firsts, firsts)):
                more = tensor[number].double().cpu().numpy()
                total[cell] = total[cell] + more if cell in total else more
            self.rows[cell] = self.rows.get(cell, 0.0) + counts[number]

    def forget(self) -> None:
        """Clear the lists, because rows in the sums were excluded."""
        for each in (self.sums, self.firsts, self.rows):
            each.clear()

    def listed(self) -> dict[int, list[ListedToken]]:
        """Return cell → its tokens, the most likely one first."""
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
    """Return [row]: 1 over the number of runs of its prompt in its cell."""
    width = 1 + int(whole.prompt.max())
    every, counts = np.unique(whole.cell * width + whole.prompt, return_counts=True)
    count: Ints = counts[np.searchsorted(every, rows.cell * width + rows.prompt)]
    return 1 / count


@dataclass(frozen=True)
class UnusableRow:
    """A row with NaN, or with an infinity that a metric can't use."""

    row: int
    """Number of the row in the table."""
    run: str
    cell: str | None = None
    """The cell's coordinates, if it is a patched run; empty if there are none."""
    place: str = ""
    """Location in the model, if known."""


RunReader = Callable[[Readout, str, Ints, int | None, float], ReadoutResult]
"""Reads an unpatched run on some rows, by occurrence and rounding."""


@dataclass(frozen=True)
class Accuracies:
    """Accuracies of the runs in `accuracy(RUN)`, filled batch by batch."""

    experiment: ResolvedExperiment
    values: dict[str, Floats]
    """Run → [row of the table], 1 if the answer is the best token, else 0."""
    rounding: dict[str, Floats]
    """Run → [row of the table], 1 if rounding may decide it."""
    unusable: dict[int, UnusableRow] = field(default_factory=dict[int, UnusableRow])
    """Rows in which a run is unusable."""

    def readouts(self) -> Iterator[tuple[str, Readout]]:
        """Yield each run with its readout."""
        for run, correct in self.experiment.accuracies.items():
            yield run, Readout.of([correct])

    def measure(self, read: RunReader, rounding: float, batch: Ints) -> None:
        """Read the runs on some rows.

        Args:
            read: Reads a run.
            rounding: How far rounding may move a logit, relative to the largest one.
        """
        for run, readout in self.readouts():
            result = read(readout, run, batch, None, rounding)
            self.values[run][batch] = result.values[0]
            self.rounding[run][batch] = result.rounding[0]
            for row in batch[result.broken].tolist():
                self.unusable.setdefault(row, UnusableRow(row, run))


def create_accuracies(panel: Panel) -> dict[str, Accuracies]:
    """Create the accuracies of each experiment by key, NaN everywhere."""
    rows = len(panel.table)

    def unknown(experiment: ResolvedExperiment) -> dict[str, Floats]:
        return {run: np.full(rows, np.nan) for run in experiment.accuracies}

    every = [plan.experiment for plan in panel.experiments]
    return {
        experiment.key: Accuracies(experiment, unknown(experiment), unknown(experiment))
        for experiment in every
    }


@dataclass
class CellGap:
    """Rows of a cell in which a measure is undefined."""

    reason: str
    """Reason in the first of these rows."""
    first: UnusableRow
    rows: int = 0


@dataclass(frozen=True)
class ActiveRow:
    """A row in which a feature is active."""

    row: int
    """Number in the table; of rows that are saved, in the data."""
    tokens: tuple[int, ...]
    """Observed tokens of the row; of rows that are saved, those at which the feature isn't 0."""
    values: tuple[float, ...]
    """Activation at each of them."""


@dataclass(frozen=True)
class FeatureFindings:
    """Facts that an observation of features finds in addition to their values."""

    features: tuple[int, ...]
    """[rank] the observed features; those of the largest values first, if they were selected."""
    active: int
    """Number of features that aren't 0 at some token."""
    size: int
    """Number of features of the basis."""
    explained: float | None
    """1 − Σ ‖x − x̂‖² / Σ ‖x − x̄‖² over the tokens; None for a transcoder, and if all are equal."""
    tokens: int
    top_rows: tuple[tuple[ActiveRow, ...], ...]
    """[rank] the rows with the highest activations, highest first."""


NodeKind = Literal["token", "feature", "error", "logit"]


@dataclass(frozen=True)
class GraphNode:
    """A node of an attribution graph that pruning kept."""

    kind: NodeKind
    layer: int
    """Of features and errors; 0 for others."""
    token: int
    """Number of the token in the prompt; of logits the last one."""
    number: int
    """Of the feature, or of the token in the vocabulary; 0 for errors."""
    amount: float
    """The activation of a feature, the probability of a logit; 0 for others."""
    influence: float
    """The share of the influence of all nodes that it has together with those that have more; 1 for
    logits."""


@dataclass(frozen=True)
class GraphFindings:
    """The attribution graph of a row, after pruning."""

    row: int
    """Number in the table."""
    nodes: tuple[GraphNode, ...]
    edges: tuple[tuple[int, int, float], ...]
    """(source, target, weight), the nodes by their numbers in `nodes`."""
    total: int
    """Number of edges before pruning."""
    supernodes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Name → its features among the nodes."""


@dataclass
class MeasuredValues:
    """Values of one experiment, filled batch by batch."""

    experiment: ResolvedExperiment
    kept: Ints
    """Rows of the table that are in the experiment."""
    patched: list[Floats]
    """Per measure, [cell, kept row]; NaN if the row isn't part of the cell."""
    unpatched: dict[str, list[Floats]]
    """Run → per measure, [environment, kept row]."""
    accuracies: Accuracies
    environments: tuple[int | None, ...]
    dropped: int = 0
    """Number of rows left out of cells because an input, such as the donor of a `resample`, lacks
    the position."""
    rows: int = 0
    """Number of rows of cells, run or not."""
    inert: int = 0
    """Number of these rows that can't differ from the base run by structure."""
    recomputed: set[int] = field(default_factory=set[int])
    """Rows of the table whose backward passes computed activations again, to save memory."""
    inactive: int = 0
    """Number of these rows whose changed features are 0 before and after, so that they equal the
    base run."""
    with_inactive: Bools | None = None
    """[cell] whether a cell has such rows; None where features aren't watched."""
    with_changes: Bools | None = None
    """[cell] whether a cell has rows that may differ from the base run; None likewise."""
    errors: Mapping[str, tuple[float, int]] = field(default_factory=dict[str, tuple[float, int]])
    """Basis → mean of ‖x − x̂‖ / ‖x‖ over the vectors x that rules change in the base run, and the
    number of vectors."""
    rounding: list[Floats] = field(default_factory=list[Floats])
    """Per measure, [environment, kept row]: how far rounding may move the base run's value."""
    refused: dict[int, Diagnostic] = field(default_factory=dict[int, Diagnostic])
    """Numbers of the measures that can't be computed → reason."""
    failed: set[int] = field(default_factory=set[int])
    """Measures of `refused` that are no longer read in further rows, as their function fails."""
    gaps: dict[tuple[int, int], CellGap] = field(default_factory=dict[tuple[int, int], CellGap])
    """(number of the measure, cell) → reason for a missing value; other cells have values."""
    lengths: Mapping[str, float] = field(default_factory=dict[str, float])
    """Norms of the directions that rules use, by name."""
    findings: Mapping[str, tuple[float, float]] = field(
        default_factory=dict[str, tuple[float, float]]
    )
    """Further numbers of an observation over all rows → the least and the largest over cells."""
    tokens: TokenMeans = field(default_factory=lambda: TokenMeans(0))
    """Sums that determine the listed tokens."""
    listed: dict[int, list[ListedToken]] = field(default_factory=dict[int, list[ListedToken]])
    """Cell → the tokens that an observation lists, in order."""
    features: FeatureFindings | None = None
    """The features that an observation found."""
    graph: GraphFindings | None = None
    """The attribution graph of the first row in the first cell, if it is drawn."""
    unusable: dict[int, UnusableRow] = field(default_factory=dict[int, UnusableRow])
    """Rows of the table → where they were first seen to be unusable."""
    replies: dict[tuple[int, int], tuple[Reply, ...]] = field(
        default_factory=dict[tuple[int, int], tuple[Reply, ...]]
    )
    """(cell, row of the table) → generated text: one reply for each sample."""
    unpatched_replies: dict[tuple[str, int], tuple[Reply, ...]] = field(
        default_factory=dict[tuple[str, int], tuple[Reply, ...]]
    )
    """(run, row of the table) → generated text, likewise."""

    @classmethod
    def unmeasured(
        cls, plan: ExperimentPlan, readout: Readout, kept: Ints, accuracies: Accuracies
    ) -> MeasuredValues:
        """Create values that are NaN everywhere except for the accuracies."""
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

    def watch(self, cells: int, inactive: Ints, changing: Ints) -> None:
        """Record the cells of rows with inactive features, and of those that may change."""
        if self.with_inactive is None or self.with_changes is None:
            self.with_inactive = np.zeros(cells, dtype=np.bool_)
            self.with_changes = np.zeros(cells, dtype=np.bool_)
        self.with_inactive[inactive] = True
        self.with_changes[changing] = True
        self.inactive += len(inactive)

    def find_inactive_cells(self) -> Bools | bool:
        """Return [cell] whether all rows of a cell equal the base run, since the changed features
        of some are 0."""
        if self.with_inactive is None or self.with_changes is None:
            return False
        return self.with_inactive & ~self.with_changes

    def saw(self, unusable_rows: Iterable[UnusableRow]) -> None:
        """Record unusable rows; the first report of a row stays."""
        for unusable in unusable_rows:
            self.unusable.setdefault(unusable.row, unusable)

    def unusable_rows(self) -> set[int]:
        """Return the unusable rows: kept rows, and any row that an accuracy needs."""
        self.saw(self.accuracies.unusable.values())
        return self.unusable.keys() & {*self.kept.tolist(), *self.accuracies.unusable}

    def read_unpatched(
        self, run: str, environment: int, columns: Ints, result: ReadoutResult
    ) -> None:
        """Store the values of an unpatched run on some rows; for the base run, rounding too."""
        for values, value in zip(self.unpatched[run], result.values, strict=True):
            values[environment, columns] = value
        rows = self.kept[columns].tolist()
        for row, replies in zip(rows, result.replies, strict=bool(result.replies)):
            self.unpatched_replies[run, row] = replies
        if run == self.experiment.spec.base:
            for values, own in zip(self.rounding, result.rounding, strict=True):
                values[environment, columns] = own

    def wrote(self, rows: RowTable, replies: Sequence[tuple[Reply, ...]]) -> None:
        """Store the replies of rows of cells, with those of one cell and prompt adjacent."""
        places = zip(rows.cell.tolist(), rows.prompt.tolist(), strict=True)
        for place, own in zip(places, replies, strict=bool(replies)):
            self.replies[place] = (*self.replies.get(place, ()), *own)

    def wrote_as_base(self, rows: RowTable, draws: int) -> None:
        """Store the base run's replies for rows of cells that equal the base run.

        Args:
            draws: Noise draws of each row; a base run without noise has the same reply in all.
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
        """Record a row of a cell in which a measure is undefined."""
        self.gaps.setdefault((number, cell), CellGap(reason, row)).rows += 1

    def empty_gaps(self) -> None:
        """Remove values of cells in which a row has none: other rows aren't the whole cell."""
        for number, cell in self.gaps:
            self.patched[number][cell] = np.nan

    def among(self, batch: Ints) -> Ints:
        """Return the rows of a batch that are in the experiment."""
        return batch[np.isin(batch, self.kept)]

    def leave_out(self, rows: Sequence[int]) -> None:
        """Exclude rows of the table everywhere; accuracies ignore unusable rows themselves."""
        good = ~np.isin(self.kept, np.array(rows, dtype=np.int64))
        self.kept = self.kept[good]
        self.patched = [values[:, good] for values in self.patched]
        self.unpatched = {
            run: [values[:, good] for values in found] for run, found in self.unpatched.items()
        }
        self.rounding = [values[:, good] for values in self.rounding]

    def copy_base(self) -> None:
        """Copy the base run's values to the patched run of an experiment without rules."""
        base = self.unpatched[self.experiment.spec.base]
        for found, values in zip(self.patched, base, strict=True):
            found[:] = values
        for (run, row), replies in self.unpatched_replies.items():
            if run == self.experiment.spec.base:
                self.replies.update({(n, row): replies for n in range(self.experiment.n_cells)})

    def base_of(self, plan: ExperimentPlan, rows: RowTable) -> list[Floats]:
        """Return, per measure, [row]: the base run's value."""
        columns = np.searchsorted(self.kept, rows.prompt)
        bases: list[Floats] = []
        for number in range(len(self.experiment.measures)):
            base = expand_base_values(plan, self, self.experiment.spec.base, number)
            cell = rows.cell if len(base) > 1 else np.zeros_like(rows.cell)
            bases.append(base[cell, columns])
        return bases


def _list_measured_runs(experiment: ResolvedExperiment) -> list[str]:
    """List the runs whose metrics effects need, in order: base, source."""
    runs = [experiment.spec.base]
    if experiment.spec.source is not None:
        runs.append(experiment.spec.source)
    return list(dict.fromkeys(runs))


def expand_base_values(
    plan: ExperimentPlan, measured: MeasuredValues, run: str, number: int
) -> Floats:
    """Return [1 or cell, row]: an unpatched run's metric, per cell if its text differs by cell."""
    return expand_to_cells(plan, measured, measured.unpatched[run][number])


def expand_to_cells(plan: ExperimentPlan, measured: MeasuredValues, values: Floats) -> Floats:
    """Return [1 or cell, row] of [environment, row]."""
    if len(measured.environments) == 1:
        return values
    index = [measured.environments.index(item) for item in plan.items]
    return values[index]


def describe_cell(plan: ExperimentPlan, cell: int) -> str:
    """Return the coordinates of a cell; empty if the experiment has only one."""
    axes = zip(plan.experiment.axes, plan.coordinates, strict=True)
    coordinates = [(axis.name, axis.labels[int(index[cell])]) for axis, index in axes]
    return ", ".join(str(at) if name == "position" else f"{name} {at}" for name, at in coordinates)


def describe_run(unusable: UnusableRow, experiment: ResolvedExperiment) -> str:
    """Describe the run, or the cell, in which a row is unusable."""
    if unusable.cell is None:
        return f"run `{unusable.run}`"
    return f"patched run of {unusable.cell or f'`{experiment.key}`'}"


def describe_row(unusable: UnusableRow, experiment: ResolvedExperiment) -> str:
    """Describe the run or cell, and the row."""
    row = f"row {experiment.table.row_ids[unusable.row]} of `{experiment.table.name}`"
    return f"{describe_run(unusable, experiment)}, {row}"


def report_not_finite(
    experiment: ResolvedExperiment, first: UnusableRow, count: int, model: LoadedModel
) -> Diagnostic:
    """Report E0621 for an experiment.

    Args:
        experiment: The experiment.
        first: The first unusable row, with its location.
        count: Number of rows with invalid numbers, as far as known.
        model: Its model.
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
        hint=_suggest_range(model) or _suggest_rule(experiment, first),
    )


def _suggest_range(model: LoadedModel) -> str:
    """Return how to avoid numbers that the dtype of a model can't represent; an empty text if its
    range isn't the cause."""
    if model.dtype in (torch.float16, torch.bfloat16):
        return "half precision may have too small a range: try `--dtype float32`"
    implementations = {config._attn_implementation for config in model.attention_configs}
    if model.dtype == torch.float64 and "eager" in implementations:
        # transformers masks with the lowest float64, and computes the softmax in float32.
        reason = "with `eager` attention, the mask of float64 is infinite in the softmax of float32"
        return f"{reason}, and padding that sees no token is NaN: try `--dtype float32`"
    return ""


def _suggest_rule(experiment: ResolvedExperiment, unusable: UnusableRow) -> str:
    """Return what to change in the rules of a run, or in the model if the run has no rule."""
    of_run = experiment.derived.get(unusable.run)
    rules = () if of_run is None else of_run.rules
    rules = rules if unusable.cell is None else experiment.every_rule
    if not rules:
        return "no rule acts in this run: check the weights of the model"
    if any(rule.does.name == "zero" for rule in rules):
        return "a norm or a cosine of a vector of zeros is NaN in some models: write `with mean`"
    return "a rule may write numbers that are too large"


def explain_missing_values(
    result: ReadoutResult,
    experiment: ResolvedExperiment,
    measures: Sequence[ResolvedMeasure],
    run: str,
    batch: Ints,
) -> dict[int, Diagnostic]:
    """Report the measures without a value in an unpatched run, by number: E0223, E0631.

    Args:
        result: Values of the run.
        measures: The measures that were read.
        batch: [row] the table's rows in `result`.
    """
    reasons: dict[int, Diagnostic] = {}
    for number, failed in result.failed.items():
        seen = UnusableRow(int(batch[failed.row or 0]), run)
        reasons[number] = report_function_failure(failed, experiment, seen)
    for number, gap in result.gaps.items():
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
    """Report E0223 with the run or cell, and the row.

    seen: the row that it fails on or, if unknown, the first of the rows in the call
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
    """Report W0762: per measure, the cells without a value."""
    experiment = measured.experiment
    problems: list[Diagnostic] = []
    for number, measure in enumerate(experiment.measures):
        cells = [gap for (n, _), gap in measured.gaps.items() if n == number]
        if not cells or number in measured.refused:
            continue
        problems.append(
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
    return problems


def describe_gap(measured: MeasuredValues, number: int, cell: int) -> str:
    """Describe why a cell lacks a value of a measure; empty if it has one."""
    gap = measured.gaps.get((number, cell))
    if gap is None:
        return ""
    rows = count_noun(gap.rows, "row")
    first = measured.experiment.table.row_ids[gap.first.row]
    return f"{gap.reason}, in {rows}, first in row {first}"
