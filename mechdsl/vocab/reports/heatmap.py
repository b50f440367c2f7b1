"""`report heatmap ROWS by COLUMNS`: the effect over two axes.

In the terminal with coloured backgrounds (and the numbers, so that nothing hangs on colour), in
files as a chart. Layers run upwards, as in papers: layer 0 is the lowest row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.text import Text

from mechdsl import spec
from mechdsl.results.cell import Coord
from mechdsl.results.data import Floats
from mechdsl.results.experiment import ExperimentResult
from mechdsl.vocab.reports.grid import Panel, axis_name, panels, values_of
from mechdsl.vocab.reports.text import (
    MISSING,
    alpha,
    conventions,
    heading,
    inert_note,
    notes,
    number_format,
    survivors,
)

UPWARDS = {"layer", "to_layer"}
"""Axes drawn with 0 at the bottom."""
NEGATIVE, NEUTRAL, POSITIVE = (178, 24, 43), (247, 247, 247), (33, 102, 172)
HEADER_WIDTH = 12
"""Headers of columns wrap to this, or to their longest word."""


def row_order(result: ExperimentResult, axis: str) -> list[Coord]:
    """Values from the top of the map to its bottom."""
    values = values_of(result, axis)
    numeric = not any(isinstance(value, str) for value in values)
    return values[::-1] if axis in UPWARDS and numeric else values


def render(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """One map per measure and combination of the axes that aren't drawn."""
    rows_axis = axis_name(result, report.variable or "")
    columns_axis = axis_name(result, report.by or "")
    for measure, data in enumerate(result.measures):
        heading(result, data, console)
        found = result.statistics[measure]
        category = data.kind == "category"
        values = found.commonest if category else found.mean
        write = (lambda v: f"{v:g}") if category else number_format(values, 2)
        limit = float(np.nanmax(np.abs(values), initial=0.0)) if np.isfinite(values).any() else 0.0
        texts = [_cell_text(result, measure, i, write(v)) for i, v in enumerate(values)]
        colours = [None if category else colour(v, limit) for v in values]
        for panel in panels(result, (rows_axis, columns_axis)):
            if panel.title:
                console.print(Text(panel.title, style="bold"), highlight=False)
            _print_panel(
                console,
                panel,
                (rows_axis, row_order(result, rows_axis)),
                (columns_axis, values_of(result, columns_axis)),
                texts,
                colours,
            )
        notes(_notes(result, measure, write, values), console)
    conventions(result, report, console)


def _cell_text(result: ExperimentResult, measure: int, cell: int, number: str) -> str:
    if not math.isfinite(
        result.statistics[measure].mean[cell] + 0.0
        if result.measures[measure].kind == "number"
        else result.statistics[measure].share[cell]
    ):
        return MISSING
    survived = result.statistics[measure].p_corrected[cell] < alpha(result)
    return f"{number}*" if survived else f"{number} "


def _notes(
    result: ExperimentResult, measure: int, write: Callable[[float], str], values: Floats
) -> list[str]:
    said: list[str] = []
    if result.measures[measure].kind == "category":
        said.append("the commonest value of every cell")
    elif np.isfinite(values).any():
        said.append(f"from {write(np.nanmin(values))} to {write(np.nanmax(values))}")
    survived = survivors(result, measure)
    if survived:
        said.append(f"* {survived}")
    inert = inert_note(result, measure)
    return [*said, inert] if inert else said


def colour(value: float, limit: float) -> tuple[int, int, int] | None:
    """A diverging scale: white at 0, full colour at `limit` and beyond."""
    if not math.isfinite(value) or limit <= 0:
        return None
    share = min(1.0, abs(value) / limit)
    end = POSITIVE if value > 0 else NEGATIVE
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(NEUTRAL, end, strict=True))
    return red, green, blue


def _style(background: tuple[int, int, int] | None) -> Style:
    if background is None:
        return Style()
    luminance = sum(w * c for w, c in zip((0.299, 0.587, 0.114), background, strict=True))
    ink = "black" if luminance > 140 else "white"
    red, green, blue = background
    return Style(color=ink, bgcolor=f"rgb({red},{green},{blue})")


def _print_panel(
    console: Console,
    panel: Panel,
    rows: tuple[str, Sequence[Coord]],
    columns: tuple[str, Sequence[Coord]],
    texts: Sequence[str],
    colours: Sequence[tuple[int, int, int] | None],
) -> None:
    """The map in as many parts as the width asks for."""
    rows_axis, row_values = rows
    columns_axis, column_values = columns
    headers = {value: _wrapped(str(value)) for value in column_values}
    label_width = min(
        max(len(str(v)) for v in [rows_axis, *row_values]), max(10, console.width // 3)
    )
    number_width = max(len(text) for text in texts)  # the place of the mark keeps them apart
    widths = {
        value: max(number_width, 1 + max(len(line) for line in headers[value]))
        for value in column_values
    }
    room = console.width - label_width - 1
    if sum(widths.values()) + len(widths) <= room:  # a gap besides, where nothing is cut for it
        widths = {value: width + 1 for value, width in widths.items()}
    for part in _parts(column_values, widths, room):
        console.print(Text(f"{'':<{label_width}}  {columns_axis}", style="dim"), highlight=False)
        height = max(len(headers[value]) for value in part)
        for line in range(height):
            label = rows_axis if line == height - 1 else ""
            text = Text().append(f"{label:<{label_width}} ", style="dim")
            for value in part:
                padded = [""] * (height - len(headers[value])) + headers[value]
                text.append(f"{padded[line]:>{widths[value] - 1}} ", style="bold")
            if console.color_system is None:
                text.rstrip()
            console.print(text, highlight=False, soft_wrap=True)
        for row in row_values:
            names = wrap(str(row), label_width) or [""]
            text = Text().append(f"{names[0]:<{label_width}} ", style="bold")
            for value in part:
                cell = panel.cells.get((row, value))
                shown = f"{MISSING} " if cell is None else texts[cell]
                style = Style() if cell is None else _style(colours[cell])
                bold = Style(bold=True) if shown.endswith("*") else Style()
                text.append(f"{shown:>{widths[value]}}", style=style + bold)
            if console.color_system is None:
                text.rstrip()
            console.print(text, highlight=False, soft_wrap=True)
            for more in names[1:]:
                console.print(Text(more, style="bold"), highlight=False)


def _wrapped(header: str) -> list[str]:
    longest = max((len(word) for word in header.split()), default=1)
    return wrap(header, max(HEADER_WIDTH, longest)) or [""]


def _parts(values: Sequence[Coord], widths: dict[Coord, int], room: int) -> list[list[Coord]]:
    parts: list[list[Coord]] = [[]]
    used = 0
    for value in values:
        if parts[-1] and used + widths[value] > room:
            parts.append([])
            used = 0
        parts[-1].append(value)
        used += widths[value]
    return parts


def save(result: ExperimentResult, report: spec.Report, path: Path) -> None:
    """As SVG, PNG or a standalone HTML page."""
    from mechdsl.vocab.reports.charts import heatmap_chart, save_chart

    save_chart(heatmap_chart(result, report), path)
