"""`report lines` as a chart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from mechdsl.program import spec
from mechdsl.resolve.cell_key import Coord
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.chart_labels import LABEL_SIZE, labels_below, text_width
from mechdsl.show.reports.charts import (
    FAINT,
    PALETTE,
    beside,
    colours,
    count_texts,
    faceted,
    faint_said,
    heading,
    hovered,
    hovers,
    null_band,
    null_said,
    own_counts,
    series_legend,
    stacked,
    titled,
    value_title,
    zero_rule,
)
from mechdsl.show.reports.grid import (
    axis_name,
    axis_title,
    number,
    numeric,
    panels,
    value_text,
    values_of,
)
from mechdsl.show.reports.text import fewer_note, thin

LEAST_WIDTH, MOST_WIDTH = 320, 640
"""Of a panel along numbers."""
PLACE, SERIES = 36, 8
"""Width of a value that is a word, and of a point of one series in it."""
WORDS_WIDTH = 1200
"""Of a panel along words, up to which its places grow for their labels."""
BAND = 14
"""Width of a null band that stands behind a single point."""
DASHES = [[1, 0], [7, 4], [2, 3], [10, 3, 2, 3], [4, 2], [12, 5], [1, 2], [6, 2, 1, 2, 1, 2]]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]


def lines_chart(result: ExperimentResult, report: spec.Report) -> Any:
    """The effect along one axis with its interval as a band, one line per series."""
    axis = report.variable or ""
    series = None if report.by is None else axis_name(result, report.by)
    charts = [
        titled(drawn, result, data, null_said(result, data), counts, faint_said(result, data))
        for measure, data in result.computed()
        if data.kind == "number"
        for drawn, counts in [_lines(result, measure, axis, series)]
    ]
    return stacked(charts, result)


def _lines(
    result: ExperimentResult, measure: int, word: str, series: str | None
) -> tuple[Any, str | None]:
    """The chart, and where n stands in it of cells with fewer prompts."""
    found, band = result.statistics[measure], result.control(measure)
    few, under, axis = thin(result, measure), hovers(result, measure), axis_name(result, word)
    values = values_of(result, axis)
    numbered = numeric(values)
    shown = panels(result, (axis,) if series is None else (axis, series))

    def line_of(panel_title: str, key: tuple[Coord, ...]) -> str:
        return (panel_title if series is None else value_text(key[1])) or " "

    seen = [line_of(panel.title, key) for panel in shown for key in panel.cells]
    lines = list(dict.fromkeys(seen))
    if series is not None:
        lines = [value_text(value) or " " for value in values_of(result, series)]
    title = axis_title(result, word) if axis != "position" else None
    step = max(PLACE, SERIES * len(lines))
    x, names, width = (_along_numbers if numbered else _along_words)(values, title, step)

    def end(ends: Any, cell: int) -> float | None:
        return float(ends[cell]) if np.isfinite(ends[cell]) else None

    records = [
        {
            "x": names[key[0]],
            "line": line_of(panel.title, key),
            "panel": heading(panel.title, width) if series is not None else "",
            "mean": float(found.mean[cell]),
            "n": int(found.n[cell]),
            "top": float(np.nanmax([found.mean[cell], found.high[cell]])),
            "strength": FAINT if few[cell] else 1.0,
            "low": end(found.low, cell),
            "high": end(found.high, cell),
            "null_low": end(band.low, cell) if band else None,
            "null_high": end(band.high, cell) if band else None,
            "hover": under[cell],
        }
        for panel in shown
        for key, cell in panel.cells.items()
        if np.isfinite(found.mean[cell])
    ]
    lines, where = _counted(result, measure, records, lines, numbered=numbered)
    place = beside(width, len(shown) if series is not None else 1)
    base, apart = alt.Chart().encode(x=x), _told_apart(lines, series, place)
    base = base.encode(color=apart.pop("color"))
    if not numbered and len(lines) > 1:
        base = base.encode(xOffset=alt.XOffset("line:N", sort=lines))
    layers = _layers(base, value_title(result.measures[measure]), apart, numbered)
    if where == "small":
        layers.append(count_texts(base, "top"))
    if band is not None:
        wide = {} if numbered else {"size": min(BAND, width / len(values) / len(lines))}
        form = "area" if numbered else "bar"
        layers.insert(0, null_band(base, form, len(lines), **wide))
    plot = alt.layer(*layers, data=alt.Data(values=records)).properties(width=width, height=280)
    if series is not None:
        plot = faceted(plot, [panel.title for panel in shown], width)
    return plot, fewer_note(result, measure, where)


def _counted(
    result: ExperimentResult,
    measure: int,
    records: list[dict[str, Any]],
    lines: list[str],
    *,
    numbered: bool,
) -> tuple[list[str], str]:
    """The names of the lines, with n where each line has its own; and where n is found. At points
    it is written where the largest n isn't theirs, once for those above each other."""
    few, own = own_counts(result, measure), dict[str, set[int]]()
    at_place = dict[tuple[object, ...], list[dict[str, Any]]]()
    for record in records:
        own.setdefault(record["line"], set()).add(record["n"])
        at_place.setdefault((record["panel"], record["x"]), []).append(record)
    most = max((record["n"] for record in records), default=0)
    if len(lines) > 1 and numbered and any(few) and all(len(each) == 1 for each in own.values()):
        names = {line: f"{line} (n = {min(each)})" for line, each in own.items()}
        for record in records:
            record["line"], record["n"] = names[record["line"]], ""
        return [names.get(line, line) for line in lines], "beside the names"
    alike = all(len({r["n"] for r in each}) == 1 for each in at_place.values())
    written = any(few) and (alike or not numbered or len(lines) < 2)
    for each in at_place.values():
        highest = max(each, key=lambda record: record["top"])
        together = len({record["n"] for record in each}) == 1
        for record in each:
            shown = record["n"] < most and (record is highest or not together)
            record["n"] = str(record["n"]) if written and shown else ""
    return lines, "small" if written else "under the pointer"


def _along_numbers(values: Sequence[Coord], title: str | None, step: float) -> Any:
    """The axis, where each value stands on it, and its width."""
    percent = all(str(value).endswith("%") for value in values)
    whole = all(isinstance(value, int) for value in values)
    width = min(MOST_WIDTH, max(LEAST_WIDTH, PLACE * len(values)))
    widest = max(text_width(value_text(value), LABEL_SIZE) for value in values)
    every = int(np.ceil((widest + 8) * len(values) / width))
    ticks: Any = values[::every] if whole else alt.Undefined
    axis = alt.Axis(
        title=title,
        values=ticks,
        format="d" if whole else "~r" if percent else "~g",
        labelExpr="datum.label + '%'" if percent else alt.Undefined,
        labelOverlap="greedy",
        grid=False,
    )
    ends = [number(values[0]), number(values[-1])]
    scale = alt.Scale(domain=ends, nice=False, padding=12)
    return alt.X("x:Q", scale=scale, axis=axis), {v: number(v) for v in values}, width


def _along_words(values: Sequence[Coord], title: str | None, step: float) -> Any:
    """The same of words."""
    labels = labels_below(values, min(step, WORDS_WIDTH / len(values)), WORDS_WIDTH)
    x = alt.X(
        "x:N",
        scale=alt.Scale(domain=labels.texts),
        axis=alt.Axis(title=title, **labels.options),
    )
    names = dict(zip(values, labels.texts, strict=True))
    return x, names, max(LEAST_WIDTH, labels.step * len(values))


def _told_apart(lines: list[str], series: str | None, place: dict[str, Any]) -> dict[str, Any]:
    """Colour, dashes and points of their own for every line: one that lies on another leaves gaps
    where that is seen, and its points are open."""
    if len(lines) < 2:
        return {"color": alt.value(PALETTE[0])}
    legend = series_legend(series if series != "position" else None, lines, place)
    dashes = [*DASHES, *([6 + n, 3] for n in range(len(lines)))][: len(lines)]
    shapes = [SHAPES[n % len(SHAPES)] for n in range(len(lines))]
    dash, shape = (alt.Scale(domain=lines, range=looks) for looks in (dashes, shapes))
    return {
        "color": alt.Color("line:N", sort=lines, scale=colours(lines), legend=legend),
        "shape": alt.Shape("line:N", sort=lines, scale=shape, legend=legend),
        # without a legend, which would break the outlines of the points
        "strokeDash": alt.StrokeDash("line:N", sort=lines, scale=dash, legend=None),
    }


def _layers(base: Any, title: str, apart: dict[str, Any], numbered: bool) -> list[Any]:
    """From the back to the front."""
    dashes, shapes = ({key: apart[key]} if apart else {} for key in ("strokeDash", "shape"))
    y = alt.Y("mean:Q", axis=alt.Axis(title=title))
    ends = {"y": alt.Y("low:Q"), "y2": "high:Q"}
    named = hovered(base, "line")  # a line is one mark, which has no number of its own
    interval = named.mark_area(opacity=0.18, line=False).encode(**ends)
    if not numbered:
        interval = hovered(base).mark_rule(strokeWidth=2).encode(**ends)
    points = hovered(base).mark_point(size=36, filled=not apart, strokeWidth=1.5)
    points = points.encode(y=y, **shapes, opacity=alt.Opacity("strength:Q", scale=None))
    drawn = [named.mark_line(strokeWidth=2).encode(y=y, **dashes)] if numbered else []
    return [zero_rule(), interval, *drawn, points]
