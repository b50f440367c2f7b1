"""`report lines X [by SERIES]`: the effect along one axis, with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from mechdsl import spec
from mechdsl.results.cell import Coord
from mechdsl.results.experiment import ExperimentResult
from mechdsl.vocab.reports.grid import axis_name, panels, values_of
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

LEAST_GAUGE, MOST_GAUGE = 12, 60
"""Characters that the drawn intervals take at least (else only numbers are shown) and at most."""


def render(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Per series one row per value: mean, interval, and the interval drawn to scale."""
    axis = axis_name(result, report.variable or "")
    for measure, data in enumerate(result.measures):
        heading(result, data, console)
        if data.kind == "category":
            notes(["a category has no line: see `report table`"], console)
            continue
        layout = _Layout.of(result, measure, axis, console.width)
        for panel in panels(result, (axis,)):
            if panel.title:
                console.print(Text(panel.title, style="bold"), highlight=False)
            layout.print({key[0]: cell for key, cell in panel.cells.items()}, console)
        survived, inert = survivors(result, measure), inert_note(result, measure)
        notes([*([f"* {survived}"] if survived else []), *([inert] if inert else [])], console)
    conventions(result, report, console)


@dataclass(frozen=True)
class _Layout:
    """Texts and widths of all series of a measure, so that they line up."""

    axis: str
    labels: dict[Coord, str]
    means: list[str]
    """Per cell, with a mark where it survives the correction."""
    intervals: list[str]
    ends: list[tuple[float, float, float]]
    scale: tuple[str, str]
    """Both ends of the drawn scale, as text."""
    title: str
    limits: tuple[float, float]
    room: int
    """Characters for the drawn intervals, 0 where there are too few."""

    @classmethod
    def of(cls, result: ExperimentResult, measure: int, axis: str, width: int) -> _Layout:
        found = result.statistics[measure]
        everything = np.concatenate([found.mean, found.low, found.high])
        write = number_format(everything)
        level = alpha(result)
        means = [
            write(mean) + ("*" if corrected < level else " ")
            for mean, corrected in zip(found.mean, found.p_corrected, strict=True)
        ]
        intervals = [
            f"[{write(low)}, {write(high)}]" if math.isfinite(low) else MISSING
            for low, high in zip(found.low, found.high, strict=True)
        ]
        confidence = result.settings.confidence if result.settings else 95.0
        title = f"{confidence:g} % interval"
        labels = {value: str(value) for value in values_of(result, axis)}
        # the scale runs over all series alike, 0 included, so that they can be compared
        limits = float(np.nanmin([*everything, 0.0])), float(np.nanmax([*everything, 0.0]))
        taken = _longest([axis, *labels.values()]) + _longest(means) + _longest([title, *intervals])
        room = min(MOST_GAUGE, width - taken - 6)
        ends = list(zip(found.mean.tolist(), found.low.tolist(), found.high.tolist(), strict=True))
        scale = write(limits[0]), write(limits[1])
        room = room if room >= LEAST_GAUGE else 0
        return cls(axis, labels, means, intervals, ends, scale, title, limits, room)

    def print(self, cells: dict[Coord, int], console: Console) -> None:
        """One series."""
        first = _longest([self.axis, *self.labels.values()])
        second = _longest(self.means)
        third = _longest([self.title, *self.intervals])
        head = f"{self.axis:<{first}}  {'mean':>{second - 1}}   {self.title:<{third}}"
        if self.room:
            left, right = self.scale
            head += f"  {left}{right:>{max(1, self.room - len(left))}}"
        console.print(Text(head.rstrip(), style="dim"), highlight=False, soft_wrap=True)
        for value, label in self.labels.items():
            if value not in cells:
                continue
            cell = cells[value]
            text = Text().append(f"{label:<{first}}", style="bold")
            text.append(f"  {self.means[cell]:>{second}}  {self.intervals[cell]:<{third}}")
            if self.room:
                text.append("  ")
                text.append(gauge(*self.ends[cell], *self.limits, self.room), style="blue")
            text.rstrip()
            console.print(text, highlight=False, soft_wrap=True)


def _longest(texts: Iterable[str]) -> int:
    return max(map(len, texts))


def gauge(mean: float, low: float, high: float, left: float, right: float, width: int) -> str:
    """The interval as a line with its mean, and 0 as a bar, on a scale from left to right."""
    if not math.isfinite(mean) or right <= left:
        return ""

    def at(value: float) -> int:
        return round((value - left) / (right - left) * (width - 1))

    drawn = [" "] * width
    drawn[at(0.0)] = "│"
    if math.isfinite(low):
        for place in range(at(low), at(high) + 1):
            drawn[place] = "─"
    drawn[at(mean)] = "●"
    return "".join(drawn).rstrip()


def save(result: ExperimentResult, report: spec.Report, path: Path) -> None:
    """As SVG, PNG or a standalone HTML page."""
    from mechdsl.vocab.reports.charts import lines_chart, save_chart

    save_chart(lines_chart(result, report), path)
