"""Measures that are no number in some row: which, where, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mechdsl.base.arrays import Ints
from mechdsl.base.plural import plural
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e06_numbers import CellsWithoutValue, NoValue
from mechdsl.execute.found import Failed, Found
from mechdsl.execute.made_of_cells import CellFailed
from mechdsl.execute.measured_values import MeasuredValues
from mechdsl.execute.not_finite import cell_words, row_words
from mechdsl.execute.unusable import Unusable
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.program.python_files import PythonNotLoaded
from mechdsl.resolve.resolved import ResolvedExperiment, ResolvedMeasure


def no_value(
    found: Found,
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
        seen = Unusable(int(batch[failed.row or 0]), run)
        reasons[number] = function_failed(failed, experiment, seen)
    for number, gap in found.gaps.items():
        expression = measures[number].expression
        reasons[number] = NoValue(
            span=expression.span,
            text=expression.span.written,
            place=row_words(Unusable(int(batch[gap.rows[0]]), run), experiment),
            reason=gap.reason,
        )
    return reasons


def function_failed(failed: Failed, experiment: ResolvedExperiment, seen: Unusable) -> Diagnostic:
    """E0223 with the run or cell, and the row.

    seen: the row that it fails at, or, where none is known, the first of those together
    """
    if failed.row is not None or failed.rows == 1:
        return replace(failed.problem, place=f", in the {row_words(seen, experiment)}")
    if not failed.rows:
        return failed.problem
    words = row_words(seen, experiment)
    return replace(
        failed.problem, place=f", called with {plural(failed.rows, 'row')} from the {words}, on"
    )


def cell_failed(failed: CellFailed, plan: ExperimentPlan) -> Diagnostic:
    """E0223 of a function that was given all rows of a cell."""
    rows = 0 if isinstance(failed.failure, PythonNotLoaded) else len(failed.cell.runs)
    words = cell_words(plan, failed.cell.cell)
    seen = Unusable(int(failed.cell.prompts[0]), plan.experiment.spec.base, words)
    problem = Failed(failed.failure.diagnostic, None, rows)
    return function_failed(problem, plan.experiment, seen)


def cells_without_value(measured: MeasuredValues) -> list[Diagnostic]:
    """W0762: per measure the cells that have no value."""
    experiment = measured.experiment
    found: list[Diagnostic] = []
    for number, measure in enumerate(experiment.measures):
        cells = [gap for (n, _), gap in measured.gaps.items() if n == number]
        if not cells or number in measured.refused:
            continue
        found.append(
            CellsWithoutValue(
                span=measure.expression.span,
                text=measure.expression.span.written,
                count=len(cells),
                cells=len(measured.patched[number]),
                experiment=experiment.key,
                reason=cells[0].reason,
                place=row_words(cells[0].first, experiment),
            )
        )
    return found


def gap_words(measured: MeasuredValues, number: int, cell: int) -> str:
    """Why a cell has no value of a measure; empty where it has one."""
    gap = measured.gaps.get((number, cell))
    if gap is None:
        return ""
    rows = plural(gap.rows, "row")
    first = measured.experiment.table.row_ids[gap.first.row]
    return f"{gap.reason}, in {rows}, first in row {first}"
