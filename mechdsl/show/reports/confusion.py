"""`report confusion`: the share of each category per value of an axis or of the prompts."""

from __future__ import annotations

from itertools import chain
from typing import Any

from rich.console import Console
from rich.text import Text

from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.grid import ConfusionCounts, axis_title, count_confusions, value_text
from mechdsl.show.reports.matrix import Matrix, MatrixEntry, diverging_colour
from mechdsl.show.reports.text import MISSING, print_conventions, print_heading, print_notes


def render(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Print one matrix per measure and combination of the remaining axes."""
    title = axis_title(result, report.variable or "")
    for measure, found in count_confusions(result, report).items():
        print_heading(result, result.measures[measure], console)
        for each in found:
            if each.title:
                console.print(Text(each.title, style="bold"), highlight=False)
            _matrix(each, report, title, console.width).print(console)
        said = [f"share of the row's n prompts; {MISSING}: none of them"]
        if any(own is not None for each in found for own in each.own):
            said.append(f"*: the category equals the row's {report.variable}")
        print_notes(said, console)
    print_conventions(result, report, console)


def _matrix(found: ConfusionCounts, report: spec.Report, title: str, width: int) -> Matrix:
    """Build a matrix of shares, with counts if there is room."""
    most = max(chain([0], *found.counts))
    counted = len(found.columns) * (len(f" 0.00 ({most})") + 2) + 24 <= width

    def entry(row: int, column: int) -> MatrixEntry:
        count, share = found.counts[row][column], found.share(row, column)
        mark = "*" if found.own[row] == column and found.total(row) else " "
        behind = f" ({count})" if counted and count else ""
        text = f"{share:.2f}{behind}" if count or mark == "*" else MISSING
        return MatrixEntry(
            text + mark, diverging_colour(share, 1.0) if count else None, mark == "*"
        )

    rows, columns = range(len(found.rows)), range(len(found.columns))
    return Matrix(
        [value_text(name) for name in found.rows],
        [*(f"{column:g}" for column in found.columns), "n"],
        [[*(entry(r, c) for c in columns), MatrixEntry(f"{found.total(r)} ")] for r in rows],
        title,
        report.by or "",
    )


def chart(result: ExperimentResult, report: spec.Report) -> Any:
    """Return the altair chart."""
    from mechdsl.show.reports.map_charts import confusion_chart

    return confusion_chart(result, report)
