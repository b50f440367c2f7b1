"""`report lines` and `report bars`: effects along an axis, with intervals drawn to scale.

Lines have one value per line of the terminal, and bars one bar per cell; a category has a bar for
the share of each value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from mechdsl.program import spec
from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.grid import (
    FigureCell,
    FigureFrame,
    GridPanel,
    axis_name,
    axis_title,
    axis_values,
    drawn_axes,
    figure_frame,
    grid_panels,
    value_text,
)
from mechdsl.show.reports.text import (
    MISSING,
    THIN_MARK,
    drawable_measures,
    figure_notes,
    print_conventions,
    print_heading,
    print_notes,
)

MIN_GAUGE, MAX_GAUGE = 12, 60
"""Minimum and maximum width of drawn intervals, in characters; below it only numbers are shown."""

MIN_LABEL = 10
"""Minimum width that labels wrap to, in characters."""

COLUMN_GAP = 2

MEAN_TITLE = "mean "
"""Column title, padded for the mark of a number."""


@dataclass(frozen=True)
class TextScale:
    """A scale of numbers on a line of characters."""

    left: float
    right: float
    width: int

    def at(self, value: float) -> int:
        """Return the column of a number; numbers outside the scale are at its ends."""
        place = (value - self.left) / (self.right - self.left) * (self.width - 1)
        return round(min(max(place, 0), self.width - 1))


IntervalDrawer = Callable[[FigureCell, TextScale], str]

LabelledCell = tuple[Sequence[str], int]
"""Labels of a line, and its cell."""


def _empty_gauge(cell: FigureCell, scale: TextScale) -> list[str]:
    """Return a line with only the null band and a bar at 0."""
    drawn = [" "] * scale.width
    if math.isfinite(sum(cell.null)):
        for place in range(scale.at(cell.null[0]), scale.at(cell.null[1]) + 1):
            drawn[place] = "░"
    drawn[scale.at(0.0)] = "│"
    return drawn


def draw_point(cell: FigureCell, scale: TextScale) -> str:
    """Draw the interval as a line with its mean."""
    if not math.isfinite(cell.value) or scale.right <= scale.left:
        return ""
    drawn = _empty_gauge(cell, scale)
    if math.isfinite(cell.low):
        for place in range(scale.at(cell.low), scale.at(cell.high) + 1):
            drawn[place] = "─"
    drawn[scale.at(cell.value)] = "●"
    return "".join(drawn).rstrip()


def draw_bar(cell: FigureCell, scale: TextScale) -> str:
    """Draw a bar from 0 to the mean; the interval is light within the bar and a line beyond."""
    if not math.isfinite(cell.value) or scale.right <= scale.left:
        return ""
    drawn = _empty_gauge(cell, scale)
    zero, mean = scale.at(0.0), scale.at(cell.value)
    bar = range(zero + 1, mean + 1) if mean > zero else range(mean, zero)
    for place in bar:
        drawn[place] = "█"
    if math.isfinite(cell.low):
        for place in range(scale.at(cell.low), scale.at(cell.high) + 1):
            if place in bar:
                drawn[place] = "▒"
            elif place != zero:
                drawn[place] = "─"
    return "".join(drawn).rstrip()


def _max_length(texts: Iterable[str]) -> int:
    return max(map(len, texts), default=0)


@dataclass(frozen=True)
class IntervalLayout:
    """Texts and widths for all cells of a measure, so that the lines of all panels are aligned."""

    frame: FigureFrame
    titles: Sequence[str]
    """Titles of the labels."""
    widths: Sequence[int]
    """Widths of the labels."""
    means: list[str]
    """Mean of each cell, with a mark if it is significant after correction."""
    counts: list[str]
    """n of each cell; empty if all are equal."""
    nulls: list[str]
    """Null band of each cell; empty without one or without room."""
    scale: TextScale
    draw: IntervalDrawer

    @classmethod
    def of(
        cls,
        frame: FigureFrame,
        titles: Sequence[str],
        labels: Sequence[Sequence[str]],
        width: int,
        draw: IntervalDrawer,
    ) -> IntervalLayout:
        """Lay out a measure; `labels` are all labels of each title."""
        cells = frame.cells
        means = [
            (THIN_MARK if cell.is_thin else "") + cell.value_text + cell.mark for cell in cells
        ]
        intervals = [frame.interval_title, *(cell.interval_text for cell in cells)]
        nulls = [cell.null_text for cell in cells] if frame.null_title else []
        counts = [str(cell.n) for cell in cells] if frame.has_fewer else []
        numbers = _max_length([MEAN_TITLE, *means]) + _max_length(intervals) + 3 * COLUMN_GAP
        numbers += _max_length(counts) + COLUMN_GAP if counts else 0
        widths = label_widths(titles, labels, width - numbers)
        taken = sum(widths) + COLUMN_GAP * (len(widths) - 1) + numbers
        if nulls and taken + _max_length(nulls) > width:
            nulls = []
        room = min(MAX_GAUGE, width - taken - (_max_length(nulls) + COLUMN_GAP if nulls else 0))
        # All panels share the scale, which includes 0, so that they can be compared.
        drawn = [0.0, *(end for cell in cells for end in (cell.value, cell.low, cell.high))]
        drawn += [end for cell in cells for end in cell.null]
        limits = float(np.nanmin(drawn)), float(np.nanmax(drawn))
        scale = TextScale(*limits, room if room >= MIN_GAUGE and limits[0] < limits[1] else 0)
        return cls(frame, titles, widths, means, counts, nulls, scale, draw)

    def print(self, lines: Sequence[LabelledCell], console: Console) -> None:
        """Print one panel."""
        second = _max_length([MEAN_TITLE, *self.means])
        cells = self.frame.cells
        title, control = self.frame.interval_title, self.frame.null_title
        third = _max_length([title, *(cell.interval_text for cell in cells)])
        fourth = _max_length([control, *self.nulls])
        heads = [f"{name:<{width}}" for name, width in zip(self.titles, self.widths, strict=True)]
        n_width = _max_length(["n", *self.counts])
        head = (
            "  ".join(heads)
            + (f"  {'n':>{n_width}}" if self.counts else "")
            + f"  {MEAN_TITLE:>{second}}  {title:<{third}}"
            + (f"  {control:<{fourth}}" if self.nulls else "")
        )
        if self.scale.width:
            left, right = map(self.frame.write, (self.scale.left, self.scale.right))
            head += f"  {left}{right:>{max(1, self.scale.width - len(left))}}"
        console.print(Text(head.rstrip(), style="dim"), highlight=False, soft_wrap=True)
        for labels, cell in lines:
            first, *more = label_lines(labels, self.widths)
            text = Text().append(first, style="bold")
            if self.counts:
                text.append(f"  {self.counts[cell]:>{n_width}}")
            text.append(f"  {self.means[cell]:>{second}}  {cells[cell].interval_text:<{third}}")
            if self.nulls:
                text.append(f"  {self.nulls[cell]:<{fourth}}")
            if self.scale.width:
                text.append("  ")
                text.append(self.draw(cells[cell], self.scale), style="blue")
            text.rstrip()
            console.print(text, highlight=False, soft_wrap=True)
            for line in more:
                console.print(Text(line.rstrip(), style="bold"), highlight=False)


def label_lines(labels: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Join labels side by side, wrapped to their widths."""
    parts = [wrap(text, width) or [""] for text, width in zip(labels, widths, strict=True)]
    return [
        "  ".join(
            f"{part[line] if line < len(part) else '':<{width}}"
            for part, width in zip(parts, widths, strict=True)
        )
        for line in range(max(map(len, parts)))
    ]


def label_widths(titles: Sequence[str], labels: Sequence[Sequence[str]], room: int) -> list[int]:
    """Return the widths of the labels, or the available ones."""
    widths = [_max_length([title, *texts]) for title, texts in zip(titles, labels, strict=True)]
    each = max(MIN_LABEL, (room - COLUMN_GAP * (len(widths) - 1)) // len(widths))
    if sum(widths) + COLUMN_GAP * (len(widths) - 1) <= room:
        return widths
    return [min(width, max(each, len(title))) for width, title in zip(widths, titles, strict=True)]


# --- lines ----------------------------------------------------------------------------------------


def _print_lines(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Print per series one row per value: mean, interval, and the interval drawn to scale."""
    axis = axis_name(result, report.variable or "")
    title = axis_title(result, axis)
    values = axis_values(result, axis)
    for measure, data in drawable_measures(result, console):
        print_heading(result, data, console)
        if data.kind == "category":
            print_notes([f"a category has no line: write `report bars {report.variable}`"], console)
            continue
        labels = [value_text(value) for value in values]
        frame = figure_frame(result, measure)
        layout = IntervalLayout.of(frame, [title], [labels], console.width, draw_point)
        for panel in grid_panels(result, (axis,)):
            if panel.title:
                console.print(Text(panel.title, style="bold"), highlight=False)
            lines = [
                ([value_text(value)], panel.cells[value,])
                for value in values
                if (value,) in panel.cells
            ]
            layout.print(lines, console)
        print_notes(figure_notes(result, measure, drawn=layout.scale.width > 0), console)
    print_conventions(result, report, console)


# --- bars -----------------------------------------------------------------------------------------


MAX_BAR, MIN_BAR = 40, 10
"""Characters of a bar for a share of 1."""

SHARE_WIDTH = len("      n  commonest  share")


def _print_bars(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Print one bar per value of the axis and of the series, if there is one."""
    axes = drawn_axes(result, report)
    titles = [axis_title(result, axis) for axis in axes]
    values = [axis_values(result, axis) for axis in axes]
    labels = [[value_text(value) for value in each] for each in values]
    for measure, data in drawable_measures(result, console):
        print_heading(result, data, console)
        frame = figure_frame(result, measure)
        shares = _Shares(titles, label_widths(titles, labels, console.width - SHARE_WIDTH))
        layout = IntervalLayout.of(frame, titles, labels, console.width, draw_bar)
        for panel in grid_panels(result, axes):
            if panel.title:
                console.print(Text(panel.title, style="bold"), highlight=False)
            lines = _label_cells(panel, values)
            if frame.is_category:
                shares.print(frame.cells, lines, console)
            else:
                layout.print(lines, console)
        drawn = layout.scale.width > 0
        if frame.is_category:
            print_notes(
                ["the most common value of every cell and its share of the prompts"], console
            )
            continue
        legend = ["▒ and ─: the interval on either side of the mean"] if drawn else []
        print_notes([*legend, *figure_notes(result, measure, drawn=drawn)], console)
    print_conventions(result, report, console)


def _label_cells(panel: GridPanel, values: list[list[Coord]]) -> list[LabelledCell]:
    """Return cells with their labels; a label is printed only when it changes."""
    keys = [(first, second) for first in values[0] for second in values[1]] if values[1:] else None
    cells: list[LabelledCell] = []
    last: Coord | None = None
    for key in keys or [(value,) for value in values[0]]:
        if key not in panel.cells:
            continue
        labels = ["" if key[0] == last else value_text(key[0]), *map(value_text, key[1:])]
        cells.append((labels, panel.cells[key]))
        last = key[0]
    return cells


@dataclass(frozen=True)
class _Shares:
    """The most frequent value of every cell with a bar for its share."""

    titles: Sequence[str]
    widths: Sequence[int]

    def print(
        self, cells: Sequence[FigureCell], lines: Sequence[LabelledCell], console: Console
    ) -> None:
        head = f"{label_lines(self.titles, self.widths)[0]}  {'n':>5}  commonest  share"
        room = min(MAX_BAR, console.width - len(head) - 2)
        console.print(Text(head, style="dim"), highlight=False, soft_wrap=True)
        for texts, number in lines:
            first, *more = label_lines(texts, self.widths)
            cell = cells[number]
            known = math.isfinite(cell.share)
            value, share = (cell.map_text, f"{cell.share:.3f}") if known else (MISSING, MISSING)
            text = Text().append(first, style="bold").append(f"  {cell.n:>5}")
            text.append(f"  {value:>9}  {share:>5}")
            if known and room >= MIN_BAR:
                text.append("  ").append("█" * round(cell.share * room), style="blue")
            text.rstrip()
            console.print(text, highlight=False, soft_wrap=True)
            for line in more:
                console.print(Text(line.rstrip(), style="bold"), highlight=False)


# --- reports --------------------------------------------------------------------------------------


def render(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Print the report."""
    draw = _print_bars if report.kind == "bars" else _print_lines
    draw(result, report, console)


def chart(result: ExperimentResult, report: spec.Report) -> Any:
    """Return the altair chart."""
    from mechdsl.show.reports.series_charts import bars_chart, lines_chart

    draw = bars_chart if report.kind == "bars" else lines_chart
    return draw(result, report)
