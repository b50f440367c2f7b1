"""Charts for files: altair, rendered by vl-convert, without a browser or a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal
from xml.etree import ElementTree

import altair as alt
import numpy as np

from mechdsl.base.text import escape_hidden, escape_xml
from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.canvas import (
    FACT_CHARACTERS,
    FONT,
    INK,
    PNG_SCALE,
    QUIET_INK,
    TITLE_CHARACTERS,
    text_width,
)
from mechdsl.show.reports.grid import is_numeric, value_text
from mechdsl.show.reports.text import (
    MISSING,
    centre_note,
    fewer_prompts_note,
    has_fewer_prompts,
    mean_texts,
    measure_name,
    missing_note,
    null_band_text,
    null_p_texts,
    null_texts,
    number_format,
    prompt_count_text,
    rounding_note,
    scale_note,
    selection_note,
    thin_note,
    zero_width_note,
)
from mechdsl.statistics.measurements import MeasureData

LABEL_SIZE = 11
"""Of the letters of labels."""

LABEL_LINE_HEIGHT = 13
"""Height of a line of them."""

LABEL_CHARACTERS = 14
"""Characters per line of a label under a chart."""

MAX_LABEL_WIDTH = 320
"""Width of a label beside a chart, or turned; vega cuts what is longer and says so by `…`."""

MIN_SLANTED_STEP = 18
"""Distance of labels from which they are slanted, not upright: closer ones would touch."""

SPLIT_EXPRESSION = "split(datum.label, '\\n')"
"""How vega breaks labels into lines."""


@dataclass(frozen=True)
class ChartLabels:
    """How the values of an axis are written."""

    texts: tuple[str, ...]
    """Per value, in lines."""
    step: float
    """The distance of two values that leaves room for them."""
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """What an `alt.Axis` is to be told."""


def column_labels(values: Sequence[Coord], step: float, most: float) -> ChartLabels:
    """Labels under a chart whose values are `step` apart.

    Of numbers that don't fit every second, fifth and so on is written. Words are broken into lines
    and get a wider step, up to `most` in all; beyond that they are turned.
    """
    texts = tuple(map(value_text, values))
    widest = max((text_width(text, LABEL_SIZE) for text in texts), default=0.0)
    level: dict[str, Any] = {"labelAngle": 0, "labelLimit": 0}
    if is_numeric(values) or widest + 8 <= step:
        return ChartLabels(texts, step, {**level, **_thinned_values(texts, step, widest + 8)})
    lines = [wrap(text, LABEL_CHARACTERS) or [text] for text in texts]
    broken = max(text_width(line, LABEL_SIZE) for each in lines for line in each) + 8
    if max(step, broken) * len(values) <= most:
        joined = tuple(map("\n".join, lines))
        return ChartLabels(joined, max(step, broken), {**level, "labelExpr": SPLIT_EXPRESSION})
    step = max(step, LABEL_LINE_HEIGHT + 1)
    angle = -45 if step >= MIN_SLANTED_STEP else -90
    return ChartLabels(texts, step, {"labelAngle": angle, "labelLimit": MAX_LABEL_WIDTH})


def row_labels(values: Sequence[Coord], step: float) -> ChartLabels:
    """Labels to the left of rows that are `step` apart: all words, and as many numbers as fit."""
    texts = tuple(map(value_text, values))
    if not is_numeric(values):
        return ChartLabels(texts, max(step, LABEL_LINE_HEIGHT), {"labelLimit": MAX_LABEL_WIDTH})
    return ChartLabels(texts, step, _thinned_values(texts, step, LABEL_LINE_HEIGHT))


def _thinned_values(texts: Sequence[str], step: float, needed: float) -> dict[str, Any]:
    """Which numbers are written where not all fit: 0, 5, 10 and so on."""
    every = next((n for n in (1, 2, 5, 10, 20, 50, 100) if n * step >= needed), len(texts))
    return {} if every == 1 else {"values": list(texts[::every])}


PALETTE = ["#2166ac", "#d6604d", "#1b7837", "#762a83", "#b8860b", "#4d4d4d", "#35978f", "#c51b7d"]

FAINT_OPACITY = 0.35
"""Opacity of what stands for a thin cell."""

MAX_PANELS_WIDTH = 1500
"""Of all panels in a row."""

LEGEND_ROWS = 18
"""Of a legend."""

COUNT_SIZE, MAX_COUNTED_MARKS = 8.5, 80
"""Size of n at marks with fewer prompts; how many of them there may be."""

HEADER_SIZE = 12
"""Of the letters above a panel."""


def add_title(chart: Any, result: ExperimentResult, data: MeasureData, *said: str | None) -> Any:
    """The chart under what it shows; `said` are the remarks of its kind."""
    measure = next(n for n, each in enumerate(result.measures) if each is data)
    facts = [
        f"{result.model} · {result.direction} · {prompt_count_text(result, measure)}",
        scale_note(result, data),
        selection_note(result),
        *said,
        centre_note(result),
        rounding_note(result, measure),
        zero_width_note(result, measure),
        missing_note(result),
    ]
    title = wrap(escape_hidden(f"{result.name}: {measure_name(data)}"), TITLE_CHARACTERS)
    below = [line for fact in facts if fact for line in wrap(escape_hidden(fact), FACT_CHARACTERS)]
    return chart.properties(title=alt.TitleParams(title, subtitle=below))


def null_band_caption(result: ExperimentResult, data: MeasureData) -> str | None:
    """What the grey of a chart is that draws the null band."""
    measure = next(n for n, each in enumerate(result.measures) if each is data)
    null = null_band_text(result, measure)
    return f"grey: {null}" if null else None


def faint_caption(result: ExperimentResult, data: MeasureData) -> str | None:
    """What faint bars and points are."""
    measure = next(n for n, each in enumerate(result.measures) if each is data)
    return thin_note(result, measure, "faint:")


def hover_texts(result: ExperimentResult, measure: int) -> list[str]:
    """Per cell what stands under the pointer: its name, its numbers, and of how many prompts."""
    found, band = result.statistics[measure], result.control(measure)
    names = [escape_hidden(cell.name) for cell in result.cells]
    counts = [f"n = {int(n)}" for n in found.n]
    if result.measures[measure].kind == "category":
        texts = [
            f"{value:g} in {share:.0%}" if np.isfinite(value) else "no value"
            for value, share in zip(found.commonest, found.share, strict=True)
        ]
        return [", ".join(parts) for parts in zip(names, texts, counts, strict=True)]
    write = number_format([*found.mean, *found.low, *found.high])
    texts = [
        "no value" if mean == MISSING else mean if interval == MISSING else f"{mean} {interval}"
        for mean, interval in mean_texts(result, measure, range(len(names)), write)
    ]
    if band is not None:
        nulls = null_texts(band, found, range(len(names)), write)
        ranks = null_p_texts(band, range(len(names)))
        beside = [
            f"null {null}, p null {p}" if p != MISSING else f"null {null}"
            for null, p in zip(nulls, ranks, strict=True)
        ]
        insides = [", inside" if inside else "" for inside in band.inside & band.decides]
        counts = ["".join((n, ", ", *t)) for n, *t in zip(counts, beside, insides, strict=True)]
    return [", ".join(parts) for parts in zip(names, texts, counts, strict=True)]


def add_hover(base: Any, field: str = "hover") -> Any:
    """Marks with a field under the pointer: as a tooltip on pages, as a title in SVG."""
    return base.encode(tooltip=f"{field}:N", description=f"{field}:N")


def stack_charts(charts: Sequence[Any], result: ExperimentResult) -> Any:
    """The charts of all measures, each with colours and signs of its own. Where no measure that a
    figure of this kind shows could be computed, that is all it says."""
    if not charts:
        title = alt.TitleParams(
            escape_hidden(f"{result.name}: nothing to draw"),
            subtitle=escape_hidden(missing_note(result) or ""),
        )
        nothing = alt.Chart(alt.Data(values=[{}])).mark_point(opacity=0)
        charts = [nothing.properties(title=title, height=1)]
    own = alt.vconcat(*charts, spacing=36).resolve_scale(color="independent", shape="independent")
    return apply_theme(own)  # a second call would take the place of the first


def apply_theme(chart: Any) -> Any:
    return (
        chart.configure(background="white", font=FONT, padding=16)
        .configure_view(stroke=None)
        .configure_title(
            anchor="start",
            fontSize=15,
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


def value_title(data: MeasureData) -> str:
    from mechdsl.vocab.effects import EFFECTS

    if EFFECTS[data.effect].scale_free or not data.unit:
        return data.called
    return f"{data.called} ({data.unit})"


def facet_chart(drawn: Any, titles: Sequence[str], width: float) -> Any:
    """One small chart of a width per panel, where there are several. Layers with data of their own
    would show all of it in every panel."""
    if len(titles) < 2:
        return drawn
    columns = _full_rows(len(titles), max(1, int(MAX_PANELS_WIDTH / (width + 60))))
    header = alt.Header(title=None, labelLimit=0, labelAnchor="start", labelExpr=SPLIT_EXPRESSION)
    facet = alt.Facet(
        "panel:N", sort=[panel_header(title, width) for title in titles], header=header
    )
    return drawn.facet(facet, columns=columns)


def _full_rows(count: int, most: int) -> int:
    """How many panels stand in a row, as full as can be: places without one show an axis."""
    full = max(n for n in range(1, most + 1) if count % n == 0)
    return full if 2 * full >= min(most, count) else -(-count // -(-count // most))


def panel_header(title: str, width: float) -> str:
    """The title of a panel, in lines that are no wider than it."""
    room = max(8, int(width / max(text_width(title, HEADER_SIZE) / max(len(title), 1), 1.0)))
    return "\n".join(wrap(title, room)) or title


def fewer_prompts_caption(
    result: ExperimentResult, data: MeasureData, *, written: bool
) -> str | None:
    """Where n stands of cells with fewer prompts; written: small, at their marks."""
    measure = next(n for n, each in enumerate(result.measures) if each is data)
    return fewer_prompts_note(result, measure, "small" if written else "under the pointer")


def count_labels(result: ExperimentResult, measure: int) -> list[str]:
    """Per cell what is written at its mark: n where it is smaller than the largest, nothing at all
    where there are too many such marks."""
    less = has_fewer_prompts(result, measure)
    if np.count_nonzero(less) > MAX_COUNTED_MARKS:
        return [""] * len(less)
    pairs = zip(result.statistics[measure].n, less, strict=True)
    return [str(int(n)) if few else "" for n, few in pairs]


# --- layers that charts share --------------------------------------------------------------------


def count_marks(base: Any, y: str) -> Any:
    """n above marks with fewer prompts."""
    few = base.transform_filter("datum.n != ''")
    texts = few.mark_text(fontSize=COUNT_SIZE, dy=-8, color=QUIET_INK)
    return texts.encode(y=f"{y}:Q", text="n:N", color=alt.value(QUIET_INK))


def zero_rule() -> Any:
    """A dashed line where there is no effect, once in every panel."""
    rule = alt.Chart().transform_aggregate(n="count()").mark_rule
    return rule(color=QUIET_INK, strokeDash=[3, 3], strokeWidth=1).encode(y=alt.datum(0))


def null_band_layer(base: Any, form: Literal["area", "bar"], lines: int = 1, **mark: Any) -> Any:
    """What controls that were drawn at random do, in grey: along a line, or behind each point.

    Those of several lines lie on top of each other, so they are lighter.
    """
    shade = max(0.07, 0.3 / lines)
    ends = {"y": alt.Y("null_low:Q"), "y2": "null_high:Q", "color": alt.value(QUIET_INK)}
    if form == "area":
        return base.mark_area(opacity=shade, line=False).encode(detail="line:N", **ends)
    return base.mark_bar(opacity=0.3, **mark).encode(**ends)


def series_colours(lines: list[str]) -> Any:
    """Distinct colours for words, a run of colours for numbers and for many; none is so light that
    it can't be seen on white."""
    if len(lines) <= 4 or (len(lines) <= len(PALETTE) and not all(map(str.isdigit, lines))):
        return alt.Scale(domain=lines, range=PALETTE)
    return alt.Scale(domain=lines, scheme=alt.SchemeParams("viridis", extent=[0, 0.87]))


def legend_position(width: float, panels: int) -> dict[str, Any]:
    """Where a legend stands: at the side of a single panel, as vega would put it behind the end of
    a title that is longer."""
    if panels > 1:
        return {}
    return {"orient": "none", "direction": "vertical", "legendX": width + 18, "legendY": 0}


def series_legend(title: str | None, lines: Sequence[str], place: Mapping[str, Any]) -> Any:
    """Every series, in columns where there are many."""
    columns = -(-len(lines) // LEGEND_ROWS)
    plain: dict[str, Any] = {"labelLimit": 320, "symbolLimit": 0, "symbolOpacity": 1, **place}
    return alt.Legend(title=title, columns=columns, **plain)


# --- files --------------------------------------------------------------------------------------


class _ScriptEncoder(json.JSONEncoder):
    """JSON inside of a page's script, which no text can end: `</script>` is written otherwise."""

    def encode(self, o: Any) -> str:
        return super().encode(o).replace("<", "\\u003c")


def save_chart(chart: Any, path: Path) -> None:
    """Written in the format of the file's ending."""
    suffix = path.suffix.lower()
    if suffix == ".html":
        chart.save(str(path), format="html", inline=True, json_kwds={"cls": _ScriptEncoder})
    elif suffix == ".png":
        chart.save(str(path), format="png", scale_factor=PNG_SCALE)
    else:
        chart.save(str(path), format="svg")
        path.write_text(_add_titles(path.read_text(encoding="utf-8")), encoding="utf-8")


SVG_NAMESPACE = "http://www.w3.org/2000/svg"

GUIDE_ROLES = {"axis", "legend", "title", "header"}
"""What a drawing has besides its marks."""


def _add_titles(svg: str) -> str:
    """The drawing with its marks' descriptions as titles, which are shown under the pointer."""
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


def save_text_picture(text: str, path: Path) -> None:
    """Lines of fixed-width text as a picture: SVG, or PNG by the ending."""
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
        f'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="13" fill="{INK}">'
        f'<rect width="100%" height="100%" fill="white"/>{rows}</svg>'
    )
    if path.suffix.lower() == ".png":
        import vl_convert

        path.write_bytes(vl_convert.svg_to_png(svg, scale=PNG_SCALE))
    else:
        path.write_text(svg, encoding="utf-8")
