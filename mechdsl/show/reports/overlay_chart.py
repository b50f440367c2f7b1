"""`report overlay` as a chart: shaded tokens in running lines, numbers below them."""

from __future__ import annotations

from typing import Any

import altair as alt

from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.charts import INK, QUIET, hovered, stacked, titled
from mechdsl.show.reports.matrix import colour
from mechdsl.show.reports.overlay_page import (
    BOX,
    LINE,
    MONO,
    columns_of,
    hover,
    ink_on,
    left_of,
    places_of,
    rgb,
    widths_of,
)
from mechdsl.show.reports.text import map_format
from mechdsl.show.reports.token_shades import Overlay, overlays, remarks

TITLE = 22
"""Height of the line above a prompt."""


def overlay_chart(result: ExperimentResult, report: spec.Report) -> Any:
    """One chart per measure that is a number, the prompts below each other."""
    charts: list[Any] = []
    for measure, shown in overlays(result, report).items():
        chart = titled(_tokens(shown), result, result.measures[measure])
        chart.title.subtitle = [*chart.title.subtitle, *remarks(result, measure, shown)]
        charts.append(chart)
    return stacked(charts, result)


def _tokens(shown: Overlay) -> Any:
    write = map_format([shown.limit])
    tokens: list[dict[str, Any]] = []
    titles: list[dict[str, Any]] = []
    top = 0
    for each in shown.prompts:
        titles.append({"x": 0, "y": top + TITLE / 2, "text": f"prompt {each.prompt + 1}"})
        top += TITLE
        columns = columns_of(each, write)
        widths, left = widths_of(columns), left_of(each)
        places = places_of(widths, left)
        for title, values in each.rows:
            titles.append({"x": 0, "y": top + BOX / 2, "text": title})
            for token, column, value, width, (line, x) in zip(
                each.tokens, columns, values, widths, places, strict=True
            ):
                shade, y = colour(value, shown.limit), top + line * LINE
                tokens.append(
                    {
                        "token": column.text,
                        "effect": column.number(value),
                        "hover": hover(token, column.number(value)),
                        "left": x,
                        "right": x + width,
                        "middle": x + width / 2,
                        "top": y,
                        "bottom": y + BOX,
                        "within": y + BOX / 2,
                        "below": y + BOX + 8,
                        "shade": rgb(shade),
                        "ink": ink_on(shade),
                    }
                )
            top += LINE * (1 + max((line for line, _ in places), default=0))
    size = max((token["right"] for token in tokens), default=0), top
    return _drawn(tokens, titles, size)


def _drawn(tokens: list[dict[str, Any]], titles: list[dict[str, Any]], size: Any) -> Any:
    """Places are points of the picture, so both scales are as long as their sides."""
    width, height = size
    across = alt.Scale(domain=[0, width], nice=False, zero=False)
    down = alt.Scale(domain=[height, 0], nice=False, zero=False)

    def x(field: str) -> Any:
        return alt.X(f"{field}:Q", scale=across, axis=None)

    def y(field: str) -> Any:
        return alt.Y(f"{field}:Q", scale=down, axis=None)

    placed = hovered(alt.Chart(alt.Data(values=tokens)))
    boxes = placed.mark_rect(cornerRadius=3).encode(
        x=x("left"),
        x2="right:Q",
        y=y("top"),
        y2="bottom:Q",
        color=alt.Color("shade:N", scale=None),
    )
    words = placed.mark_text(font=MONO, fontSize=13).encode(
        x=x("middle"), y=y("within"), text="token:N", color=alt.Color("ink:N", scale=None)
    )
    numbers = placed.mark_text(font=MONO, fontSize=10, color=QUIET).encode(
        x=x("middle"), y=y("below"), text="effect:N"
    )
    labels = (
        alt.Chart(alt.Data(values=titles))
        .mark_text(align="left", fontSize=12, color=INK)
        .encode(x=x("x"), y=y("y"), text="text:N")
    )
    return alt.layer(boxes, words, numbers, labels).properties(width=width, height=height)
