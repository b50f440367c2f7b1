"""`report heatmap` and `report confusion`: matrices on coloured backgrounds.

Heatmaps have layer 0 at the bottom. Confusions have the share of each category per value of an axis
or of the prompts. The numbers are always printed, so that no information depends on colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from textwrap import wrap
from typing import Any

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.text import Text

from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.colours import Colour, cell_style, diverging_colour
from mechdsl.show.reports.grid import (
    ConfusionCounts,
    FigureFrame,
    axis_name,
    axis_title,
    axis_values,
    count_confusions,
    figure_frame,
    grid_panels,
    row_order,
    value_text,
)
from mechdsl.show.reports.text import (
    MISSING,
    RANDOM_MARK,
    THIN_MARK,
    drawable_measures,
    equal_rows_note,
    fewer_prompts_note,
    inert_note,
    null_band_note,
    print_conventions,
    print_heading,
    print_notes,
    rounding_note,
    significance_note,
    subscript,
    thin_note,
)

HEADER_WIDTH = 12
"""Width that column headers wrap to, unless a word is longer."""


@dataclass(frozen=True)
class MatrixEntry:
    """One number, with room for a mark after it."""

    text: str = ""
    colour: Colour | None = None
    bold: bool = False


@dataclass(frozen=True)
class Matrix:
    """Entries with names of columns above and names of rows before them."""

    rows: Sequence[str]
    columns: Sequence[str]
    entries: Sequence[Sequence[MatrixEntry]]
    """Shape [row][column]."""
    rows_title: str = ""
    columns_title: str = ""
    header_colours: Sequence[Colour | None] = field(default_factory=tuple)
    """Colour of each column's name, if it has one."""
    number_width: int = 0
    """Minimum width of numbers, to align several matrices."""

    def print(self, console: Console) -> None:
        """Print the matrix, split by columns to fit the width."""
        headers = [_wrap_header(name) for name in self.columns]
        longest = max(len(name) for name in (self.rows_title, *self.rows))
        label_width = min(longest, max(10, len(self.rows_title), console.width // 3))
        # The column of the mark separates numbers.
        number_width = max(len(entry.text) for row in self.entries for entry in row)
        number_width = max(number_width, self.number_width)
        widths = [max(number_width, 1 + max(map(len, header))) for header in headers]
        room = console.width - label_width - 1
        if sum(widths) + len(widths) <= room:  # add a gap if it cuts nothing
            widths = [width + 1 for width in widths]
        for part in _split_columns(widths, room):
            if self.columns_title:
                title = f"{'':<{label_width}}  {self.columns_title}"
                console.print(Text(title, style="dim"), highlight=False)
            self._print_header(part, headers, widths, label_width, console)
            self._print_rows(part, widths, label_width, console)

    def _print_header(
        self,
        part: Sequence[int],
        headers: Sequence[Sequence[str]],
        widths: Sequence[int],
        label_width: int,
        console: Console,
    ) -> None:
        height = max(len(headers[column]) for column in part)
        for line in range(height):
            label = self.rows_title if line == height - 1 else ""
            text = Text().append(f"{label:<{label_width}} ", style="dim")
            for column in part:
                padded = [""] * (height - len(headers[column])) + list(headers[column])
                background = self.header_colours[column] if self.header_colours else None
                style = cell_style(background) + Style(bold=True)
                text.append(f"{padded[line]:>{widths[column] - 1}} ", style=style)
            _print_line(text, console)

    def _print_rows(
        self, part: Sequence[int], widths: Sequence[int], label_width: int, console: Console
    ) -> None:
        for row, entries in zip(self.rows, self.entries, strict=True):
            names = wrap(row, max(1, label_width)) or [""]
            text = Text().append(f"{names[0]:<{label_width}} ", style="bold")
            for column in part:
                entry = entries[column]
                bold = Style(bold=True) if entry.bold else Style()
                shown = f"{entry.text:>{widths[column]}}"
                text.append(shown, style=cell_style(entry.colour) + bold)
            _print_line(text, console)
            for more in names[1:]:
                console.print(Text(more, style="bold"), highlight=False)


def _print_line(text: Text, console: Console) -> None:
    if console.color_system is None:
        text.rstrip()
    console.print(text, highlight=False, soft_wrap=True)


def _wrap_header(header: str) -> list[str]:
    longest = max((len(word) for word in header.split()), default=1)
    return wrap(header, max(HEADER_WIDTH, longest)) or [""]


def _split_columns(widths: Sequence[int], room: int) -> list[list[int]]:
    """Split columns into groups that fit side by side."""
    parts: list[list[int]] = [[]]
    used = 0
    for column, width in enumerate(widths):
        if parts[-1] and used + width > room:
            parts.append([])
            used = 0
        parts[-1].append(column)
        used += width
    return parts


# --- heatmaps -------------------------------------------------------------------------------------


def _print_heatmaps(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Print one map per measure and combination of the remaining axes."""
    rows_axis = axis_name(result, report.variable or "")
    columns_axis = axis_name(result, report.by or "")
    titles = axis_title(result, rows_axis), axis_title(result, columns_axis)
    rows, columns = row_order(result, rows_axis), axis_values(result, columns_axis)
    names = list(map(value_text, rows)), list(map(value_text, columns))
    for measure, data in drawable_measures(result, console):
        print_heading(result, data, console)
        frame = figure_frame(result, measure)
        entries = _map_entries(frame)
        width = max(len(entry.text) for entry in entries)
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
            Matrix(*names, laid_out, *titles, number_width=width).print(console)
        print_notes(_heatmap_notes(result, frame), console)
    print_conventions(result, report, console)


def _map_entries(frame: FigureFrame) -> list[MatrixEntry]:
    """Return each cell with its marks, and n if it is smaller than the largest."""
    limit = float(np.nanmax(np.abs(frame.values), initial=0.0))
    counts = [subscript(cell.n) if cell.has_fewer else "" for cell in frame.cells]
    width = max(map(len, counts), default=0)
    entries: list[MatrixEntry] = []
    for cell, count in zip(frame.cells, counts, strict=True):
        number = (THIN_MARK if cell.is_thin else "") + f"{cell.map_text}{count:<{width}}"
        text = number + cell.mark if math.isfinite(cell.value) else MISSING
        colour = None if frame.is_category else diverging_colour(cell.value, limit)
        entries.append(MatrixEntry(text, colour, text.endswith("*")))
    return entries


def _heatmap_notes(result: ExperimentResult, frame: FigureFrame) -> list[str]:
    measure, values, said = frame.measure, frame.values, list[str]()
    if frame.is_category:
        said.append("the most common value of every cell")
    elif np.isfinite(values).any():
        ends = frame.write_map(np.nanmin(values)), frame.write_map(np.nanmax(values))
        said.append(f"from {ends[0]} to {ends[1]}")
    survived, null = (
        significance_note(result, measure, "*", RANDOM_MARK),
        null_band_note(result, measure),
    )
    more = (
        survived,
        null,
        inert_note(result, measure),
        rounding_note(result, measure),
        equal_rows_note(result, measure),
        fewer_prompts_note(result, measure, "subscripts"),
        thin_note(result, measure),
    )
    return [*said, *(line for line in more if line)]


# --- confusions -----------------------------------------------------------------------------------


def _print_confusions(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Print one matrix per measure and combination of the remaining axes."""
    title = axis_title(result, report.variable or "")
    for measure, confusions in count_confusions(result, report).items():
        print_heading(result, result.measures[measure], console)
        for counts in confusions:
            if counts.title:
                console.print(Text(counts.title, style="bold"), highlight=False)
            _confusion_matrix(counts, report, title, console.width).print(console)
        said = [f"share of the row's n prompts; {MISSING}: none of them"]
        if any(number is not None for counts in confusions for number in counts.own):
            said.append(f"*: the category equals the row's {report.variable}")
        print_notes(said, console)
    print_conventions(result, report, console)


def _confusion_matrix(
    counts: ConfusionCounts, report: spec.Report, title: str, width: int
) -> Matrix:
    """Build a matrix of shares, with counts if there is room."""
    most = max(chain([0], *counts.counts))
    counted = len(counts.columns) * (len(f" 0.00 ({most})") + 2) + 24 <= width

    def entry(row: int, column: int) -> MatrixEntry:
        count, share = counts.counts[row][column], counts.share(row, column)
        mark = "*" if counts.own[row] == column and counts.total(row) else " "
        number = f" ({count})" if counted and count else ""
        text = f"{share:.2f}{number}" if count or mark == "*" else MISSING
        return MatrixEntry(
            text + mark, diverging_colour(share, 1.0) if count else None, mark == "*"
        )

    rows, columns = range(len(counts.rows)), range(len(counts.columns))
    return Matrix(
        [value_text(name) for name in counts.rows],
        [*(f"{column:g}" for column in counts.columns), "n"],
        [[*(entry(r, c) for c in columns), MatrixEntry(f"{counts.total(r)} ")] for r in rows],
        title,
        report.by or "",
    )


# --- reports --------------------------------------------------------------------------------------


def render(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Print the report."""
    draw = _print_confusions if report.kind == "confusion" else _print_heatmaps
    draw(result, report, console)


def chart(result: ExperimentResult, report: spec.Report) -> Any:
    """Return the altair chart."""
    from mechdsl.show.reports.map_charts import confusion_chart, heatmap_chart

    draw = confusion_chart if report.kind == "confusion" else heatmap_chart
    return draw(result, report)
