"""`report heatmap ROWS by COLUMNS`: the effect over two axes.

In the terminal with coloured backgrounds (and the numbers, so that nothing hangs on colour), in
files as a chart. Layers run upwards, as in papers: layer 0 is the lowest row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
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
    panels,
    row_order,
    value_text,
    values_of,
)
from mechdsl.show.reports.matrix import Matrix, MatrixEntry, colour
from mechdsl.show.reports.text import (
    MISSING,
    NO_MORE_MARK,
    THIN_MARK,
    alike_note,
    conventions,
    fewer,
    fewer_note,
    heading,
    inert_note,
    map_format,
    map_texts,
    marks,
    notes,
    null_words,
    rounding_note,
    shown_measures,
    subscript,
    survivors,
    thin,
    thin_note,
)


def render(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """One map per measure and combination of the axes that aren't drawn."""
    rows_axis = axis_name(result, report.variable or "")
    columns_axis = axis_name(result, report.by or "")
    for measure, data in shown_measures(result, console):
        heading(result, data, console)
        found = result.statistics[measure]
        category = data.kind == "category"
        values = found.commonest if category else found.mean
        write = (lambda v: f"{v:g}") if category else map_format(values)
        limit = float(np.nanmax(np.abs(values), initial=0.0)) if np.isfinite(values).any() else 0.0
        own = _own_counts(result, measure)
        texts = [*map(write, values)] if category else map_texts(result, measure, write)
        entries = [
            MatrixEntry(text, None if category else colour(value, limit), text.endswith("*"))
            for i, (value, few) in enumerate(zip(values, thin(result, measure), strict=True))
            for text in [
                _cell_text(result, measure, i, (THIN_MARK if few else "") + texts[i] + own[i])
            ]
        ]
        titles = axis_title(result, rows_axis), axis_title(result, columns_axis)
        width = max(len(entry.text) for entry in entries)
        rows, columns = row_order(result, rows_axis), values_of(result, columns_axis)
        for panel in panels(result, (rows_axis, columns_axis)):
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
        notes(_notes(result, measure, write, values), console)
    conventions(result, report, console)


def _own_counts(result: ExperimentResult, measure: int) -> list[str]:
    """Per cell its n where that is smaller than the largest, as wide in all."""
    pairs = zip(result.statistics[measure].n, fewer(result, measure), strict=True)
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
    return number + marks(result, measure)[cell]


def _notes(
    result: ExperimentResult, measure: int, write: Callable[[float], str], values: Floats
) -> list[str]:
    said: list[str] = []
    if result.measures[measure].kind == "category":
        said.append("the commonest value of every cell")
    elif np.isfinite(values).any():
        said.append(f"from {write(np.nanmin(values))} to {write(np.nanmax(values))}")
    survived, null = survivors(result, measure, "*", NO_MORE_MARK), null_words(result, measure)
    more = (
        survived,
        f"null: {null}" if null else None,
        inert_note(result, measure),
        rounding_note(result, measure),
        alike_note(result, measure),
        fewer_note(result, measure, "subscripts"),
        thin_note(result, measure),
    )
    return [*said, *(line for line in more if line)]


def chart(result: ExperimentResult, report: spec.Report) -> Any:
    """The altair chart."""
    from mechdsl.show.reports.heatmap_chart import heatmap_chart

    return heatmap_chart(result, report)


def save(result: ExperimentResult, report: spec.Report, path: Path) -> None:
    """As SVG, PNG or a standalone HTML page."""
    from mechdsl.show.reports.charts import save_chart

    save_chart(chart(result, report), path)
