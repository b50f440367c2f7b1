"""`report bars`: one bar per cell with its interval; for categories, the share of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from mechdsl.program import spec
from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.grid import (
    GridPanel,
    axis_title,
    axis_values,
    drawn_axes,
    grid_panels,
    value_text,
)
from mechdsl.show.reports.intervals import (
    IntervalLayout,
    LabelledCell,
    draw_bar,
    label_lines,
    label_widths,
)
from mechdsl.show.reports.text import (
    MISSING,
    drawable_measures,
    figure_notes,
    print_conventions,
    print_heading,
    print_notes,
)
from mechdsl.statistics.measurements import CellStatistics

MAX_BAR, MIN_BAR = 40, 10
"""Characters of a bar for a share of 1."""

SHARE_WIDTH = len("      n  commonest  share")


def render(result: ExperimentResult, report: spec.Report, console: Console) -> None:
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
            lines = _lines(panel, values)
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


def _lines(panel: GridPanel, values: list[list[Coord]]) -> list[LabelledCell]:
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


def chart(result: ExperimentResult, report: spec.Report) -> Any:
    """Return the altair chart."""
    from mechdsl.show.reports.series_charts import bars_chart

    return bars_chart(result, report)
