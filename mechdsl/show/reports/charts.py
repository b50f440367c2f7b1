"""Charts for files: altair, rendered by vl-convert, without a browser or a network."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal

import altair as alt
import numpy as np

from mechdsl.base.visible import visible, xml_text
from mechdsl.program import spec
from mechdsl.resolve.cell_key import Coord
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.grid import (
    axis_name,
    number,
    numeric,
    panels,
    row_order,
    value_text,
    values_of,
)
from mechdsl.show.reports.text import (
    THIN_MARK,
    ends_of_scale,
    measure_name,
    null_words,
    number_format,
    prompts_in_words,
    rounding_note,
    survives,
    thin,
    thin_note,
)
from mechdsl.statistics.measure_data import MeasureData

LABELLED_UP_TO = 160
"""Cells of a map up to which their numbers are written into them."""
NUMBERED_TICKS = 30
"""Values of an axis up to which every one is labelled."""
PALETTE = ["#2166ac", "#d6604d", "#1b7837", "#762a83", "#b8860b", "#4d4d4d", "#35978f", "#c51b7d"]
INK, QUIET = "#222222", "#666666"
FONT = "Helvetica Neue, Helvetica, Arial, sans-serif"
PNG_SCALE = 2.0
LABEL_WIDTH = 14
"""Characters per line of a label under a chart."""
BAND = 14
"""Width of a null band that stands behind a single point."""
FAINT = 0.35
"""Opacity of what stands for a thin cell."""
SPLIT = "split(datum.label, '\\n')"
"""How vega breaks labels into lines."""


def label(value: Coord) -> str:
    return "\n".join(wrap(value_text(value), LABEL_WIDTH)) or value_text(value)


def titled(chart: Any, result: ExperimentResult, data: MeasureData) -> Any:
    ends = ends_of_scale(result, data)
    measure = next(n for n, each in enumerate(result.measures) if each is data)
    n = prompts_in_words(result, measure)
    facts = [f"{result.model} · {result.direction} · {n}"]
    if ends:
        facts.append(ends)
    null = null_words(result, measure)
    more = rounding_note(result, measure), thin_note(result, measure)
    facts += [f"grey: {null}"] if null else []
    facts += [line for line in more if line]
    title = visible(f"{result.name}: {measure_name(data)}")
    return chart.properties(title=alt.TitleParams(title, subtitle=[*map(visible, facts)]))


def themed(chart: Any) -> Any:
    return (
        chart.configure(background="white", font=FONT, padding=16)
        .configure_view(stroke=None)
        .configure_title(
            anchor="start",
            fontSize=15,
            color=INK,
            subtitleColor=QUIET,
            subtitleFontSize=11,
            subtitlePadding=4,
            offset=12,
        )
        .configure_axis(
            labelFontSize=11,
            titleFontSize=12,
            titleFontWeight="normal",
            titleColor=INK,
            labelColor=INK,
            titlePadding=8,
            domainColor="#888888",
            tickColor="#888888",
            gridColor="#eeeeee",
        )
        .configure_legend(labelFontSize=11, titleFontSize=11, titleFontWeight="normal")
        .configure_header(labelFontSize=12, labelColor=INK, labelFontWeight="bold")
    )


def value_title(data: MeasureData) -> str:
    from mechdsl.vocab.effects import EFFECTS

    if EFFECTS[data.effect].scale_free or not data.unit:
        return data.effect
    return f"{data.effect} ({data.unit})"


def _step(count: int, longest: float) -> float:
    """The width of a column: room for its number, less where there are many."""
    return max(longest, 44 if count <= 8 else 34 if count <= 16 else 22 if count <= 40 else 12)


def _ticks(values: list[Any]) -> list[Any] | None:
    """Every value of a short axis, every fifth or so of a long one."""
    if len(values) <= NUMBERED_TICKS:
        return None
    every = int(np.ceil(len(values) / NUMBERED_TICKS / 5)) * 5
    return values[::every]


# --- heat maps ----------------------------------------------------------------------------------


def heatmap_chart(result: ExperimentResult, report: spec.Report) -> Any:
    """The effect over two axes, one map per measure and combination of the other axes."""
    rows, columns = axis_name(result, report.variable or ""), axis_name(result, report.by or "")
    maps = [
        titled(_heatmap(result, measure, rows, columns), result, data)
        for measure, data in result.computed()
    ]
    return themed(alt.vconcat(*maps, spacing=36).resolve_scale(color="independent"))


def _heatmap(result: ExperimentResult, measure: int, rows: str, columns: str) -> Any:
    data, found = result.measures[measure], result.statistics[measure]
    category = data.kind == "category"
    values = found.commonest if category else found.mean
    write = (lambda v: f"{v:g}") if category else number_format(values, 2)
    finite = values[np.isfinite(values)]
    limit = float(np.abs(finite).max(initial=0.0)) or 1.0
    least = float(finite.min(initial=limit)) if category else 0.0  # what has no colour
    shown = panels(result, (rows, columns))
    places = (row_order(result, rows), values_of(result, columns))
    labelled = len(places[0]) * len(places[1]) <= LABELLED_UP_TO
    survived, few = survives(result, measure), thin(result, measure)
    records = [
        {
            "row": value_text(row),
            "column": label(column),
            "value": float(values[cell]) if np.isfinite(values[cell]) else None,
            "text": (THIN_MARK if few[cell] else "") + write(values[cell])
            if np.isfinite(values[cell])
            else "",
            "n": int(found.n[cell]),
            "strong": bool(abs(values[cell] - least) > 0.6 * (limit - least)),
            "survives": bool(survived[cell]),
            "panel": panel.title,
            "site": result.cells[cell].site,
            "low": float(found.low[cell]) if np.isfinite(found.low[cell]) else None,
            "high": float(found.high[cell]) if np.isfinite(found.high[cell]) else None,
        }
        for panel in shown
        for (row, column), cell in panel.cells.items()
    ]
    if category:
        scale = alt.Scale(scheme="blues")
    else:
        scale = alt.Scale(
            domain=[-limit, 0, limit], range=["#b2182b", "#f7f7f7", "#2166ac"], clamp=True
        )
    names = [label(value) for value in places[1]]
    longest = max(len(line) for name in names for line in name.split("\n"))
    axis_x = alt.Axis(
        title=None if columns == "position" else columns,
        labelAngle=0,
        labelExpr=SPLIT,
        labelLimit=240,
        orient="bottom",
        ticks=False,
        domain=False,
        values=_ticks(names) or alt.Undefined,
    )
    axis_y = alt.Axis(
        title=rows,
        labelLimit=240,
        ticks=False,
        domain=False,
        values=_ticks([value_text(v) for v in places[0]]) or alt.Undefined,
    )
    base = alt.Chart(alt.Data(values=records)).encode(
        x=alt.X("column:N", sort=names, axis=axis_x),
        y=alt.Y("row:N", sort=[value_text(v) for v in places[0]], axis=axis_y),
    )
    legend = alt.Legend(
        title="commonest" if category else value_title(data), gradientLength=160, format=".2~g"
    )
    layers = [
        base.mark_rect(stroke="white", strokeWidth=1.5 if labelled else 0.4).encode(
            color=alt.Color("value:Q", scale=scale, legend=legend),
            tooltip=["site:N", "row:N", "column:N", "value:Q", "low:Q", "high:Q", "n:Q"],
        )
    ]
    if labelled:
        ink = alt.condition("datum.strong", alt.value("white"), alt.value(INK))
        weight: Any = alt.ExprRef("datum.survives ? 'bold' : 'normal'")
        layers.append(
            base.mark_text(fontSize=11, fontWeight=weight).encode(text="text:N", color=ink)
        )
    height = alt.Step(26 if labelled else _step(len(places[0]), 0) * 0.75)
    width = alt.Step(_step(len(names), 7.0 * longest))
    drawn = alt.layer(*layers).properties(width=width, height=height)
    return faceted(drawn, [panel.title for panel in shown], 3)


def faceted(drawn: Any, titles: list[str], columns: int) -> Any:
    """One small chart per panel, where there are several. Layers with data of their own would
    show all of it in every panel."""
    if len(titles) < 2:
        return drawn
    header = alt.Header(title=None, labelLimit=320, labelAnchor="start")
    rows = -(-len(titles) // columns)
    columns = -(-len(titles) // rows)  # as full as can be: places without a panel show an axis
    return drawn.facet(alt.Facet("panel:N", sort=titles, header=header), columns=columns)


# --- lines --------------------------------------------------------------------------------------


def lines_chart(result: ExperimentResult, report: spec.Report) -> Any:
    """The effect along one axis with its interval as a band, one line per series."""
    axis = axis_name(result, report.variable or "")
    series = None if report.by is None else axis_name(result, report.by)
    charts = [
        titled(_lines(result, measure, axis, series), result, data)
        for measure, data in result.computed()
        if data.kind == "number"
    ]
    return themed(alt.vconcat(*charts, spacing=36).resolve_scale(color="independent"))


def _lines(result: ExperimentResult, measure: int, axis: str, series: str | None) -> Any:
    found, band = result.statistics[measure], result.control(measure)
    few = thin(result, measure)
    values = values_of(result, axis)
    numbered = numeric(values)
    drawn = (axis,) if series is None else (axis, series)
    shown = panels(result, drawn)

    def line_of(panel_title: str, key: tuple[Any, ...]) -> str:
        return panel_title if series is None else value_text(key[1])

    records = [
        {
            "x": number(key[0]) if numbered else label(key[0]),
            "line": line_of(panel.title, key) or " ",
            "panel": panel.title if series is not None else "",
            "mean": float(found.mean[cell]),
            "n": int(found.n[cell]),
            "strength": FAINT if few[cell] else 1.0,
            "low": float(found.low[cell]) if np.isfinite(found.low[cell]) else None,
            "high": float(found.high[cell]) if np.isfinite(found.high[cell]) else None,
            "null_low": float(band.low[cell]) if band and np.isfinite(band.low[cell]) else None,
            "null_high": float(band.high[cell]) if band and np.isfinite(band.high[cell]) else None,
        }
        for panel in shown
        for key, cell in panel.cells.items()
        if np.isfinite(found.mean[cell])
    ]
    lines = list(dict.fromkeys(str(record["line"]) for record in records))
    title = axis if axis != "position" else None
    x: Any
    if numbered:
        percent = all(str(value).endswith("%") for value in values)
        whole = all(isinstance(value, int) for value in values)
        every = int(np.ceil(len(values) / NUMBERED_TICKS))
        ticks: Any = values[::every] if whole else alt.Undefined
        x = alt.X(
            "x:Q",
            scale=alt.Scale(domain=[number(values[0]), number(values[-1])], nice=False, padding=12),
            axis=alt.Axis(
                title=title,
                values=ticks,
                format="d" if whole else "~r" if percent else "~g",
                labelExpr="datum.label + '%'" if percent else alt.Undefined,
                grid=False,
            ),
        )
    else:
        names = [label(value) for value in values]
        x = alt.X("x:N", sort=names, axis=alt.Axis(title=title, labelAngle=0, labelExpr=SPLIT))
    colour: Any = alt.value(PALETTE[0])
    if len(lines) > 1:
        legend = alt.Legend(
            title=series if series != "position" else None, labelLimit=320, symbolOpacity=1
        )
        colour = alt.Color("line:N", sort=lines, scale=colours(lines), legend=legend)
    base = alt.Chart().encode(x=x, color=colour)
    if not numbered and len(lines) > 1:
        base = base.encode(xOffset=alt.XOffset("line:N", sort=lines))
    y = alt.Y("mean:Q", axis=alt.Axis(title=value_title(result.measures[measure])))
    interval: Any = base.mark_area(opacity=0.18, line=False).encode(y=alt.Y("low:Q"), y2="high:Q")
    if not numbered:
        interval = base.mark_rule(strokeWidth=2).encode(y=alt.Y("low:Q"), y2="high:Q")
    points = base.mark_point(size=36, filled=True).encode(
        y=y,
        opacity=alt.Opacity("strength:Q", scale=None),
        tooltip=["line:N", "x:N", "mean:Q", "low:Q", "high:Q", "n:Q"],
    )
    layers = [zero_rule(), interval, points]
    if numbered:
        layers.insert(2, base.mark_line(strokeWidth=2).encode(y=y))
    if band is not None:
        form = "area" if numbered else "bar"
        layers.insert(0, null_band(base, form, len(lines), **({} if numbered else {"size": BAND})))
    plot = alt.layer(*layers, data=alt.Data(values=records)).properties(
        width=min(640, max(320, 36 * len(values))), height=280
    )
    if series is None:
        return plot
    return faceted(plot, [panel.title for panel in shown], 2)


def zero_rule() -> Any:
    """A dashed line where there is no effect, once in every panel."""
    rule = alt.Chart().transform_aggregate(n="count()").mark_rule
    return rule(color=QUIET, strokeDash=[3, 3], strokeWidth=1).encode(y=alt.datum(0))


def null_band(base: Any, form: Literal["area", "bar"], lines: int = 1, **mark: Any) -> Any:
    """What controls that were drawn at random do, in grey: along a line, or behind each point.

    Those of several lines lie on top of each other, so they are lighter.
    """
    shade = max(0.07, 0.3 / lines)
    ends = {"y": alt.Y("null_low:Q"), "y2": "null_high:Q", "color": alt.value(QUIET)}
    if form == "area":
        return base.mark_area(opacity=shade, line=False).encode(detail="line:N", **ends)
    return base.mark_bar(opacity=0.3, **mark).encode(**ends)


def colours(lines: list[str]) -> Any:
    """Distinct colours for words, a run of colours for numbers and for many."""
    if len(lines) <= 4 or (len(lines) <= len(PALETTE) and not all(map(str.isdigit, lines))):
        return alt.Scale(domain=lines, range=PALETTE)
    return alt.Scale(domain=lines, scheme="viridis")


# --- files --------------------------------------------------------------------------------------


class _InScript(json.JSONEncoder):
    """JSON inside of a page's script, which no text can end: `</script>` is written otherwise."""

    def encode(self, o: Any) -> str:
        return super().encode(o).replace("<", "\\u003c")


def save_chart(chart: Any, path: Path) -> None:
    """Written in the format of the file's ending."""
    suffix = path.suffix.lower()
    if suffix == ".html":
        chart.save(str(path), format="html", inline=True, json_kwds={"cls": _InScript})
    elif suffix == ".png":
        chart.save(str(path), format="png", scale_factor=PNG_SCALE)
    else:
        chart.save(str(path), format="svg")


LINE_HEIGHT, LETTER_WIDTH, MARGIN = 18, 7.85, 16


def save_text(text: str, path: Path) -> None:
    """Lines of fixed-width text as a picture: SVG, or PNG by the ending."""
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    width = max((len(line) for line in lines), default=0) * LETTER_WIDTH + 2 * MARGIN
    height = len(lines) * LINE_HEIGHT + 2 * MARGIN
    rows = "".join(
        f'<text x="{MARGIN}" y="{MARGIN + LINE_HEIGHT * (i + 0.75):.1f}" xml:space="preserve" '
        f'textLength="{len(line) * LETTER_WIDTH:.1f}" lengthAdjust="spacing">'
        f"{xml_text(line)}</text>"
        for i, line in enumerate(lines)
        if line
    )
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="13" fill="{INK}">'
        f'<rect width="100%" height="100%" fill="white"/>{rows}</svg>'
    )
    if path.suffix.lower() == ".png":
        import vl_convert

        path.write_bytes(vl_convert.svg_to_png(svg, scale=PNG_SCALE))
    else:
        path.write_text(svg, encoding="utf-8")
