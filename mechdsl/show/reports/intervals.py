"""Intervals drawn to scale, for `report lines` and `report bars`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from textwrap import wrap

import numpy as np
from rich.console import Console
from rich.text import Text

from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.text import (
    THIN_MARK,
    has_fewer_prompts,
    is_thin,
    mean_texts,
    null_texts,
    number_format,
    significance_marks,
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
