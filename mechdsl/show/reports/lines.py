"""`report lines`: effects along one axis, one value per line of the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.grid import axis_name, axis_title, axis_values, grid_panels, value_text
from mechdsl.show.reports.intervals import IntervalLayout, draw_point
from mechdsl.show.reports.text import (
    drawable_measures,
    figure_notes,
    print_conventions,
    print_heading,
    print_notes,
)


def render(result: ExperimentResult, report: spec.Report, console: Console) -> None:
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


def chart(result: ExperimentResult, report: spec.Report) -> Any:
    """Return the altair chart."""
    from mechdsl.show.reports.series_charts import lines_chart

    return lines_chart(result, report)
