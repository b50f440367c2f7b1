"""`report bars` as a chart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from mechdsl.base.visible import visible
from mechdsl.program import spec
from mechdsl.resolve.cell_key import Coord
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.chart_labels import ChartLabels, labels_below
from mechdsl.show.reports.charts import (
    FAINT,
    INK,
    PALETTE,
    beside,
    colours,
    count_texts,
    faceted,
    faint_said,
    fewer_said,
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
from mechdsl.show.reports.grid import axis_title, drawn_axes, panels, value_text, values_of
from mechdsl.show.reports.text import thin

BAR = 26
"""Width of a bar, less where there are many."""
WIDTH = 1200
"""Of a panel, up to which places grow for their labels."""


def bars_chart(result: ExperimentResult, report: spec.Report) -> Any:
    """One chart per measure: bars with intervals, or the shares of categories as stacks."""
    axes = drawn_axes(result, report)
    charts = [
        titled(
            _stacks(result, measure, axes),
            result,
            data,
            fewer_said(result, data, written=any(own_counts(result, measure))),
        )
        if data.kind == "category"
        else titled(_bars(result, measure, axes), result, data, *said)
        for measure, data in result.computed()
        for said in [
            (
                null_said(result, data),
                fewer_said(result, data, written=any(own_counts(result, measure))),
                faint_said(result, data),
            )
        ]
    ]
    return stacked(charts, result)


@dataclass(frozen=True)
class _Places:
    """Where bars stand."""

    names: dict[Coord, str]
    """Per value its label."""
    series: list[str]
    x: Any
    step: float
    """Width of a place, which the bars of a series share."""
    bar: float
    """Width of a bar."""

    @property
    def width(self) -> float:
        padding = 0.2 if self.series else 0.0  # what vega adds at the ends
        return self.step * (len(self.names) + padding)

    def key(self, key: tuple[Coord, ...]) -> dict[str, str]:
        """What a record says of its place."""
        return {"x": self.names[key[0]], "series": value_text(key[1]) if key[1:] else " "}


def _places(result: ExperimentResult, axes: tuple[str, ...]) -> _Places:
    values = values_of(result, axes[0])
    series = [value_text(value) for value in values_of(result, axes[1])] if axes[1:] else []
    beside = max(1, len(series))
    bar = _bar_width(len(values) * beside)
    labels: ChartLabels = labels_below(values, bar * beside + 14, WIDTH)
    title = None if axes[0] == "position" else axis_title(result, axes[0])
    axis = alt.Axis(title=title, **labels.options)
    x = alt.X("x:N", scale=alt.Scale(domain=labels.texts), axis=axis)
    names = dict(zip(values, labels.texts, strict=True))
    return _Places(names, series, x, labels.step, bar)


def _bar_width(count: int) -> float:
    narrower = {16: BAR, 40: 14, 200: 8, 500: 3}
    return next((width for most, width in narrower.items() if count <= most), 1)


def _bars(result: ExperimentResult, measure: int, axes: tuple[str, ...]) -> Any:
    found, band = result.statistics[measure], result.control(measure)
    shown, few, under = panels(result, axes), thin(result, measure), hovers(result, measure)
    places, counts = _places(result, axes), own_counts(result, measure)

    def number(values: Any, cell: int) -> float | None:
        return float(values[cell]) if np.isfinite(values[cell]) else None

    records = [
        {
            **places.key(key),
            "panel": heading(panel.title, places.width),
            "hover": under[cell],
            "mean": number(found.mean, cell),
            "strength": FAINT if few[cell] else 0.85,
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
    base = hovered(alt.Chart()).encode(x=places.x)
    colour: Any = alt.value(PALETTE[0])
    if series:
        base = base.encode(xOffset=alt.XOffset("series:N", sort=series))
        title = axes[1] if axes[1] != "position" else None
        legend = series_legend(title, series, beside(places.width, len(shown)))
        colour = alt.Color("series:N", sort=series, scale=colours(series), legend=legend)
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
        *([null_band(base, "bar")] if band else []),
        zero_rule(),
        whiskers,
        *ends,
        *([count_texts(base, "top")] if any(counts) else []),
    ]
    step = alt.Step(places.step, **{"for": "position"} if series else {})
    drawn = alt.layer(*layers, data=alt.Data(values=records)).properties(width=step, height=260)
    return faceted(drawn, [panel.title for panel in shown], places.width)


def _stacks(result: ExperimentResult, measure: int, axes: tuple[str, ...]) -> Any:
    """The distribution over categories, one stack per value of the axis."""
    data = result.measures[measure]
    seen = [float(v) for v in np.unique(data.patched[np.isfinite(data.patched)])]
    shown, places = panels(result, axes[:1]), _places(result, axes[:1])
    counts = own_counts(result, measure)
    records = [
        {
            "x": places.names[key[0]],
            "panel": heading(panel.title, places.width),
            "value": f"{value:g}",
            "order": place,
            "n": "" if place else counts[cell],
            "full": 1.0,
            "share": count / n,
            "hover": f"{visible(result.cells[cell].name)}, {value:g}: {count} of n = {n}",
        }
        for panel in shown
        for key, cell in panel.cells.items()
        for n in [int(np.count_nonzero(np.isfinite(data.patched[cell])))]
        for place, value in enumerate(seen)
        for count in [int(np.count_nonzero(data.patched[cell] == value))]
        if n
    ]
    values = [f"{value:g}" for value in seen]
    place = beside(places.width, len(shown))
    base = hovered(alt.Chart()).encode(x=places.x)
    bars = base.mark_bar().encode(
        y=alt.Y("share:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title="share")),
        color=alt.Color(
            "value:N",
            sort=values,
            scale=alt.Scale(domain=values, scheme="viridis"),
            legend=series_legend(visible(data.label), values, place),
        ),
        order=alt.Order("order:Q"),
    )
    layers = [bars, *([count_texts(base, "full")] if any(counts) else [])]
    drawn = alt.layer(*layers, data=alt.Data(values=records))
    drawn = drawn.properties(width=alt.Step(places.step), height=220)
    return faceted(drawn, [panel.title for panel in shown], places.width)
