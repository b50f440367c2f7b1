"""`report confusion` as a chart."""

from __future__ import annotations

from typing import Any

import altair as alt

from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.chart_labels import (
    LABEL_SIZE,
    ChartLabels,
    labels_below,
    labels_beside,
    text_width,
)
from mechdsl.show.reports.charts import (
    INK,
    QUIET,
    beside,
    faceted,
    heading,
    hovered,
    themed,
    titled,
)
from mechdsl.show.reports.confusion_counts import Confusion, confusions
from mechdsl.show.reports.grid import axis_title, value_text

NUMBERED_UP_TO = 160
"""Cells of a map up to which their numbers are written into them."""
SHARE, COUNT = 11, 9
"""Sizes of the two numbers of a cell."""
GAP = 12
"""Between a label and `n`."""
N = "n"
"""The column behind the categories: the row's prompts."""
MOST_WIDTH = 1000
"""Of a map, up to which its columns grow for their labels."""


def confusion_chart(result: ExperimentResult, report: spec.Report) -> Any:
    """Shares on a map, counts below them; one's own category is framed."""
    maps: list[Any] = []
    for measure, found in confusions(result, report).items():
        own = any(column is not None for each in found for column in each.own)
        framed = f"framed: the category is the row's own {report.variable}" if own else None
        row_title = axis_title(result, report.variable or "")
        drawn = _map(found, row_title, report.by or "")
        maps.append(titled(drawn, result, result.measures[measure], framed))
    return themed(alt.vconcat(*maps, spacing=36))


def _with_n(below: ChartLabels) -> dict[str, Any]:
    """How the axis is labelled with the column of n behind it. Where not all numbers are written,
    the last one is left out if it would reach it."""
    if "values" not in below.options:
        return below.options
    written = list(below.options["values"])
    reach = text_width(written[-1], LABEL_SIZE) / 2 + GAP
    if (len(below.texts) - below.texts.index(written[-1])) * below.step < reach:
        written.pop()
    return {**below.options, "values": [*written, N]}


def _map(found: list[Confusion], row_title: str, column_title: str) -> Any:
    rows = list(dict.fromkeys(name for each in found for name in each.rows))
    columns = list(dict.fromkeys(column for each in found for column in each.columns))
    numbered = len(rows) * len(columns) <= NUMBERED_UP_TO
    most = max((count for each in found for row in each.counts for count in row), default=0)
    step = max(40.0, text_width(str(most), COUNT) + 6) if numbered else 18.0
    shown = [int(c) if c.is_integer() else float(f"{c:g}") for c in columns]
    below = labels_below(shown, step, MOST_WIDTH)
    names_of_rows = labels_beside(rows, 34 if numbered else 18)
    width = below.step * (len(columns) + 1)
    names = dict(zip(columns, below.texts, strict=True))
    records = [
        {
            "row": value_text(name),
            "column": names[column],
            "share": each.share(r, c) if total else None,
            "text": f"{each.share(r, c):.2f}" if count else "",
            "below": f"{count}" if count else "",
            "own": each.own[r] == c and total > 0,
            "panel": heading(each.title, width),
            "hover": f"{value_text(name)}, {column:g}: {count} of n = {total}",
        }
        for each in found
        for r, name in enumerate(each.rows)
        for total in [each.total(r)]
        for c, column in enumerate(each.columns)
        for count in [each.counts[r][c]]
    ]
    records += [
        {
            "row": value_text(name),
            "column": N,
            "text": str(each.total(r)),
            "panel": heading(each.title, width),
            "hover": f"{value_text(name)}: n = {each.total(r)}",
        }
        for each in found
        for r, name in enumerate(each.rows)
    ]
    plain: dict[str, Any] = {"ticks": False, "domain": False}
    base = hovered(alt.Chart()).encode(
        x=alt.X(
            "column:N",
            scale=alt.Scale(domain=[*below.texts, N]),
            axis=alt.Axis(title=column_title, **plain, **_with_n(below)),
        ),
        y=alt.Y(
            "row:N",
            scale=alt.Scale(domain=names_of_rows.texts),
            axis=alt.Axis(title=row_title, **plain, **names_of_rows.options),
        ),
    )
    scale = alt.Scale(domain=[0, 1], range=["#f7f7f7", "#2166ac"])
    legend = alt.Legend(
        title="share", gradientLength=120, format=".1f", **beside(width, len(found))
    )
    layers: list[Any] = [
        base.transform_filter(f"datum.column != '{N}'")
        .mark_rect(stroke="white", strokeWidth=1.5)
        .encode(
            color=alt.Color("share:Q", scale=scale, legend=legend),
        ),
        base.transform_filter("datum.own").mark_rect(filled=False, stroke=INK, strokeWidth=1.2),
        base.transform_filter(f"datum.column == '{N}'")
        .mark_text(fontSize=COUNT, color=QUIET)
        .encode(text="text:N"),
    ]
    if numbered:
        ink = alt.condition("datum.share > 0.6", alt.value("white"), alt.value(INK))
        quiet = alt.condition("datum.share > 0.6", alt.value("#dddddd"), alt.value(QUIET))
        shares = base.transform_filter(f"datum.column != '{N}'")
        layers.append(shares.mark_text(fontSize=SHARE, dy=-5).encode(text="text:N", color=ink))
        layers.append(shares.mark_text(fontSize=COUNT, dy=8).encode(text="below:N", color=quiet))
    drawn = alt.layer(*layers, data=alt.Data(values=records)).properties(
        width=alt.Step(below.step), height=alt.Step(names_of_rows.step)
    )
    return faceted(drawn, [each.title for each in found], width)
