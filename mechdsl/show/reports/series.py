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
    GridPanel,
    axis_name,
    axis_title,
    axis_values,
    drawn_axes,
    grid_panels,
    value_text,
)
from mechdsl.show.reports.text import (
    MISSING,
    THIN_MARK,
    drawable_measures,
    figure_notes,
    has_fewer_prompts,
    is_thin,
    mean_texts,
    null_texts,
    number_format,
    print_conventions,
    print_heading,
    print_notes,
    significance_marks,
)
from mechdsl.statistics.measurements import CellStatistics

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


@dataclass(frozen=True)
class IntervalEnds:
    """The drawn numbers of a cell."""

    mean: float
    low: float
    high: float
    null: tuple[float, float]


IntervalDrawer = Callable[[IntervalEnds, TextScale], str]

LabelledCell = tuple[Sequence[str], int]
"""Labels of a line, and its cell."""


def _empty_gauge(ends: IntervalEnds, scale: TextScale) -> list[str]:
    """Return a line with only the null band and a bar at 0."""
    drawn = [" "] * scale.width
    if math.isfinite(sum(ends.null)):
        for place in range(scale.at(ends.null[0]), scale.at(ends.null[1]) + 1):
            drawn[place] = "░"
    drawn[scale.at(0.0)] = "│"
    return drawn


def draw_point(ends: IntervalEnds, scale: TextScale) -> str:
    """Draw the interval as a line with its mean."""
    if not math.isfinite(ends.mean) or scale.right <= scale.left:
        return ""
    drawn = _empty_gauge(ends, scale)
    if math.isfinite(ends.low):
        for place in range(scale.at(ends.low), scale.at(ends.high) + 1):
            drawn[place] = "─"
    drawn[scale.at(ends.mean)] = "●"
    return "".join(drawn).rstrip()


def draw_bar(ends: IntervalEnds, scale: TextScale) -> str:
    """Draw a bar from 0 to the mean; the interval is light within the bar and a line beyond."""
    if not math.isfinite(ends.mean) or scale.right <= scale.left:
        return ""
    drawn = _empty_gauge(ends, scale)
    zero, mean = scale.at(0.0), scale.at(ends.mean)
    bar = range(zero + 1, mean + 1) if mean > zero else range(mean, zero)
    for place in bar:
        drawn[place] = "█"
    if math.isfinite(ends.low):
        for place in range(scale.at(ends.low), scale.at(ends.high) + 1):
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

    titles: Sequence[str]
    """Titles of the labels."""
    widths: Sequence[int]
    """Widths of the labels."""
    means: list[str]
    """Mean of each cell, with a mark if it is significant after correction."""
    counts: list[str]
    """n of each cell; empty if all are equal."""
    intervals: list[str]
    interval_title: str
    nulls: list[str]
    control: str
    """Heading of `nulls`."""
    """Null band of each cell; empty without one or without room."""
    ends: list[IntervalEnds]
    scale: TextScale
    scale_texts: tuple[str, str]
    draw: IntervalDrawer

    @classmethod
    def of(
        cls,
        result: ExperimentResult,
        measure: int,
        titles: Sequence[str],
        labels: Sequence[Sequence[str]],
        width: int,
        draw: IntervalDrawer,
    ) -> IntervalLayout:
        """Lay out a measure; `labels` are all labels of each title."""
        found, band = result.statistics[measure], result.control(measure)
        null = np.full((2, len(found.mean)), np.nan) if band is None else [band.low, band.high]
        everything = np.concatenate([found.mean, found.low, found.high, *null])
        write = number_format(everything)
        texts = mean_texts(result, measure, range(len(found.mean)), write)
        intervals = [interval for _, interval in texts]
        means = [
            (THIN_MARK if few else "") + mean + mark
            for (mean, _), mark, few in zip(
                texts, significance_marks(result, measure), is_thin(result, measure), strict=True
            )
        ]
        confidence = result.settings.confidence if result.settings else 95.0
        title = f"{confidence:g} % interval"
        nulls = [] if band is None else null_texts(band, found, range(len(found.mean)), write)
        ends = [
            IntervalEnds(float(mean), float(low), float(high), (float(least), float(most)))
            for mean, low, high, least, most in zip(
                found.mean, found.low, found.high, *null, strict=True
            )
        ]
        counts = [str(int(n)) for n in found.n] if has_fewer_prompts(result, measure).any() else []
        numbers = (
            _max_length([MEAN_TITLE, *means]) + _max_length([title, *intervals]) + 3 * COLUMN_GAP
        )
        numbers += _max_length(counts) + COLUMN_GAP if counts else 0
        widths = label_widths(titles, labels, width - numbers)
        taken = sum(widths) + COLUMN_GAP * (len(widths) - 1) + numbers
        if nulls and taken + _max_length(nulls) > width:
            nulls = []
        room = min(MAX_GAUGE, width - taken - (_max_length(nulls) + COLUMN_GAP if nulls else 0))
        # All panels share the scale, which includes 0, so that they can be compared.
        limits = float(np.nanmin([*everything, 0.0])), float(np.nanmax([*everything, 0.0]))
        scale = TextScale(*limits, room if room >= MIN_GAUGE and limits[0] < limits[1] else 0)
        texts = write(limits[0]), write(limits[1])
        named = "" if band is None else band.title
        shown = (titles, widths, means, counts, intervals, title, nulls, named)
        return cls(*shown, ends, scale, texts, draw)

    def print(self, lines: Sequence[LabelledCell], console: Console) -> None:
        """Print one panel."""
        second = _max_length([MEAN_TITLE, *self.means])
        third = _max_length([self.interval_title, *self.intervals])
        fourth = _max_length([self.control, *self.nulls])
        heads = [f"{name:<{width}}" for name, width in zip(self.titles, self.widths, strict=True)]
        n_width = _max_length(["n", *self.counts])
        head = (
            "  ".join(heads)
            + (f"  {'n':>{n_width}}" if self.counts else "")
            + f"  {MEAN_TITLE:>{second}}  {self.interval_title:<{third}}"
            + (f"  {self.control:<{fourth}}" if self.nulls else "")
        )
        if self.scale.width:
            left, right = self.scale_texts
            head += f"  {left}{right:>{max(1, self.scale.width - len(left))}}"
        console.print(Text(head.rstrip(), style="dim"), highlight=False, soft_wrap=True)
        for labels, cell in lines:
            first, *more = label_lines(labels, self.widths)
            text = Text().append(first, style="bold")
            if self.counts:
                text.append(f"  {self.counts[cell]:>{n_width}}")
            text.append(f"  {self.means[cell]:>{second}}  {self.intervals[cell]:<{third}}")
            if self.nulls:
                text.append(f"  {self.nulls[cell]:<{fourth}}")
            if self.scale.width:
                text.append("  ")
                text.append(self.draw(self.ends[cell], self.scale), style="blue")
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
        layout = IntervalLayout.of(result, measure, [title], [labels], console.width, draw_point)
        for panel in grid_panels(result, (axis,)):
            if panel.title:
                console.print(Text(panel.title, style="bold"), highlight=False)
            found = [
                ([value_text(value)], panel.cells[value,])
                for value in values
                if (value,) in panel.cells
            ]
            layout.print(found, console)
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
        category = data.kind == "category"
        shares = _Shares(titles, label_widths(titles, labels, console.width - SHARE_WIDTH))
        layout = IntervalLayout.of(result, measure, titles, labels, console.width, draw_bar)
        for panel in grid_panels(result, axes):
            if panel.title:
                console.print(Text(panel.title, style="bold"), highlight=False)
            lines = _label_cells(panel, values)
            if category:
                shares.print(result.statistics[measure], lines, console)
            else:
                layout.print(lines, console)
        drawn = layout.scale.width > 0
        if category:
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
    found: list[LabelledCell] = []
    last: Coord | None = None
    for key in keys or [(value,) for value in values[0]]:
        if key not in panel.cells:
            continue
        labels = ["" if key[0] == last else value_text(key[0]), *map(value_text, key[1:])]
        found.append((labels, panel.cells[key]))
        last = key[0]
    return found


@dataclass(frozen=True)
class _Shares:
    """The most frequent value of every cell with a bar for its share."""

    titles: Sequence[str]
    widths: Sequence[int]

    def print(self, found: CellStatistics, lines: Sequence[LabelledCell], console: Console) -> None:
        head = f"{label_lines(self.titles, self.widths)[0]}  {'n':>5}  commonest  share"
        room = min(MAX_BAR, console.width - len(head) - 2)
        console.print(Text(head, style="dim"), highlight=False, soft_wrap=True)
        for texts, cell in lines:
            first, *more = label_lines(texts, self.widths)
            share = float(found.share[cell])
            known = math.isfinite(share)
            value = f"{found.commonest[cell]:g}" if known else MISSING
            text = Text().append(first, style="bold").append(f"  {int(found.n[cell]):>5}")
            text.append(f"  {value:>9}  {f'{share:.3f}' if known else MISSING:>5}")
            if known and room >= MIN_BAR:
                text.append("  ").append("█" * round(share * room), style="blue")
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
