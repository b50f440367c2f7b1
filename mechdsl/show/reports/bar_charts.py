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
from mechdsl.show.reports.charts import (
    FAINT,
    INK,
    PALETTE,
    SPLIT,
    colours,
    faceted,
    label,
    null_band,
    themed,
    titled,
    value_title,
    zero_rule,
)
from mechdsl.show.reports.grid import drawn_axes, panels, value_text, values_of
from mechdsl.show.reports.text import thin

BAR = 26
"""Width of a bar, less where there are many."""
WIDTH = 1200
"""Of all panels in a row."""


def bars_chart(result: ExperimentResult, report: spec.Report) -> Any:
    """One chart per measure: bars with intervals, or the shares of categories as stacks."""
    axes = drawn_axes(result, report)
    charts = [
        titled((_stacks if data.kind == "category" else _bars)(result, measure, axes), result, data)
        for measure, data in result.computed()
    ]
    return themed(alt.vconcat(*charts, spacing=36).resolve_scale(color="independent"))


@dataclass(frozen=True)
class _Places:
    """Where bars stand."""

    series: list[str]
    x: Any
    step: float
    """Width of a place, which the bars of a series share."""
    columns: int
    """Panels beside each other."""

    def width(self) -> Any:
        return alt.Step(self.step, **{"for": "position"} if self.series else {})


def _places(result: ExperimentResult, axes: tuple[str, ...]) -> _Places:
    names = [label(value) for value in values_of(result, axes[0])]
    series = [value_text(value) for value in values_of(result, axes[1])] if axes[1:] else []
    beside = max(1, len(series))
    bars = _bar_width(len(names) * beside) * beside + 14
    longest = max(len(line) for name in names for line in name.split("\n"))
    title = None if axes[0] == "position" else axes[0]
    axis = alt.Axis(title=title, labelAngle=0, labelExpr=SPLIT, labelLimit=240)
    step = max(7.0 * longest + 8, bars)
    columns = max(1, int(WIDTH / (step * len(names) + 60)))
    return _Places(series, alt.X("x:N", sort=names, axis=axis), step, columns)


def _bar_width(count: int) -> float:
    return BAR if count <= 16 else 14 if count <= 40 else 8


def _key(key: tuple[Coord, ...]) -> dict[str, str]:
    return {"x": label(key[0]), "series": value_text(key[1]) if key[1:] else " "}


def _bars(result: ExperimentResult, measure: int, axes: tuple[str, ...]) -> Any:
    found, band = result.statistics[measure], result.control(measure)
    shown, few = panels(result, axes), thin(result, measure)

    def number(values: Any, cell: int) -> float | None:
        return float(values[cell]) if np.isfinite(values[cell]) else None

    records = [
        {
            **_key(key),
            "panel": panel.title,
            "mean": number(found.mean, cell),
            "n": int(found.n[cell]),
            "strength": FAINT if few[cell] else 0.85,
            "low": number(found.low, cell),
            "high": number(found.high, cell),
            "null_low": number(band.low, cell) if band else None,
            "null_high": number(band.high, cell) if band else None,
        }
        for panel in shown
        for key, cell in panel.cells.items()
    ]
    places = _places(result, axes)
    series = places.series
    base = alt.Chart().encode(x=places.x)
    colour: Any = alt.value(PALETTE[0])
    if series:
        base = base.encode(xOffset=alt.XOffset("series:N", sort=series))
        title = axes[1] if axes[1] != "position" else None
        legend = alt.Legend(title=title, labelLimit=320)
        colour = alt.Color("series:N", sort=series, scale=colours(series), legend=legend)
    y = alt.Y("mean:Q", axis=alt.Axis(title=value_title(result.measures[measure])))
    bars = base.mark_bar().encode(
        y=y,
        color=colour,
        opacity=alt.Opacity("strength:Q", scale=None),
        tooltip=["series:N", "x:N", "mean:Q", "low:Q", "high:Q", "n:Q"],
    )
    whiskers = base.mark_rule(color=INK, strokeWidth=1.4).encode(y="low:Q", y2="high:Q")
    ends = [
        base.mark_tick(color=INK, size=8, thickness=1.4).encode(y=f"{e}:Q") for e in ("low", "high")
    ]
    layers: list[Any] = [
        bars,
        *([null_band(base, "bar")] if band else []),
        zero_rule(),
        whiskers,
        *ends,
    ]
    drawn = alt.layer(*layers, data=alt.Data(values=records)).properties(
        width=places.width(), height=260
    )
    return faceted(drawn, [panel.title for panel in shown], places.columns)


def _stacks(result: ExperimentResult, measure: int, axes: tuple[str, ...]) -> Any:
    """The distribution over categories, one stack per value of the axis."""
    data = result.measures[measure]
    seen = [float(v) for v in np.unique(data.patched[np.isfinite(data.patched)])]
    shown = panels(result, axes[:1])
    records = [
        {
            "x": label(key[0]),
            "panel": panel.title,
            "value": f"{value:g}",
            "order": place,
            "count": int(np.count_nonzero(data.patched[cell] == value)),
            "share": float(np.count_nonzero(data.patched[cell] == value) / n),
        }
        for panel in shown
        for key, cell in panel.cells.items()
        for n in [int(np.count_nonzero(np.isfinite(data.patched[cell])))]
        for place, value in enumerate(seen)
        if n
    ]
    values = [f"{value:g}" for value in seen]
    places = _places(result, axes[:1])
    drawn = (
        alt.Chart(alt.Data(values=records))
        .mark_bar()
        .encode(
            x=places.x,
            y=alt.Y("share:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title="share")),
            color=alt.Color(
                "value:N",
                sort=values,
                scale=alt.Scale(domain=values, scheme="viridis"),
                legend=alt.Legend(title=visible(data.label), labelLimit=320),
            ),
            order=alt.Order("order:Q"),
            tooltip=["x:N", "value:N", "share:Q", "count:Q"],
        )
        .properties(width=places.width(), height=220)
    )
    return faceted(drawn, [panel.title for panel in shown], places.columns)
