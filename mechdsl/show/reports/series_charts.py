"""Charts of `report lines` and `report bars`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from mechdsl.base.text import escape_hidden
from mechdsl.program import spec
from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.canvas import INK, text_width
from mechdsl.show.reports.charts import (
    FAINT_OPACITY,
    LABEL_SIZE,
    PALETTE,
    ChartLabels,
    add_hover,
    add_title,
    column_labels,
    count_labels,
    count_marks,
    facet_chart,
    faint_caption,
    fewer_prompts_caption,
    hover_texts,
    legend_position,
    null_band_caption,
    null_band_layer,
    panel_header,
    series_colours,
    series_legend,
    stack_charts,
    value_title,
    zero_rule,
)
from mechdsl.show.reports.grid import (
    axis_name,
    axis_title,
    axis_values,
    drawn_axes,
    grid_panels,
    is_numeric,
    numeric_value,
    value_text,
)
from mechdsl.show.reports.text import fewer_prompts_note, is_thin

MIN_PANEL_WIDTH, MAX_LINES_WIDTH = 320, 640
"""Minimum and maximum width of a panel along numbers."""

WORD_WIDTH, SERIES_POINT_WIDTH = 36, 8
"""Width of a word value, and of one series' point within it."""

MAX_WORDS_WIDTH = 1200
"""Maximum width to which a panel along words grows for its labels."""

POINT_BAND_WIDTH = 14
"""Width of a null band around a single point."""

LINE_DASHES = [[1, 0], [7, 4], [2, 3], [10, 3, 2, 3], [4, 2], [12, 5], [1, 2], [6, 2, 1, 2, 1, 2]]

POINT_SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]


def lines_chart(result: ExperimentResult, report: spec.Report) -> Any:
    """Draw the effect along one axis with its interval as a band, one line per series."""
    axis = report.variable or ""
    series = None if report.by is None else axis_name(result, report.by)
    charts = [
        add_title(
            drawn,
            result,
            data,
            null_band_caption(result, data),
            counts,
            faint_caption(result, data),
        )
        for measure, data in result.computed()
        if data.kind == "number"
        for drawn, counts in [_lines_panel(result, measure, axis, series)]
    ]
    return stack_charts(charts, result)


def _lines_panel(
    result: ExperimentResult, measure: int, word: str, series: str | None
) -> tuple[Any, str | None]:
    """Return the chart, and where it shows n of cells with fewer prompts."""
    found, band = result.statistics[measure], result.control(measure)
    few, under, axis = (
        is_thin(result, measure),
        hover_texts(result, measure),
        axis_name(result, word),
    )
    values = axis_values(result, axis)
    numbered = is_numeric(values)
    shown = grid_panels(result, (axis,) if series is None else (axis, series))

    def line_of(panel_title: str, key: tuple[Coord, ...]) -> str:
        return (panel_title if series is None else value_text(key[1])) or " "

    seen = [line_of(panel.title, key) for panel in shown for key in panel.cells]
    lines = list(dict.fromkeys(seen))
    if series is not None:
        lines = [value_text(value) or " " for value in axis_values(result, series)]
    title = axis_title(result, word) if axis != "position" else None
    step = max(WORD_WIDTH, SERIES_POINT_WIDTH * len(lines))
    x, names, width = (_number_axis if numbered else _word_axis)(values, title, step)

    def end(ends: Any, cell: int) -> float | None:
        return float(ends[cell]) if np.isfinite(ends[cell]) else None

    records = [
        {
            "x": names[key[0]],
            "line": line_of(panel.title, key),
            "panel": panel_header(panel.title, width) if series is not None else "",
            "mean": float(found.mean[cell]),
            "n": int(found.n[cell]),
            "top": float(np.nanmax([found.mean[cell], found.high[cell]])),
            "strength": FAINT_OPACITY if few[cell] else 1.0,
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
    lines, where = _count_lines(result, measure, records, lines, numbered=numbered)
    place = legend_position(width, len(shown) if series is not None else 1)
    base, apart = alt.Chart().encode(x=x), _line_styles(lines, series, place)
    base = base.encode(color=apart.pop("color"))
    if not numbered and len(lines) > 1:
        base = base.encode(xOffset=alt.XOffset("line:N", sort=lines))
    layers = _line_layers(base, value_title(result.measures[measure]), apart, numbered)
    if where == "small":
        layers.append(count_marks(base, "top"))
    if band is not None:
        wide = {} if numbered else {"size": min(POINT_BAND_WIDTH, width / len(values) / len(lines))}
        form = "area" if numbered else "bar"
        layers.insert(0, null_band_layer(base, form, len(lines), **wide))
    plot = alt.layer(*layers, data=alt.Data(values=records)).properties(width=width, height=280)
    if series is not None:
        plot = facet_chart(plot, [panel.title for panel in shown], width)
    return plot, fewer_prompts_note(result, measure, where)


def _count_lines(
    result: ExperimentResult,
    measure: int,
    records: list[dict[str, Any]],
    lines: list[str],
    *,
    numbered: bool,
) -> tuple[list[str], str]:
    """Add n to the names of lines if each line has its own n; return the names and where n is
    shown. At points, n is shown if it is below the maximum, once for points above one another."""
    few, own = count_labels(result, measure), dict[str, set[int]]()
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


def _number_axis(values: Sequence[Coord], title: str | None, step: float) -> Any:
    """Return an axis of numbers, the position of each value on it, and its width."""
    percent = all(str(value).endswith("%") for value in values)
    whole = all(isinstance(value, int) for value in values)
    width = min(MAX_LINES_WIDTH, max(MIN_PANEL_WIDTH, WORD_WIDTH * len(values)))
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
    ends = [numeric_value(values[0]), numeric_value(values[-1])]
    scale = alt.Scale(domain=ends, nice=False, padding=12)
    return alt.X("x:Q", scale=scale, axis=axis), {v: numeric_value(v) for v in values}, width


def _word_axis(values: Sequence[Coord], title: str | None, step: float) -> Any:
    """Return an axis of words, the position of each value on it, and its width."""
    labels = column_labels(values, min(step, MAX_WORDS_WIDTH / len(values)), MAX_WORDS_WIDTH)
    x = alt.X(
        "x:N",
        scale=alt.Scale(domain=labels.texts),
        axis=alt.Axis(title=title, **labels.options),
    )
    names = dict(zip(values, labels.texts, strict=True))
    return x, names, max(MIN_PANEL_WIDTH, labels.step * len(values))


def _line_styles(lines: list[str], series: str | None, place: dict[str, Any]) -> dict[str, Any]:
    """Return separate colours, dashes and points for every line: a line covered by another is
    visible through its gaps, and its points are open."""
    if len(lines) < 2:
        return {"color": alt.value(PALETTE[0])}
    legend = series_legend(series if series != "position" else None, lines, place)
    dashes = [*LINE_DASHES, *([6 + n, 3] for n in range(len(lines)))][: len(lines)]
    shapes = [POINT_SHAPES[n % len(POINT_SHAPES)] for n in range(len(lines))]
    dash, shape = (alt.Scale(domain=lines, range=looks) for looks in (dashes, shapes))
    return {
        "color": alt.Color("line:N", sort=lines, scale=series_colours(lines), legend=legend),
        "shape": alt.Shape("line:N", sort=lines, scale=shape, legend=legend),
        # Without a legend, which would break the outlines of the points.
        "strokeDash": alt.StrokeDash("line:N", sort=lines, scale=dash, legend=None),
    }


def _line_layers(base: Any, title: str, apart: dict[str, Any], numbered: bool) -> list[Any]:
    """Return the layers from back to front."""
    dashes, shapes = ({key: apart[key]} if apart else {} for key in ("strokeDash", "shape"))
    y = alt.Y("mean:Q", axis=alt.Axis(title=title))
    ends = {"y": alt.Y("low:Q"), "y2": "high:Q"}
    named = add_hover(base, "line")  # a line is a single mark without a number
    interval = named.mark_area(opacity=0.18, line=False).encode(**ends)
    if not numbered:
        interval = add_hover(base).mark_rule(strokeWidth=2).encode(**ends)
    points = add_hover(base).mark_point(size=36, filled=not apart, strokeWidth=1.5)
    points = points.encode(y=y, **shapes, opacity=alt.Opacity("strength:Q", scale=None))
    drawn = [named.mark_line(strokeWidth=2).encode(y=y, **dashes)] if numbered else []
    return [zero_rule(), interval, *drawn, points]


BAR_WIDTH = 26
"""Width of a bar; smaller if there are many."""


def bars_chart(result: ExperimentResult, report: spec.Report) -> Any:
    """Draw one chart per measure: bars with intervals, or the shares of categories as stacks."""
    axes = drawn_axes(result, report)
    charts = [
        add_title(
            _stacks_panel(result, measure, axes),
            result,
            data,
            fewer_prompts_caption(result, data, written=any(count_labels(result, measure))),
        )
        if data.kind == "category"
        else add_title(_bars_panel(result, measure, axes), result, data, *said)
        for measure, data in result.computed()
        for said in [
            (
                null_band_caption(result, data),
                fewer_prompts_caption(result, data, written=any(count_labels(result, measure))),
                faint_caption(result, data),
            )
        ]
    ]
    return stack_charts(charts, result)


@dataclass(frozen=True)
class _BarPositions:
    """Positions of bars."""

    names: dict[Coord, str]
    """Label of each value."""
    series: list[str]
    x: Any
    step: float
    """Width per value, which the bars of a series share."""
    bar: float
    """Width of a bar."""

    @property
    def width(self) -> float:
        padding = 0.2 if self.series else 0.0  # vega's padding at the ends
        return self.step * (len(self.names) + padding)

    def key(self, key: tuple[Coord, ...]) -> dict[str, str]:
        """Return the fields of a record that position its bar."""
        return {"x": self.names[key[0]], "series": value_text(key[1]) if key[1:] else " "}


def _bar_positions(result: ExperimentResult, axes: tuple[str, ...]) -> _BarPositions:
    values = axis_values(result, axes[0])
    series = [value_text(value) for value in axis_values(result, axes[1])] if axes[1:] else []
    beside = max(1, len(series))
    bar = _bar_width(len(values) * beside)
    labels: ChartLabels = column_labels(values, bar * beside + 14, MAX_WORDS_WIDTH)
    title = None if axes[0] == "position" else axis_title(result, axes[0])
    axis = alt.Axis(title=title, **labels.options)
    x = alt.X("x:N", scale=alt.Scale(domain=labels.texts), axis=axis)
    names = dict(zip(values, labels.texts, strict=True))
    return _BarPositions(names, series, x, labels.step, bar)


def _bar_width(count: int) -> float:
    narrower = {16: BAR_WIDTH, 40: 14, 200: 8, 500: 3}
    return next((width for most, width in narrower.items() if count <= most), 1)


def _bars_panel(result: ExperimentResult, measure: int, axes: tuple[str, ...]) -> Any:
    found, band = result.statistics[measure], result.control(measure)
    shown, few, under = (
        grid_panels(result, axes),
        is_thin(result, measure),
        hover_texts(result, measure),
    )
    places, counts = _bar_positions(result, axes), count_labels(result, measure)

    def number(values: Any, cell: int) -> float | None:
        return float(values[cell]) if np.isfinite(values[cell]) else None

    records = [
        {
            **places.key(key),
            "panel": panel_header(panel.title, places.width),
            "hover": under[cell],
            "mean": number(found.mean, cell),
            "strength": FAINT_OPACITY if few[cell] else 0.85,
            "low": number(found.low, cell),
            "high": number(found.high, cell),
            "n": counts[cell],
            "top": float(np.nanmax([0.0, found.mean[cell], found.high[cell]])),
            "null_low": number(band.low, cell) if band else None,
            "null_high": number(band.high, cell) if band else None,
        }
        for panel in shown
        for key, cell in panel.cells.items()
    ]
    series = places.series
    base = add_hover(alt.Chart()).encode(x=places.x)
    colour: Any = alt.value(PALETTE[0])
    if series:
        base = base.encode(xOffset=alt.XOffset("series:N", sort=series))
        title = axes[1] if axes[1] != "position" else None
        legend = series_legend(title, series, legend_position(places.width, len(shown)))
        colour = alt.Color("series:N", sort=series, scale=series_colours(series), legend=legend)
    y = alt.Y("mean:Q", axis=alt.Axis(title=value_title(result.measures[measure])))
    bars = base.mark_bar().encode(
        y=y,
        color=colour,
        opacity=alt.Opacity("strength:Q", scale=None),
    )
    thick = min(1.4, places.bar / 2)
    whiskers = base.mark_rule(color=INK, strokeWidth=thick).encode(y="low:Q", y2="high:Q")
    across = base.mark_tick(color=INK, size=min(8, places.bar), thickness=thick)
    ends = [across.encode(y=f"{end}:Q") for end in ("low", "high")]
    layers: list[Any] = [
        bars,
        *([null_band_layer(base, "bar")] if band else []),
        zero_rule(),
        whiskers,
        *ends,
        *([count_marks(base, "top")] if any(counts) else []),
    ]
    step = alt.Step(places.step, **{"for": "position"} if series else {})
    drawn = alt.layer(*layers, data=alt.Data(values=records)).properties(width=step, height=260)
    return facet_chart(drawn, [panel.title for panel in shown], places.width)


def _stacks_panel(result: ExperimentResult, measure: int, axes: tuple[str, ...]) -> Any:
    """Draw the distribution over categories, one stack per value of the axis."""
    data = result.measures[measure]
    seen = [float(v) for v in np.unique(data.patched[np.isfinite(data.patched)])]
    shown, places = grid_panels(result, axes[:1]), _bar_positions(result, axes[:1])
    counts = count_labels(result, measure)
    records = [
        {
            "x": places.names[key[0]],
            "panel": panel_header(panel.title, places.width),
            "value": f"{value:g}",
            "order": place,
            "n": "" if place else counts[cell],
            "full": 1.0,
            "share": count / n,
            "hover": f"{escape_hidden(result.cells[cell].name)}, {value:g}: {count} of n = {n}",
        }
        for panel in shown
        for key, cell in panel.cells.items()
        for n in [int(np.count_nonzero(np.isfinite(data.patched[cell])))]
        for place, value in enumerate(seen)
        for count in [int(np.count_nonzero(data.patched[cell] == value))]
        if n
    ]
    values = [f"{value:g}" for value in seen]
    place = legend_position(places.width, len(shown))
    base = add_hover(alt.Chart()).encode(x=places.x)
    bars = base.mark_bar().encode(
        y=alt.Y("share:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title="share")),
        color=alt.Color(
            "value:N",
            sort=values,
            scale=alt.Scale(domain=values, scheme="viridis"),
            legend=series_legend(escape_hidden(data.label), values, place),
        ),
        order=alt.Order("order:Q"),
    )
    layers = [bars, *([count_marks(base, "full")] if any(counts) else [])]
    drawn = alt.layer(*layers, data=alt.Data(values=records))
    drawn = drawn.properties(width=alt.Step(places.step), height=220)
    return facet_chart(drawn, [panel.title for panel in shown], places.width)
