"""`report overlay` as a chart: shaded tokens in running lines, numbers below them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import altair as alt

from mechdsl.base.arrays import Floats
from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.charts import INK, QUIET, hovered, stacked, titled
from mechdsl.show.reports.image_maps import (
    GAP,
    SIDE,
    below,
    boxes,
    cover,
    drawn_size,
    lines_of,
    png_address,
)
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
from mechdsl.show.reports.token_shades import ImageMaps, Overlay, maps_of, overlays, remarks

TITLE = 22
"""Height of the line above a prompt."""


def overlay_chart(result: ExperimentResult, report: spec.Report) -> Any:
    """One chart per measure that is a number, the prompts below each other."""
    charts: list[Any] = []
    for measure, shown in overlays(result, report).items():
        drawn = _maps(shown) if result.seen else _tokens(shown)
        chart = titled(drawn, result, result.measures[measure])
        said = remarks(result, measure, shown)
        if result.seen:
            said.append(f"full colour at {map_format([shown.limit])(shown.limit)} either way")
        chart.title.subtitle = [*chart.title.subtitle, *said]
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


def _maps(shown: Overlay) -> Any:
    """Images and their maps side by side, in lines; numbers under the pointer."""
    write = map_format([shown.limit])
    images: list[dict[str, Any]] = []
    patches: list[dict[str, Any]] = []
    titles: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    top, right = 0.0, 0.0
    for each in (maps_of(each, write) for each in shown.prompts):
        size = drawn_size(each)
        titles.append({"x": 0, "y": top + TITLE / 2, "text": each.title})
        top += TITLE
        for line in lines_of(each):
            for place, (title, values) in enumerate(line):
                x = place * (max(size[0], SIDE) + GAP)
                captions.append({"x": x, "y": top + TITLE / 2, "text": title})
                corner = (x, top + TITLE)
                images.append(_image(each, values, corner, size))
                if values is not None:
                    patches += _patches(values, shown.limit, write, corner, size)
                right = max(right, x + size[0])
            top += TITLE + size[1] + GAP
    return _drawn_maps(images, patches, (titles, captions), (right, top))


def _image(
    each: ImageMaps, values: Floats | None, corner: tuple[float, float], size: tuple[float, float]
) -> dict[str, Any]:
    pixels = each.pixels if values is None else below(each.pixels)
    (x, y), (width, height) = corner, size
    return {
        "url": png_address(pixels, size),
        "middle": x + width / 2,
        "within": y + height / 2,
        "width": width,
        "height": height,
    }


def _patches(
    values: Floats,
    limit: float,
    write: Callable[[float], str],
    corner: tuple[float, float],
    size: tuple[float, float],
) -> Iterator[dict[str, Any]]:
    for row, col, (x, y, across, down) in boxes(values.shape, size):
        value = float(values[row, col])
        known = math.isfinite(value)
        shade, opacity = cover(value, limit) if known else ((140, 140, 140), 0.5)
        yield {
            "left": corner[0] + x,
            "right": corner[0] + x + across,
            "top": corner[1] + y,
            "bottom": corner[1] + y + down,
            "shade": rgb(shade),
            "opacity": opacity,
            "hover": f"row {row + 1} col {col + 1}: {write(value) if known else 'no value'}",
        }


def _drawn_maps(
    images: list[dict[str, Any]],
    patches: list[dict[str, Any]],
    said: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    size: tuple[float, float],
) -> Any:
    """said: the titles of images, the captions of maps."""
    x, y = _scales(size)
    pictures = [
        alt.Chart(alt.Data(values=[each]))
        .mark_image(width=each["width"], height=each["height"], aspect=False)
        .encode(x=x("middle"), y=y("within"), url="url:N")
        for each in images
    ]
    covers = (
        hovered(alt.Chart(alt.Data(values=patches)))
        .mark_rect()
        .encode(
            x=x("left"),
            x2="right:Q",
            y=y("top"),
            y2="bottom:Q",
            color=alt.Color("shade:N", scale=None),
            opacity=alt.Opacity("opacity:Q", scale=None),
        )
    )
    titles, captions = (_labels(each, x, y) for each in said)
    captions = captions.mark_text(align="left", fontSize=11, color=INK, limit=SIDE)
    layers = alt.layer(*pictures, covers, titles, captions)
    return layers.properties(width=size[0], height=size[1])


def _drawn(tokens: list[dict[str, Any]], titles: list[dict[str, Any]], size: Any) -> Any:
    """Places are points of the picture, so both scales are as long as their sides."""
    x, y = _scales(size)
    placed = hovered(alt.Chart(alt.Data(values=tokens)))
    shades = placed.mark_rect(cornerRadius=3).encode(
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
    layers = alt.layer(shades, words, numbers, _labels(titles, x, y))
    return layers.properties(width=size[0], height=size[1])


Encoded = Callable[[str], Any]


def _scales(size: tuple[float, float]) -> tuple[Encoded, Encoded]:
    """How fields are places of the picture, across and down."""
    width, height = size
    across = alt.Scale(domain=[0, width], nice=False, zero=False)
    down = alt.Scale(domain=[height, 0], nice=False, zero=False)

    def x(field: str) -> Any:
        return alt.X(f"{field}:Q", scale=across, axis=None)

    def y(field: str) -> Any:
        return alt.Y(f"{field}:Q", scale=down, axis=None)

    return x, y


def _labels(titles: list[dict[str, Any]], x: Encoded, y: Encoded) -> Any:
    return (
        alt.Chart(alt.Data(values=titles))
        .mark_text(align="left", fontSize=12, color=INK)
        .encode(x=x("x"), y=y("y"), text="text:N")
    )
