"""Charts for files: altair, rendered by vl-convert, without a browser or a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal
from xml.etree import ElementTree

import altair as alt
import numpy as np
from altair.utils.html import INLINE_HTML_TEMPLATE

from mechdsl.base.text import escape_hidden, escape_xml
from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.canvas import (
    FACT_CHARACTERS,
    FONT,
    INK,
    MONO_FONT,
    QUIET_INK,
    TITLE_CHARACTERS,
    PageLayout,
    drawn_for,
    page_layout,
    page_width,
    svg_size,
    text_width,
    write_picture,
)
from mechdsl.show.reports.drawing import call_drawing
from mechdsl.show.reports.grid import is_numeric, value_text
from mechdsl.show.reports.text import (
    centre_note,
    equal_rows_note,
    fewer_prompts_note,
    has_fewer_prompts,
    measure_name,
    missing_note,
    null_band_text,
    prompt_count_text,
    rounding_note,
    scale_note,
    selection_note,
    thin_note,
)
from mechdsl.statistics.measurements import MeasureData

VEGA_LITE_VERSION = "_".join(alt.SCHEMA_VERSION.split(".")[:2])
"""Version of Vega-Lite as vl-convert writes it: `v6_1`."""

LABEL_SIZE = 11
"""Font size of labels."""

LABEL_LINE_HEIGHT = 13
"""Height of a line of a label."""

LABEL_CHARACTERS = 14
"""Characters per line of a label under a chart."""

MAX_LABEL_WIDTH = 320
"""Maximum width of a label next to a chart, or rotated; vega truncates longer ones with `…`."""

MIN_SLANTED_STEP = 18
"""Minimum distance of slanted labels; closer ones would overlap and are vertical."""

SPLIT_EXPRESSION = "split(datum.label, '\\n')"
"""Vega expression that splits labels into lines."""


@dataclass(frozen=True)
class ChartLabels:
    """Labels of the values of an axis."""

    texts: tuple[str, ...]
    """Text of each value, with line breaks."""
    step: float
    """Distance between two values that leaves room for the labels."""
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """Arguments of `alt.Axis`."""


def column_labels(
    values: Sequence[Coord],
    step: float,
    most: float,
    names: Mapping[Coord, str] | None = None,
) -> ChartLabels:
    """Lay out labels under a chart whose values are `step` apart.

    If not all numbers fit, every second, fifth and so on is labelled. Words are wrapped and get a
    wider step, up to `most` in total; beyond that they are rotated. `names` are the texts of
    values, if they differ from the values.
    """
    texts = _label_texts(values, names)
    widest = max((text_width(text, LABEL_SIZE) for text in texts), default=0.0)
    level: dict[str, Any] = {"labelAngle": 0, "labelLimit": 0}
    if _are_numbers(values, texts) or widest + 8 <= step:
        return ChartLabels(texts, step, {**level, **_thinned_values(texts, step, widest + 8)})
    lines = [wrap(text, LABEL_CHARACTERS) or [text] for text in texts]
    broken = max(text_width(line, LABEL_SIZE) for each in lines for line in each) + 8
    if max(step, broken) * len(values) <= most:
        joined = tuple(map("\n".join, lines))
        return ChartLabels(joined, max(step, broken), {**level, "labelExpr": SPLIT_EXPRESSION})
    step = max(step, LABEL_LINE_HEIGHT + 1)
    angle = -45 if step >= MIN_SLANTED_STEP else -90
    return ChartLabels(texts, step, {"labelAngle": angle, "labelLimit": MAX_LABEL_WIDTH})


def row_labels(
    values: Sequence[Coord], step: float, names: Mapping[Coord, str] | None = None
) -> ChartLabels:
    """Lay out labels to the left of rows `step` apart: all words, and as many numbers as fit."""
    texts = _label_texts(values, names)
    if not _are_numbers(values, texts):
        return ChartLabels(texts, max(step, LABEL_LINE_HEIGHT), {"labelLimit": MAX_LABEL_WIDTH})
    return ChartLabels(texts, step, _thinned_values(texts, step, LABEL_LINE_HEIGHT))


def _label_texts(values: Sequence[Coord], names: Mapping[Coord, str] | None) -> tuple[str, ...]:
    return tuple(names[value] if names else value_text(value) for value in values)


def _are_numbers(values: Sequence[Coord], texts: Sequence[str]) -> bool:
    """Whether labels are plain numbers, so that some of them may be omitted."""
    return is_numeric(values) and all(map(str.__eq__, texts, map(value_text, values)))


def _thinned_values(texts: Sequence[str], step: float, needed: float) -> dict[str, Any]:
    """Return the options that label every k-th number if not all fit: 0, 5, 10 and so on."""
    every = next((n for n in (1, 2, 5, 10, 20, 50, 100) if n * step >= needed), len(texts))
    return {} if every == 1 else {"values": list(texts[::every])}


PALETTE = ["#0072b2", "#e69f00", "#009e73", "#56b4e9", "#d55e00", "#cc79a7", "#000000"]
"""Colours of series, distinct for colour-blind readers (Okabe and Ito 2008), the most distinct ones
first. Yellow is omitted, because it is hardly visible on white."""

FAINT_OPACITY = 0.35
"""Opacity of marks for thin cells."""

MAX_PANELS_WIDTH = 1500
"""Maximum total width of panels in a row."""

SYMBOL_WIDTH = 34
"""Width of a legend's symbol with the space around it."""

LEGEND_ROWS = 18
"""Maximum number of rows of a legend."""

COUNT_SIZE, MAX_COUNTED_MARKS = 8.5, 80
"""Font size of n at marks with fewer prompts; maximum number of such marks."""

TITLE_SIZE = 15
"""Font size of the title of a chart."""

HEADER_SIZE = 12
"""Font size above a panel."""


def add_title(chart: Any, result: ExperimentResult, data: MeasureData, *said: str | None) -> Any:
    """Add a title to a chart; `said` are the remarks of its type."""
    measure = next(n for n, measure_data in enumerate(result.measures) if measure_data is data)
    facts = [
        f"{result.model} · {result.direction} · {prompt_count_text(result, measure)}",
        scale_note(result, data),
        selection_note(result),
        *said,
        centre_note(result),
        rounding_note(result, measure),
        equal_rows_note(result, measure),
        missing_note(result),
    ]
    layout = page_layout()
    title = wrap(
        escape_hidden(f"{result.name}: {measure_name(data)}"),
        layout.characters(TITLE_CHARACTERS, TITLE_SIZE),
    )
    wide = layout.characters(FACT_CHARACTERS, LABEL_SIZE)
    below = [line for fact in facts if fact for line in wrap(escape_hidden(fact), wide)]
    return chart.properties(title=alt.TitleParams(title, subtitle=below))


def null_band_caption(result: ExperimentResult, data: MeasureData) -> str | None:
    """Explain the grey area of a chart with a null band."""
    measure = next(n for n, measure_data in enumerate(result.measures) if measure_data is data)
    null = null_band_text(result, measure)
    return f"grey: {null}" if null else None


def faint_caption(result: ExperimentResult, data: MeasureData) -> str | None:
    """Explain faint bars and points."""
    measure = next(n for n, measure_data in enumerate(result.measures) if measure_data is data)
    return thin_note(result, measure, "faint:")


def add_hover(base: Any, field: str = "hover") -> Any:
    """Add a field to marks as a tooltip on pages and as a title in SVG."""
    return base.encode(tooltip=f"{field}:N", description=f"{field}:N")


def stack_charts(charts: Sequence[Any], result: ExperimentResult) -> Any:
    """Stack the charts of all measures, each with separate colours and shapes. If none of the
    drawable measures could be computed, the figure contains only that note."""
    if not charts:
        title = alt.TitleParams(
            escape_hidden(f"{result.name}: nothing to draw"),
            subtitle=escape_hidden(missing_note(result) or ""),
        )
        nothing = alt.Chart(alt.Data(values=[{}])).mark_point(opacity=0)
        charts = [nothing.properties(title=title, height=1)]
    chart = alt.vconcat(*charts, spacing=36).resolve_scale(color="independent", shape="independent")
    return apply_theme(chart)  # a second call would replace the first


def apply_theme(chart: Any) -> Any:
    return (
        chart.configure(
            background="white", font=FONT, padding=16 if page_layout().width is None else 4
        )
        .configure_view(stroke=None)
        .configure_title(
            anchor="start",
            fontSize=TITLE_SIZE,
            color=INK,
            subtitleColor=QUIET_INK,
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


def facet_chart(drawn: Any, titles: Sequence[str], width: float, *, upward: bool = False) -> Any:
    """Split a chart into one small chart per panel, if there are several. Layers with their own
    data would show all of it in every panel. `upward`: panels above one another begin at the
    bottom."""
    if len(titles) < 2:
        return drawn
    room = page_layout().room(MAX_PANELS_WIDTH)
    columns = _full_rows(len(titles), max(1, int(room / (width + 60))))
    if upward and columns == 1:
        titles = titles[::-1]
    header = alt.Header(title=None, labelLimit=0, labelAnchor="start", labelExpr=SPLIT_EXPRESSION)
    facet = alt.Facet(
        "panel:N", sort=[panel_header(title, width) for title in titles], header=header
    )
    return drawn.facet(facet, columns=columns)


def _full_rows(count: int, most: int) -> int:
    """Return the number of panels per row that fills rows best: empty positions show an axis."""
    full = max(n for n in range(1, most + 1) if count % n == 0)
    return full if 2 * full >= min(most, count) else -(-count // -(-count // most))


def panel_header(title: str, width: float) -> str:
    """Return the title of a panel, wrapped to its width."""
    room = max(8, int(width / max(text_width(title, HEADER_SIZE) / max(len(title), 1), 1.0)))
    return "\n".join(wrap(title, room)) or title


def fewer_prompts_caption(
    result: ExperimentResult, data: MeasureData, *, written: bool
) -> str | None:
    """Explain where n of cells with fewer prompts is shown; `written`: at the marks."""
    measure = next(n for n, measure_data in enumerate(result.measures) if measure_data is data)
    return fewer_prompts_note(result, measure, "small" if written else "under the pointer")


def count_labels(result: ExperimentResult, measure: int) -> list[str]:
    """Return the text at each cell's mark: n if it is smaller than the largest; empty for all if
    there are too many such marks."""
    less = has_fewer_prompts(result, measure)
    if np.count_nonzero(less) > MAX_COUNTED_MARKS:
        return [""] * len(less)
    pairs = zip(result.statistics[measure].n, less, strict=True)
    return [str(int(n)) if few else "" for n, few in pairs]


# --- layers that charts share --------------------------------------------------------------------


def count_marks(base: Any, y: str) -> Any:
    """Return labels with n above marks with fewer prompts."""
    few = base.transform_filter("datum.n != ''")
    texts = few.mark_text(fontSize=COUNT_SIZE, dy=-8, color=QUIET_INK)
    return texts.encode(y=f"{y}:Q", text="n:N", color=alt.value(QUIET_INK))


def zero_rule() -> Any:
    """Return a dashed line at effect 0, once per panel."""
    rule = alt.Chart().transform_aggregate(n="count()").mark_rule
    return rule(color=QUIET_INK, strokeDash=[3, 3], strokeWidth=1).encode(y=alt.datum(0))


def null_band_layer(
    base: Any, form: Literal["area", "bar"], title: str, lines: int = 1, **mark: Any
) -> Any:
    """Return the range of random controls in grey: along a line, or around each point.

    Bands of several lines overlap, so they are lighter. The untrained control is a single value: a
    dashed line, or a tick.
    """
    if title == "untrained":
        grey = {"y": alt.Y("null_low:Q"), "color": alt.value(QUIET_INK)}
        if form == "area":
            return base.mark_line(strokeDash=[4, 3], strokeWidth=1.5).encode(
                detail="line:N", **grey
            )
        return base.mark_tick(thickness=2, **mark).encode(**grey)
    shade = max(0.07, 0.3 / lines)
    ends = {"y": alt.Y("null_low:Q"), "y2": "null_high:Q", "color": alt.value(QUIET_INK)}
    if form == "area":
        return base.mark_area(opacity=shade, line=False).encode(detail="line:N", **ends)
    return base.mark_bar(opacity=0.3, **mark).encode(**ends)


def series_colours(lines: list[str]) -> Any:
    """Return distinct colours for words and a gradient for numbers and for many values; every
    colour is visible on white."""
    if len(lines) <= 4 or (len(lines) <= len(PALETTE) and not all(map(str.isdigit, lines))):
        return alt.Scale(domain=lines, range=PALETTE)
    return alt.Scale(domain=lines, scheme=alt.SchemeParams("viridis", extent=[0, 0.87]))


def legend_position(width: float, panels: int) -> dict[str, Any]:
    """Return the position of a legend: next to a single panel, because vega would place it after
    the end of a longer title; under the chart on a narrow page."""
    if page_layout().is_narrow:
        return {"orient": "bottom", "direction": "horizontal"}
    if panels > 1:
        return {}
    return {"orient": "none", "direction": "vertical", "legendX": width + 18, "legendY": 0}


def series_legend(
    title: str | None, lines: Sequence[str], place: Mapping[str, Any], *, upward: bool = False
) -> Any:
    """Return a legend with every series, in columns if there are many; `upward`: the first one is
    at the bottom."""
    columns = -(-len(lines) // LEGEND_ROWS)
    if page_layout().is_narrow:
        widest = max((text_width(line, LABEL_SIZE) for line in lines), default=0.0)
        columns = max(1, int(page_layout().room(MAX_PANELS_WIDTH) / (widest + SYMBOL_WIDTH)))
    order: Any = list(lines[::-1]) if upward and columns == 1 else alt.Undefined
    plain: dict[str, Any] = {"labelLimit": 320, "symbolLimit": 0, "symbolOpacity": 1, **place}
    return alt.Legend(title=title, columns=columns, values=order, **plain)


# --- files --------------------------------------------------------------------------------------


def save_chart(build: Callable[[], Any], path: Path, columns: int | None = None) -> None:
    """Write a chart in the format of the file's extension.

    Args:
        build: Makes the chart, for the layout of the page.
        path: The file.
        columns: Columns of a paper that the picture spans; None: its own size.
    """
    if path.suffix.lower() == ".html":
        path.write_text(_chart_page(build()), encoding="utf-8")
        return
    svg = _chart_svg(build()) if columns is None else _page_svg(build, page_width(columns))
    write_picture(_add_titles(svg), path, columns)


def _chart_svg(chart: Any) -> str:
    return call_drawing("vegalite_to_svg", chart.to_dict(), vl_version=VEGA_LITE_VERSION)


def _chart_page(chart: Any) -> str:
    """Return an HTML page that contains the scripts it needs, as `chart.save` of altair does.

    `<` is escaped in the chart, so that no text can end the script: `</script>`.
    """
    return INLINE_HTML_TEMPLATE.render(
        spec=json.dumps(chart.to_dict()).replace("<", "\\u003c"),
        embed_options=json.dumps({"mode": "vega-lite"}),
        vegalite_version=alt.VEGALITE_VERSION,
        output_div="vis",
        vegaembed_script=call_drawing("javascript_bundle", vl_version=VEGA_LITE_VERSION),
    )


FIRST_MARGIN = 100.0
"""Width of axes and legends in the first attempt at a page's layout."""

MAX_ATTEMPTS = 4
"""Maximum number of layouts of a chart for a page."""


def fit_chart(build: Callable[[], Any], columns: int) -> Any:
    """Return a chart that is as wide as one or two columns of a paper, or as narrow as it becomes.

    Args:
        build: Makes the chart, for the layout of the page.
        columns: 1 or 2.
    """
    width = page_width(columns)
    with drawn_for(PageLayout(width, _page_attempts(build, width)[1])):
        return build()


def _page_svg(build: Callable[[], Any], width: float) -> str:
    """Draw a chart that fills the page's width."""
    return _page_attempts(build, width)[2]


def _page_attempts(build: Callable[[], Any], width: float) -> tuple[float, float, str]:
    """Draw a chart repeatedly until the marks, axes and legends together fill the page's width, or
    as narrow as they become.

    Returns:
        The drawing's width, the margin of its layout, and the drawing as SVG.
    """
    margin, drawn = FIRST_MARGIN, list[tuple[float, float, str]]()
    for _ in range(MAX_ATTEMPTS):
        with drawn_for(PageLayout(width, margin)):
            svg = _chart_svg(build())
        found = svg_size(svg)[0]
        settled = bool(drawn) and abs(found - drawn[-1][0]) < 1
        drawn.append((found, margin, svg))
        if settled or abs(found - width) < 1:
            break
        margin += found - width
    fitting = [each for each in drawn if each[0] < width + 1]
    return max(fitting) if fitting else min(drawn)


SVG_NAMESPACE = "http://www.w3.org/2000/svg"

GUIDE_ROLES = {"axis", "legend", "title", "header"}
"""Roles of a drawing's elements besides its marks."""


def _add_titles(svg: str) -> str:
    """Convert the marks' descriptions to titles, which browsers show as tooltips."""
    ElementTree.register_namespace("", SVG_NAMESPACE)
    root = ElementTree.fromstring(svg)
    for mark in root.iter():
        said = mark.get("aria-label")
        if said and mark.get("aria-roledescription") not in GUIDE_ROLES:
            title = ElementTree.Element(f"{{{SVG_NAMESPACE}}}title")
            title.text = said
            mark.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


LINE_HEIGHT, LETTER_WIDTH, TEXT_MARGIN = 18, 7.85, 16


def save_text_picture(text: str, path: Path, columns: int | None = None) -> None:
    """Draw lines of fixed-width text as a picture; see `write_picture`."""
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    width = max((len(line) for line in lines), default=0) * LETTER_WIDTH + 2 * TEXT_MARGIN
    height = len(lines) * LINE_HEIGHT + 2 * TEXT_MARGIN
    rows = "".join(
        f'<text x="{TEXT_MARGIN}" y="{TEXT_MARGIN + LINE_HEIGHT * (i + 0.75):.1f}" '
        f'xml:space="preserve" textLength="{len(line) * LETTER_WIDTH:.1f}" lengthAdjust="spacing">'
        f"{escape_xml(line)}</text>"
        for i, line in enumerate(lines)
        if line
    )
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'font-family="{MONO_FONT}" font-size="13" fill="{INK}">'
        f'<rect width="100%" height="100%" fill="white"/>{rows}</svg>'
    )
    write_picture(svg, path, columns)
