"""`report heatmap` as a chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.chart_labels import ChartLabels, labels_below, labels_beside, text_width
from mechdsl.show.reports.charts import (
    INK,
    beside,
    faceted,
    heading,
    hovered,
    hovers,
    stacked,
    titled,
    value_title,
)
from mechdsl.show.reports.grid import axis_name, axis_title, panels, row_order, values_of
from mechdsl.show.reports.text import (
    NO_MORE_MARK,
    THIN_MARK,
    fewer,
    fewer_note,
    map_format,
    map_texts,
    no_more_than_random,
    null_words,
    survives,
    survivors,
    thin,
    thin_note,
)

NUMBERED_UP_TO = 160
"""Cells of a map up to which their numbers are written into them."""
LARGEST, SMALLEST = 11.0, 8.0
"""Of the numbers in cells; where they would have to be smaller there are none."""
MOST_WIDTH = 1000
"""Of a map, up to which its cells grow for their numbers and labels."""
NO_VALUE = "#d4d4d4"
"""What lies behind a map; as light as 0, a cell without a value would be taken for it."""
DOT = 9
"""Area of the dot that marks a cell without a number."""
COUNT, CORNER, LIFT = 7.5, 12, 4
"""Size of n in the corner of a cell with fewer prompts; area of the mark where it has no room; how
far it lifts the other number."""


def heatmap_chart(result: ExperimentResult, report: spec.Report) -> Any:
    """The effect over two axes, one map per measure and combination of the other axes."""
    rows, columns = report.variable or "", report.by or ""
    maps = [_heatmap(result, measure, rows, columns) for measure, _ in result.computed()]
    return stacked(maps, result)


@dataclass(frozen=True)
class _Layout:
    """The sizes of a map."""

    rows: ChartLabels
    columns: ChartLabels
    number: float | None
    """Size of the numbers in cells, None where they have no room."""
    lift: int = 0
    """How far they stand above the middle."""

    @classmethod
    def of(
        cls,
        rows: Sequence[Any],
        columns: Sequence[Any],
        numbers: Sequence[str],
        *,
        counted: bool,
    ) -> _Layout:
        """counted: there is a second number in some cells, below the first."""
        count = len(columns)
        step = 44.0 if count <= 8 else 34 if count <= 16 else 22 if count <= 40 else 13
        size = None
        if len(rows) * count <= NUMBERED_UP_TO:
            longest = max((text_width(number, 1) for number in numbers), default=1.0)
            step = max(step, min(LARGEST * longest + 6, MOST_WIDTH / count))
            fitting = min(LARGEST, (step - 6) / longest)
            size = fitting if fitting >= SMALLEST else None
        below = labels_below(columns, step, MOST_WIDTH)
        height = 26 if size or len(rows) <= 16 else 16 if len(rows) <= 40 else 10
        lift = LIFT if size and counted else 0
        return cls(labels_beside(rows, height + 2 * lift), below, size, lift)

    @property
    def width(self) -> float:
        return self.columns.step * len(self.columns.texts)


def _heatmap(result: ExperimentResult, measure: int, rows: str, columns: str) -> Any:
    data, found = result.measures[measure], result.statistics[measure]
    category = data.kind == "category"
    values = found.commonest if category else found.mean
    texts = (
        [f"{value:g}" for value in values]
        if category
        else map_texts(result, measure, map_format(values))
    )
    few, under = thin(result, measure), hovers(result, measure)
    alike = no_more_than_random(result, measure)
    clear = survives(result, measure) & ~alike
    less = fewer(result, measure)
    numbers = [
        (THIN_MARK if mark else "") + text + (NO_MORE_MARK if random else "")
        if np.isfinite(value)
        else ""
        for value, text, mark, random in zip(values, texts, few, alike, strict=True)
    ]
    axes = axis_name(result, rows), axis_name(result, columns)
    shown = panels(result, axes)
    places = row_order(result, axes[0]), values_of(result, axes[1])
    layout = _Layout.of(*places, numbers, counted=bool(less.any()))
    row_texts = dict(zip(places[0], layout.rows.texts, strict=True))
    column_texts = dict(zip(places[1], layout.columns.texts, strict=True))
    finite = values[np.isfinite(values)]
    limit = float(np.abs(finite).max(initial=0.0)) or 1.0
    least = float(finite.min(initial=limit)) if category else 0.0  # what has no colour
    records = [
        {
            "row": row_texts[row],
            "column": column_texts[column],
            "value": float(values[cell]),
            "text": numbers[cell],
            "strong": bool(abs(values[cell] - least) > 0.6 * (limit - least)),
            "survives": bool(clear[cell]),
            "alike": bool(alike[cell]),
            "n": str(int(found.n[cell])),
            "fewer": bool(less[cell]),
            "panel": heading(panel.title, layout.width),
            "hover": under[cell],
        }
        for panel in shown
        for (row, column), cell in panel.cells.items()
        if np.isfinite(values[cell])
    ]
    scale = alt.Scale(scheme="blues")
    if not category:
        colours = ["#b2182b", "#f7f7f7", "#2166ac"]
        scale = alt.Scale(domain=[-limit, 0, limit], range=colours, clamp=True)
    legend = alt.Legend(
        title="commonest" if category else value_title(data),
        gradientLength=min(160, max(60, layout.rows.step * len(places[0]) - 20)),
        format=".2~g",
        **beside(layout.width, len(shown)),
    )
    plain: dict[str, Any] = {"ticks": False, "domain": False}
    below = alt.Axis(
        title=None if axes[1] == "position" else axis_title(result, columns),
        orient="bottom",
        **plain,
        **layout.columns.options,
    )
    at_side = alt.Axis(title=axis_title(result, rows), **plain, **layout.rows.options)
    base = hovered(alt.Chart()).encode(
        x=alt.X("column:N", scale=alt.Scale(domain=layout.columns.texts), axis=below),
        y=alt.Y("row:N", scale=alt.Scale(domain=layout.rows.texts), axis=at_side),
    )
    cells = base.mark_rect(stroke="white", strokeWidth=1.5 if layout.number else 0.4).encode(
        color=alt.Color("value:Q", scale=scale, legend=legend)
    )
    ink = alt.condition("datum.strong", alt.value("white"), alt.value(INK))
    layers = [cells, *_marks(base, layout, ink)]
    if less.any():
        layers.append(_counts(base, layout, ink))
    drawn = alt.layer(*layers, data=alt.Data(values=records))
    drawn = drawn.properties(
        width=alt.Step(layout.columns.step),
        height=alt.Step(layout.rows.step),
        view=alt.ViewConfig(fill=NO_VALUE),
    )
    several = faceted(drawn, [panel.title for panel in shown], layout.width)
    gaps = len(records) < len(shown) * len(places[0]) * len(places[1])
    signs = ("bold", NO_MORE_MARK) if layout.number else ("dot", "ring")
    null = null_words(result, measure)
    lines = [survivors(result, measure, *signs), f"null: {null}" if null else None]
    lines += ["grey: no value" if gaps else None]
    where = "small" if layout.number else "corner (under the pointer)"
    lines.append(fewer_note(result, measure, where))
    lines += [thin_note(result, measure)] if layout.number else []
    return titled(several, result, data, *lines)


def _marks(base: Any, layout: _Layout, ink: Any) -> list[Any]:
    """The numbers, bold in cells that survive and are more than random targets have; where
    numbers have no room, dots in these, and rings in the others that survive."""
    if layout.number is None:
        dots = base.transform_filter("datum.survives").mark_circle(size=DOT, opacity=1)
        rings = base.transform_filter("datum.alike").mark_point(size=DOT, filled=False, opacity=1)
        return [dots.encode(color=ink), rings.encode(color=ink)]
    weight: Any = alt.ExprRef("datum.survives ? 'bold' : 'normal'")
    numbers = base.mark_text(fontSize=layout.number, fontWeight=weight, dy=-layout.lift)
    return [numbers.encode(text="text:N", color=ink)]


def _counts(base: Any, layout: _Layout, ink: Any) -> Any:
    """n in the corner of cells with fewer prompts; a mark there where it has no room."""
    few = base.transform_filter("datum.fewer").encode(color=ink)
    right, below = layout.columns.step / 2, layout.rows.step / 2
    if layout.number is None:
        return few.mark_point(
            shape="triangle-left", filled=True, size=CORNER, opacity=1,
            xOffset=right - 3, yOffset=below - 3,
        )  # fmt: skip
    return few.mark_text(
        fontSize=COUNT, align="right", baseline="bottom", dx=right - 2, dy=below - 1
    ).encode(text="n:N")
