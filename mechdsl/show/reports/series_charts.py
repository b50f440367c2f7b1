"""Charts of `report lines` and `report bars`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt
import numpy as np

from mechdsl.base.text import escape_hidden
from mechdsl.program import spec
from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.canvas import INK, page_layout, text_width
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
    legend_position,
    null_band_caption,
    null_band_layer,
    panel_header,
    series_colours,
    series_legend,
    stack_charts,
    zero_rule,
)
from mechdsl.show.reports.grid import (
    FigureFrame,
    GridPanel,
    axis_name,
    axis_values,
    capitalise,
    chart_axis_title,
    drawn_axes,
    figure_frame,
    grid_panels,
    is_numeric,
    is_upward,
    numeric_value,
    position_names,
    quantity_name,
    value_names,
    value_title,
)
from mechdsl.show.reports.text import fewer_prompts_note

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
        for drawn, counts in [_lines_panel(result, figure_frame(result, measure), axis, series)]
    ]
    return stack_charts(charts, result)


def _lines_panel(
    result: ExperimentResult, frame: FigureFrame, word: str, series: str | None
) -> tuple[Any, str | None]:
    """Return the chart, and where it shows n of cells with fewer prompts."""
    axis = axis_name(result, word)
    values = axis_values(result, axis)
    numbered = is_numeric(values)
    drawn = (axis,) if series is None else (axis, series)
    shown = grid_panels(result, drawn, position_names(result))
    line_names = {} if series is None else value_names(result, series)
    order = None if series is None else axis_values(result, series)
    lines = _list_lines(frame, shown, line_names, order)
    facets = len(shown) if series is not None else 1
    x, names, width = (_number_axis if numbered else _word_axis)(
        values,
        chart_axis_title(result, word),
        max(WORD_WIDTH, SERIES_POINT_WIDTH * len(lines)),
        value_names(result, axis),
        _panel_room(facets),
    )
    records = _line_records(frame, shown, names, line_names, width)
    lines, where = _count_lines(result, frame.measure, records, lines, numbered=numbered)
    others = [other for other in result.axes if other not in drawn]
    varied = [series] if series is not None else others
    upward = len(varied) == 1 and is_upward(result, varied[0])
    legend = None if series is None else chart_axis_title(result, series)
    apart = _line_styles(lines, legend, legend_position(width, facets), upward=upward)
    base = alt.Chart().encode(x=x).encode(color=apart.pop("color"))
    if not numbered and len(lines) > 1:
        base = base.encode(xOffset=alt.XOffset("line:N", sort=lines))
    layers = _line_layers(base, value_title(frame.data), apart, numbered)
    if where == "small":
        layers.append(count_marks(base, "top"))
    if frame.null_title:
        wide = {} if numbered else {"size": min(POINT_BAND_WIDTH, width / len(values) / len(lines))}
        form: Literal["area", "bar"] = "area" if numbered else "bar"
        layers.insert(0, null_band_layer(base, form, frame.null_title, len(lines), **wide))
    plot = alt.layer(*layers, data=alt.Data(values=records)).properties(
        width=width, height=_panel_height(width)
    )
    if series is not None:
        stacked = len(others) == 1 and is_upward(result, others[0])
        plot = facet_chart(plot, [panel.title for panel in shown], width, upward=stacked)
    return plot, fewer_prompts_note(result, frame.measure, where)


def _line_name(names: Mapping[Coord, str], panel: GridPanel, key: tuple[Coord, ...]) -> str:
    """Return the line of a cell: its value of the series, or its panel without a series."""
    return (names[key[1]] if key[1:] else panel.title) or " "


def _list_lines(
    frame: FigureFrame,
    panels: Sequence[GridPanel],
    names: Mapping[Coord, str],
    order: Sequence[Coord] | None,
) -> list[str]:
    """Return the lines with a number: others aren't drawn, so they aren't in the legend.

    Args:
        names: Texts of the values of the series.
        order: These values in order; None without a series.
    """
    cells = [(panel, key, cell) for panel in panels for key, cell in panel.cells.items()]
    seen = {
        _line_name(names, panel, key)
        for panel, key, cell in cells
        if math.isfinite(frame.cells[cell].value)
    }
    every = [_line_name(names, panel, key) for panel, key, _ in cells]
    if order is not None:
        every = [names[value] or " " for value in order]
    return [line for line in dict.fromkeys(every) if line in seen]


def _line_records(
    frame: FigureFrame,
    panels: Sequence[GridPanel],
    places: Mapping[Coord, Any],
    names: Mapping[Coord, str],
    width: float,
) -> list[dict[str, Any]]:
    """Return the data of the lines, one record per cell with a number.

    Args:
        places: Position of each value on the axis.
        names: Texts of the values of the series, if there is one.
    """
    return [
        {
            "x": places[key[0]],
            "line": _line_name(names, panel, key),
            "panel": panel_header(panel.title, width) if key[1:] else "",
            "mean": cell.value,
            "n": cell.n,
            "top": float(np.nanmax([cell.value, cell.high])),
            "strength": FAINT_OPACITY if cell.is_thin else 1.0,
            "low": _finite(cell.low),
            "high": _finite(cell.high),
            "null_low": _finite(cell.null[0]),
            "null_high": _finite(cell.null[1]),
            "hover": cell.hover,
        }
        for panel in panels
        for key, number in panel.cells.items()
        for cell in [frame.cells[number]]
        if math.isfinite(cell.value)
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


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
        return [names.get(line, line) for line in lines], "next to the names"
    alike = all(len({r["n"] for r in each}) == 1 for each in at_place.values())
    written = any(few) and (alike or not numbered or len(lines) < 2)
    for each in at_place.values():
        highest = max(each, key=lambda record: record["top"])
        together = len({record["n"] for record in each}) == 1
        for record in each:
            shown = record["n"] < most and (record is highest or not together)
            record["n"] = str(record["n"]) if written and shown else ""
    return lines, "small" if written else "under the pointer"


def _panel_room(panels: int) -> float | None:
    """Return the width of a panel on a page of a paper; None for any width."""
    layout = page_layout()
    if layout.width is None:
        return None
    room = layout.room(MAX_WORDS_WIDTH)
    return room if panels == 1 or layout.is_narrow else room / 2 - 60


def _panel_height(width: float) -> float:
    return 280 if page_layout().width is None else min(280, 0.75 * width)


def _number_axis(
    values: Sequence[Coord],
    title: str,
    step: float,
    names: Mapping[Coord, str],
    room: float | None,
) -> Any:
    """Return an axis of numbers, the position of each value on it, and its width."""
    percent = all(str(value).endswith("%") for value in values)
    whole = all(isinstance(value, int) for value in values)
    width = room or min(MAX_LINES_WIDTH, max(MIN_PANEL_WIDTH, WORD_WIDTH * len(values)))
    widest = max(text_width(names[value], LABEL_SIZE) for value in values)
    every = int(np.ceil((widest + 8) * len(values) / width))
    axis = alt.Axis(
        title=title,
        values=[numeric_value(value) for value in values[::every]],
        format="d" if whole else "~r" if percent else "~g",
        labelExpr="datum.label + '%'" if percent else alt.Undefined,
        labelOverlap="greedy",
        grid=False,
    )
    ends = [numeric_value(values[0]), numeric_value(values[-1])]
    scale = alt.Scale(domain=ends, nice=False, padding=12)
    return alt.X("x:Q", scale=scale, axis=axis), {v: numeric_value(v) for v in values}, width


def _word_axis(
    values: Sequence[Coord],
    title: str,
    step: float,
    names: Mapping[Coord, str],
    room: float | None,
) -> Any:
    """Return an axis of words, the position of each value on it, and its width."""
    most = room or MAX_WORDS_WIDTH
    labels = column_labels(values, min(step, most / len(values)), most, names)
    x = alt.X(
        "x:N",
        scale=alt.Scale(domain=labels.texts),
        axis=alt.Axis(title=title, **labels.options),
    )
    positions = dict(zip(values, labels.texts, strict=True))
    return x, positions, max(min(MIN_PANEL_WIDTH, most), labels.step * len(values))


def _line_styles(
    lines: list[str], title: str | None, place: dict[str, Any], *, upward: bool
) -> dict[str, Any]:
    """Return separate colours, dashes and points for every line: a line covered by another is
    visible through its gaps, and its points are open."""
    if len(lines) < 2:
        return {"color": alt.value(PALETTE[0])}
    legend = series_legend(title, lines, place, upward=upward)
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


BAR_GAP = 14
"""Distance between the bars of two values."""

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
        else add_title(
            _bars_panel(result, figure_frame(result, measure), axes), result, data, *said
        )
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
    series: dict[Coord, str]
    """Label of each drawn value of the second axis."""
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
        return {"x": self.names[key[0]], "series": self.series[key[1]] if key[1:] else " "}


def _bar_positions(
    result: ExperimentResult, axes: tuple[str, ...], drawn: Iterable[Coord] = ()
) -> _BarPositions:
    """Lay out the bars; `drawn` are the values of the second axis that have any."""
    values = axis_values(result, axes[0])
    series: dict[Coord, str] = {}
    if axes[1:]:
        names, there = value_names(result, axes[1]), set(drawn)
        series = {value: names[value] for value in axis_values(result, axes[1]) if value in there}
    n_bars = max(1, len(series))
    room = page_layout().room(MAX_WORDS_WIDTH)
    bar: float = _bar_width(len(values) * n_bars)
    if page_layout().width is not None:
        bar = max(1.0, min(bar, (room / len(values) - BAR_GAP) / n_bars))
    labels: ChartLabels = column_labels(
        values, bar * n_bars + BAR_GAP, room, value_names(result, axes[0])
    )
    axis = alt.Axis(title=chart_axis_title(result, axes[0]), **labels.options)
    x = alt.X("x:N", scale=alt.Scale(domain=labels.texts), axis=axis)
    names = dict(zip(values, labels.texts, strict=True))
    return _BarPositions(names, series, x, labels.step, bar)


def _bar_width(count: int) -> float:
    narrower = {16: BAR_WIDTH, 40: 14, 200: 8, 500: 3}
    return next((width for most, width in narrower.items() if count <= most), 1)


def _bar_records(
    frame: FigureFrame, panels: Sequence[GridPanel], places: _BarPositions, counts: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the data of the bars, one record per cell of a drawn series."""
    return [
        {
            **places.key(key),
            "panel": panel_header(panel.title, places.width),
            "hover": cell.hover,
            "mean": _finite(cell.value),
            "strength": FAINT_OPACITY if cell.is_thin else 0.85,
            "low": _finite(cell.low),
            "high": _finite(cell.high),
            "n": counts[number],
            "top": float(np.nanmax([0.0, cell.value, cell.high])),
            "null_low": _finite(cell.null[0]),
            "null_high": _finite(cell.null[1]),
        }
        for panel in panels
        for key, number in panel.cells.items()
        for cell in [frame.cells[number]]
        if not key[1:] or key[1] in places.series
    ]


def _bars_panel(result: ExperimentResult, frame: FigureFrame, axes: tuple[str, ...]) -> Any:
    shown = grid_panels(result, axes, position_names(result))
    drawn = {
        key[1]
        for panel in shown
        for key, cell in panel.cells.items()
        if key[1:] and math.isfinite(frame.cells[cell].value)
    }
    places, counts = _bar_positions(result, axes, drawn), count_labels(result, frame.measure)
    records = _bar_records(frame, shown, places, counts)
    series = list(places.series.values())
    base = add_hover(alt.Chart()).encode(x=places.x)
    colour: Any = alt.value(PALETTE[0])
    if series:
        base = base.encode(xOffset=alt.XOffset("series:N", sort=series))
        legend = series_legend(
            chart_axis_title(result, axes[1]),
            series,
            legend_position(places.width, len(shown)),
            upward=is_upward(result, axes[1]),
        )
        colour = alt.Color("series:N", sort=series, scale=series_colours(series), legend=legend)
    y = alt.Y("mean:Q", axis=alt.Axis(title=value_title(frame.data)))
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
        *([null_band_layer(base, "bar", frame.null_title)] if frame.null_title else []),
        zero_rule(),
        whiskers,
        *ends,
        *([count_marks(base, "top")] if any(counts) else []),
    ]
    step = alt.Step(places.step, **{"for": "position"} if series else {})
    chart = alt.layer(*layers, data=alt.Data(values=records)).properties(width=step, height=260)
    return facet_chart(
        chart, [panel.title for panel in shown], places.width, upward=_is_stack(result, axes)
    )


def _is_stack(result: ExperimentResult, axes: Sequence[str]) -> bool:
    """Whether panels above one another have layers, so that they begin at the bottom."""
    return [is_upward(result, axis) for axis in result.axes if axis not in axes] == [True]


def _stacks_panel(result: ExperimentResult, measure: int, axes: tuple[str, ...]) -> Any:
    """Draw the distribution over categories, one stack per value of the axis."""
    data = result.measures[measure]
    seen = [float(v) for v in np.unique(data.patched[np.isfinite(data.patched)])]
    shown = grid_panels(result, axes[:1], position_names(result))
    places = _bar_positions(result, axes[:1])
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
        y=alt.Y("share:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title="Share of prompts")),
        color=alt.Color(
            "value:N",
            sort=values,
            scale=alt.Scale(domain=values, scheme="viridis"),
            legend=series_legend(capitalise(quantity_name(data)), values, place),
        ),
        order=alt.Order("order:Q"),
    )
    layers = [bars, *([count_marks(base, "full")] if any(counts) else [])]
    drawn = alt.layer(*layers, data=alt.Data(values=records))
    drawn = drawn.properties(width=alt.Step(places.step), height=220)
    return facet_chart(
        drawn,
        [panel.title for panel in shown],
        places.width,
        upward=_is_stack(result, axes[:1]),
    )
