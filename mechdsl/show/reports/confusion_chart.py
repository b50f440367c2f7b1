"""`report confusion` as a chart."""

from __future__ import annotations

from typing import Any

import altair as alt

from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.charts import INK, LABELLED_UP_TO, QUIET, faceted, themed, titled
from mechdsl.show.reports.confusion_counts import Confusion, confusions
from mechdsl.show.reports.grid import value_text


def confusion_chart(result: ExperimentResult, report: spec.Report) -> Any:
    """Shares on a map, counts below them; one's own category is framed."""
    maps = [
        titled(_map(found, report), result, result.measures[measure])
        for measure, found in confusions(result, report).items()
    ]
    return themed(alt.vconcat(*maps, spacing=36))


def _map(found: list[Confusion], report: spec.Report) -> Any:
    records = [
        {
            "row": value_text(name),
            "column": f"{column:g}",
            "share": each.share(r, c) if each.total(r) else None,
            "count": each.counts[r][c],
            "text": f"{each.share(r, c):.2f}" if each.counts[r][c] else "",
            "below": f"{each.counts[r][c]}" if each.counts[r][c] else "",
            "own": each.own[r] == c and each.total(r) > 0,
            "panel": each.title,
        }
        for each in found
        for r, name in enumerate(each.rows)
        for c, column in enumerate(each.columns)
    ]
    rows = list(dict.fromkeys(str(record["row"]) for record in records))
    columns = list(dict.fromkeys(str(record["column"]) for record in records))
    labelled = len(rows) * len(columns) <= LABELLED_UP_TO
    plain: dict[str, Any] = {"ticks": False, "domain": False, "labelLimit": 240}
    base = alt.Chart(alt.Data(values=records)).encode(
        x=alt.X("column:N", sort=columns, axis=alt.Axis(title=report.by, labelAngle=0, **plain)),
        y=alt.Y("row:N", sort=rows, axis=alt.Axis(title=report.variable, **plain)),
    )
    scale = alt.Scale(domain=[0, 1], range=["#f7f7f7", "#2166ac"])
    legend = alt.Legend(title="share", gradientLength=120, format=".1f")
    layers: list[Any] = [
        base.mark_rect(stroke="white", strokeWidth=1.5).encode(
            color=alt.Color("share:Q", scale=scale, legend=legend),
            tooltip=["row:N", "column:N", "share:Q", "count:Q"],
        ),
        base.transform_filter("datum.own").mark_rect(filled=False, stroke=INK, strokeWidth=1.2),
    ]
    if labelled:
        ink = alt.condition("datum.share > 0.6", alt.value("white"), alt.value(INK))
        quiet = alt.condition("datum.share > 0.6", alt.value("#dddddd"), alt.value(QUIET))
        layers.append(base.mark_text(fontSize=11, dy=-5).encode(text="text:N", color=ink))
        layers.append(base.mark_text(fontSize=9, dy=8).encode(text="below:N", color=quiet))
    step = (40, 34) if labelled else (18, 18)
    drawn = alt.layer(*layers).properties(width=alt.Step(step[0]), height=alt.Step(step[1]))
    return faceted(drawn, [each.title for each in found], 3)
