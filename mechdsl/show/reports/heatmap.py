"""`report heatmap`: a matrix of effects with layer 0 at the bottom."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from mechdsl.base.arrays import Floats
from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.grid import (
    axis_name,
    axis_title,
    axis_values,
    grid_panels,
    row_order,
    value_text,
)
from mechdsl.show.reports.matrix import Matrix, MatrixEntry, diverging_colour
from mechdsl.show.reports.text import (
    MISSING,
    RANDOM_MARK,
    THIN_MARK,
    drawable_measures,
    fewer_prompts_note,
    has_fewer_prompts,
    inert_note,
    is_thin,
    map_format,
    map_texts,
    null_band_note,
    print_conventions,
    print_heading,
    print_notes,
    rounding_note,
    significance_marks,
    significance_note,
    subscript,
    thin_note,
    zero_width_note,
)


def render(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Print one map per measure and combination of the remaining axes."""
    rows_axis = axis_name(result, report.variable or "")
    columns_axis = axis_name(result, report.by or "")
    for measure, data in drawable_measures(result, console):
        print_heading(result, data, console)
        found = result.statistics[measure]
        category = data.kind == "category"
        values = found.commonest if category else found.mean
        write = (lambda v: f"{v:g}") if category else map_format(values)
        limit = float(np.nanmax(np.abs(values), initial=0.0)) if np.isfinite(values).any() else 0.0
        own = _count_texts(result, measure)
        texts = [*map(write, values)] if category else map_texts(result, measure, write)
        entries = [
            MatrixEntry(
                text, None if category else diverging_colour(value, limit), text.endswith("*")
            )
            for i, (value, few) in enumerate(zip(values, is_thin(result, measure), strict=True))
            for text in [
                _cell_text(result, measure, i, (THIN_MARK if few else "") + texts[i] + own[i])
            ]
        ]
        titles = axis_title(result, rows_axis), axis_title(result, columns_axis)
        width = max(len(entry.text) for entry in entries)
        rows, columns = row_order(result, rows_axis), axis_values(result, columns_axis)
        for panel in grid_panels(result, (rows_axis, columns_axis)):
            if panel.title:
                console.print(Text(panel.title, style="bold"), highlight=False)
            laid_out = [
                [
                    entries[panel.cells[row, column]]
                    if (row, column) in panel.cells
                    else MatrixEntry()
                    for column in columns
                ]
                for row in rows
            ]
            names = list(map(value_text, rows)), list(map(value_text, columns))
            Matrix(*names, laid_out, *titles, number_width=width).print(console)
        print_notes(_heatmap_notes(result, measure, write, values), console)
    print_conventions(result, report, console)


def _count_texts(result: ExperimentResult, measure: int) -> list[str]:
    """Return n of each cell if it is smaller than the largest, padded to a common width."""
    pairs = zip(result.statistics[measure].n, has_fewer_prompts(result, measure), strict=True)
    texts = [subscript(int(n)) if less else "" for n, less in pairs]
    width = max(map(len, texts), default=0)
    return [f"{text:<{width}}" for text in texts]


def _cell_text(result: ExperimentResult, measure: int, cell: int, number: str) -> str:
    if not math.isfinite(
        result.statistics[measure].mean[cell] + 0.0
        if result.measures[measure].kind == "number"
        else result.statistics[measure].share[cell]
    ):
        return MISSING
    return number + significance_marks(result, measure)[cell]


def _heatmap_notes(
    result: ExperimentResult, measure: int, write: Callable[[float], str], values: Floats
) -> list[str]:
    said: list[str] = []
    if result.measures[measure].kind == "category":
        said.append("the most common value of every cell")
    elif np.isfinite(values).any():
        said.append(f"from {write(np.nanmin(values))} to {write(np.nanmax(values))}")
    survived, null = (
        significance_note(result, measure, "*", RANDOM_MARK),
        null_band_note(result, measure),
    )
    more = (
        survived,
        null,
        inert_note(result, measure),
        rounding_note(result, measure),
        zero_width_note(result, measure),
        fewer_prompts_note(result, measure, "subscripts"),
        thin_note(result, measure),
    )
    return [*said, *(line for line in more if line)]


def chart(result: ExperimentResult, report: spec.Report) -> Any:
    """Return the altair chart."""
    from mechdsl.show.reports.map_charts import heatmap_chart

    return heatmap_chart(result, report)
