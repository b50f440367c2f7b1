"""Charts of `report heatmap`, `report confusion` and `report overlay`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import altair as alt

from mechdsl.base.arrays import Floats
from mechdsl.program import spec
from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.canvas import INK, MONO_FONT, QUIET_INK, page_layout, text_width
from mechdsl.show.reports.charts import (
    LABEL_LINE_HEIGHT,
    LABEL_SIZE,
    ChartLabels,
    add_hover,
    add_title,
    apply_theme,
    column_labels,
    facet_chart,
    legend_position,
    panel_header,
    row_labels,
    stack_charts,
)
from mechdsl.show.reports.colours import ColourScale, diverging_colour, measure_scale, scale_format
from mechdsl.show.reports.grid import (
    ConfusionCounts,
    FigureFrame,
    GridPanel,
    axis_name,
    axis_values,
    capitalise,
    chart_axis_title,
    count_confusions,
    figure_frame,
    grid_panels,
    is_upward,
    position_names,
    quantity_name,
    row_order,
    value_names,
    value_text,
    value_title,
)
from mechdsl.show.reports.overlay_pages import (
    BOX_HEIGHT,
    DRAWN_SIDE,
    IMAGE_GAP,
    TOKEN_LINE_HEIGHT,
    ImageMaps,
    Overlay,
    box_positions,
    box_widths,
    build_overlays,
    css_colour,
    drawn_size,
    figure_lines,
    first_box_x,
    hover_text,
    pale_image,
    patch_boxes,
    patch_cover,
    png_data_url,
    text_colour,
    token_columns,
)
from mechdsl.show.reports.text import (
    RANDOM_MARK,
    THIN_MARK,
    fewer_prompts_note,
    null_band_note,
    significance_note,
    thin_note,
)

MAX_NUMBERED_CELLS = 160
"""Maximum number of cells of a map with numbers."""

MAX_NUMBER_SIZE, MIN_NUMBER_SIZE = 11.0, 8.0
"""Font sizes of the numbers in cells; with a smaller size they are omitted."""

MAX_MAP_WIDTH = 1000
"""Maximum width to which the cells of a map grow for their numbers and labels."""

NO_VALUE_COLOUR = "#d4d4d4"
"""Background of a map; if it were as light as 0, cells without a value would look like 0."""

DOT_AREA = 9
"""Area of the dot that marks a cell without a number."""

CORNER_COUNT_SIZE, CORNER_AREA, CORNER_LIFT = 7.5, 12, 4
"""Font size of n in the corner of a cell with fewer prompts; area of the mark without room for n;
upward shift of the cell's other number."""


def heatmap_chart(result: ExperimentResult, report: spec.Report) -> Any:
    """Draw the effect over two axes, one map per measure and combination of the other axes."""
    rows, columns = report.variable or "", report.by or ""
    frames = [figure_frame(result, measure) for measure, _ in result.computed()]
    return stack_charts([_heatmap_panel(result, each, rows, columns) for each in frames], result)


@dataclass(frozen=True)
class _Layout:
    """The sizes of a map."""

    rows: ChartLabels
    columns: ChartLabels
    number: float | None
    """Font size of the numbers in cells; None without room."""
    lift: int = 0
    """Their upward shift from the middle."""

    @classmethod
    def of(
        cls,
        rows: Sequence[Any],
        columns: Sequence[Any],
        numbers: Sequence[str],
        *,
        counted: bool,
        names: tuple[Mapping[Any, str], Mapping[Any, str]],
    ) -> _Layout:
        """Compute the sizes; `counted`: some cells have a second number below the first. `names`
        are the texts of rows and columns."""
        count = len(columns)
        room = page_layout().room(MAX_MAP_WIDTH)
        step = 44.0 if count <= 8 else 34 if count <= 16 else 22 if count <= 40 else 13
        step, size = min(step, room / count), None
        if len(rows) * count <= MAX_NUMBERED_CELLS:
            longest = max((text_width(number, 1) for number in numbers), default=1.0)
            step = max(step, min(MAX_NUMBER_SIZE * longest + 6, room / count))
            fitting = min(MAX_NUMBER_SIZE, (step - 6) / longest)
            size = fitting if fitting >= MIN_NUMBER_SIZE else None
        below = column_labels(columns, step, room, names[1])
        height = 26 if size or len(rows) <= 16 else 16 if len(rows) <= 40 else 10
        lift = CORNER_LIFT if size and counted else 0
        return cls(row_labels(rows, height + 2 * lift, names[0]), below, size, lift)

    @property
    def width(self) -> float:
        return self.columns.step * len(self.columns.texts)


def _heatmap_panel(result: ExperimentResult, frame: FigureFrame, rows: str, columns: str) -> Any:
    axes = axis_name(result, rows), axis_name(result, columns)
    shown = grid_panels(result, axes, position_names(result))
    places = row_order(result, axes[0]), axis_values(result, axes[1])
    names = value_names(result, axes[0]), value_names(result, axes[1])
    layout = _Layout.of(*places, _numbers(frame), counted=frame.has_fewer, names=names)
    scale = measure_scale(frame.data, frame.values)
    records = _map_records(frame, shown, places, layout, scale)
    title = value_title(frame.data)
    if frame.is_category:
        title = f"Most frequent {quantity_name(frame.data)}"
    legend = _scale_legend(
        title, scale, layout.rows.step * len(places[0]), layout.width, len(shown)
    )
    plain: dict[str, Any] = {"ticks": False, "domain": False}
    below = alt.Axis(
        title=chart_axis_title(result, columns),
        orient="bottom",
        **plain,
        **layout.columns.options,
    )
    at_side = alt.Axis(title=chart_axis_title(result, rows), **plain, **layout.rows.options)
    base = add_hover(alt.Chart()).encode(
        x=alt.X("column:N", scale=alt.Scale(domain=layout.columns.texts), axis=below),
        y=alt.Y("row:N", scale=alt.Scale(domain=layout.rows.texts), axis=at_side),
    )
    cells = base.mark_rect(stroke="white", strokeWidth=1.5 if layout.number else 0.4).encode(
        color=alt.Color("value:Q", scale=_altair_scale(scale), legend=legend)
    )
    ink = alt.condition("datum.strong", alt.value("white"), alt.value(INK))
    layers = [cells, *_number_layers(base, layout, ink)]
    if frame.has_fewer:
        layers.append(_count_layers(base, layout, ink))
    drawn = alt.layer(*layers, data=alt.Data(values=records))
    drawn = drawn.properties(
        width=alt.Step(layout.columns.step),
        height=alt.Step(layout.rows.step),
        view=alt.ViewConfig(fill=NO_VALUE_COLOUR),
    )
    upward = [is_upward(result, axis) for axis in result.axes if axis not in axes] == [True]
    several = facet_chart(drawn, [panel.title for panel in shown], layout.width, upward=upward)
    gaps = len(records) < len(shown) * len(places[0]) * len(places[1])
    lines = _map_notes(result, frame.measure, numbered=layout.number is not None, gaps=gaps)
    return add_title(several, result, frame.data, *lines)


def _numbers(frame: FigureFrame) -> list[str]:
    """Return the text of each cell; empty without a value."""
    return [
        (THIN_MARK if cell.is_thin else "")
        + cell.map_text
        + (RANDOM_MARK if cell.mark == RANDOM_MARK else "")
        if math.isfinite(cell.value)
        else ""
        for cell in frame.cells
    ]


def _map_records(
    frame: FigureFrame,
    panels: Sequence[GridPanel],
    places: tuple[Sequence[Coord], Sequence[Coord]],
    layout: _Layout,
    scale: ColourScale,
) -> list[dict[str, Any]]:
    """Return the data of a map, one record per cell with a value."""
    numbers = _numbers(frame)
    rows = dict(zip(places[0], layout.rows.texts, strict=True))
    columns = dict(zip(places[1], layout.columns.texts, strict=True))
    return [
        {
            "row": rows[row],
            "column": columns[column],
            "value": cell.value,
            "text": numbers[number],
            "strong": scale.is_dark(cell.value),
            "survives": cell.mark == "*",
            "alike": cell.mark == RANDOM_MARK,
            "n": str(cell.n),
            "fewer": cell.has_fewer,
            "panel": panel_header(panel.title, layout.width),
            "hover": cell.hover,
        }
        for panel in panels
        for (row, column), number in panel.cells.items()
        for cell in [frame.cells[number]]
        if math.isfinite(cell.value)
    ]


def _map_notes(
    result: ExperimentResult, measure: int, *, numbered: bool, gaps: bool
) -> Iterator[str | None]:
    """Yield remarks about a map.

    Args:
        numbered: Whether its cells contain numbers.
        gaps: Whether some cells have no value.
    """
    signs = ("bold", RANDOM_MARK) if numbered else ("dot", "ring")
    yield significance_note(result, measure, *signs)
    yield null_band_note(result, measure)
    yield "grey: no value" if gaps else None
    where = "small" if numbered else "corner (under the pointer)"
    yield fewer_prompts_note(result, measure, where)
    yield thin_note(result, measure) if numbered else None


def _altair_scale(scale: ColourScale) -> Any:
    return alt.Scale(domain=scale.domain, range=scale.colours, clamp=True)


LEGEND_TITLE_CHARACTERS = 18
"""Characters per line of the title of a colour scale."""


def _scale_legend(title: str, scale: ColourScale, height: float, width: float, panels: int) -> Any:
    """Return the colour scale next to a map of a given height and width."""
    narrow = page_layout().is_narrow
    lines = [title] if narrow else wrap(title, LEGEND_TITLE_CHARACTERS)
    free = max(100, width) if narrow else height - 12 - LABEL_LINE_HEIGHT * len(lines)
    return alt.Legend(
        title=lines if len(lines) > 1 else title,
        titlePadding=10,
        titleLimit=0,
        gradientLength=min(160, max(60, free)),
        values=scale.labels,
        format=scale_format(scale),
        **legend_position(width, panels),
    )


def _number_layers(base: Any, layout: _Layout, ink: Any) -> list[Any]:
    """Return the numbers, bold in cells that are significant and exceed random targets. Without
    room for numbers, these cells have dots, and other significant cells have rings."""
    if layout.number is None:
        dots = base.transform_filter("datum.survives").mark_circle(size=DOT_AREA, opacity=1)
        rings = base.transform_filter("datum.alike").mark_point(
            size=DOT_AREA, filled=False, opacity=1
        )
        return [dots.encode(color=ink), rings.encode(color=ink)]
    weight: Any = alt.ExprRef("datum.survives ? 'bold' : 'normal'")
    numbers = base.mark_text(fontSize=layout.number, fontWeight=weight, dy=-layout.lift)
    return [numbers.encode(text="text:N", color=ink)]


def _count_layers(base: Any, layout: _Layout, ink: Any) -> Any:
    """Return n in the corner of cells with fewer prompts; a mark without room for n."""
    few = base.transform_filter("datum.fewer").encode(color=ink)
    right, below = layout.columns.step / 2, layout.rows.step / 2
    if layout.number is None:
        return few.mark_point(
            shape="triangle-left", filled=True, size=CORNER_AREA, opacity=1,
            xOffset=right - 3, yOffset=below - 3,
        )  # fmt: skip
    return few.mark_text(
        fontSize=CORNER_COUNT_SIZE, align="right", baseline="bottom", dx=right - 2, dy=below - 1
    ).encode(text="n:N")


SHARE_SIZE, ENTRY_COUNT_SIZE = 11, 9
"""Font sizes of the two numbers of a cell."""

COUNT_COLUMN_GAP = 12
"""Distance between a label and `n`."""

COUNT_COLUMN = "n"
"""The column after the categories, with the row's number of prompts."""


def confusion_chart(result: ExperimentResult, report: spec.Report) -> Any:
    """Draw shares on a map with counts below them; a row's own category is framed."""
    maps: list[Any] = []
    for measure, confusions in count_confusions(result, report).items():
        own = any(column is not None for counts in confusions for column in counts.own)
        framed = f"framed: the category equals the row's {report.variable}" if own else None
        row_title = chart_axis_title(result, report.variable or "")
        column_title = capitalise(quantity_name(result.measures[measure]))
        drawn = _confusion_panel(confusions, row_title, column_title)
        maps.append(add_title(drawn, result, result.measures[measure], framed))
    return apply_theme(alt.vconcat(*maps, spacing=36))


def _count_axis(below: ChartLabels) -> dict[str, Any]:
    """Return the labels of the axis with the column of n after it. If not all numbers are labelled,
    the last label is omitted if it would touch the column's."""
    if "values" not in below.options:
        return below.options
    written = list(below.options["values"])
    reach = text_width(written[-1], LABEL_SIZE) / 2 + COUNT_COLUMN_GAP
    if (len(below.texts) - below.texts.index(written[-1])) * below.step < reach:
        written.pop()
    return {**below.options, "values": [*written, COUNT_COLUMN]}


def _confusion_panel(confusions: list[ConfusionCounts], row_title: str, column_title: str) -> Any:
    rows = list(dict.fromkeys(name for counts in confusions for name in counts.rows))
    columns = list(dict.fromkeys(column for counts in confusions for column in counts.columns))
    numbered = len(rows) * len(columns) <= MAX_NUMBERED_CELLS
    most = max(
        (count for counts in confusions for row in counts.counts for count in row), default=0
    )
    room = page_layout().room(MAX_MAP_WIDTH) / (len(columns) + 1)
    needed = max(text_width("0.00", SHARE_SIZE), text_width(str(most), ENTRY_COUNT_SIZE)) + 6
    numbered = numbered and room >= needed
    step = min(room, max(40.0, needed) if numbered else 18.0)
    shown = [int(c) if c.is_integer() else float(f"{c:g}") for c in columns]
    below = column_labels(shown, step, room * len(columns))
    names_of_rows = row_labels(rows, 34 if numbered else 18)
    width = below.step * (len(columns) + 1)
    records = _confusion_records(confusions, dict(zip(columns, below.texts, strict=True)), width)
    plain: dict[str, Any] = {"ticks": False, "domain": False}
    base = add_hover(alt.Chart()).encode(
        x=alt.X(
            "column:N",
            scale=alt.Scale(domain=[*below.texts, COUNT_COLUMN]),
            axis=alt.Axis(title=column_title, **plain, **_count_axis(below)),
        ),
        y=alt.Y(
            "row:N",
            scale=alt.Scale(domain=names_of_rows.texts),
            axis=alt.Axis(title=row_title, **plain, **names_of_rows.options),
        ),
    )
    scale = ColourScale(0.0, 1.0, diverges=False)
    legend = _scale_legend(
        "Share of the row's prompts", scale, names_of_rows.step * len(rows), width, len(confusions)
    )
    shades = alt.Color("share:Q", scale=_altair_scale(scale), legend=legend)
    layers = _confusion_layers(base, shades, numbered=numbered)
    drawn = alt.layer(*layers, data=alt.Data(values=records)).properties(
        width=alt.Step(below.step), height=alt.Step(names_of_rows.step)
    )
    return facet_chart(drawn, [counts.title for counts in confusions], width)


def _confusion_records(
    found: Sequence[ConfusionCounts], names: Mapping[float, str], width: float
) -> list[dict[str, Any]]:
    """Return the shares, then the number of prompts of each row; `names` are those of columns."""
    records: list[dict[str, Any]] = [
        {
            "row": value_text(name),
            "column": names[column],
            "share": each.share(r, c) if total else None,
            "text": f"{each.share(r, c):.2f}" if count else "",
            "below": f"{count}" if count else "",
            "own": each.own[r] == c and total > 0,
            "panel": panel_header(each.title, width),
            "hover": f"{value_text(name)}, {column:g}: {count} of n = {total}",
        }
        for each in found
        for r, name in enumerate(each.rows)
        for total in [each.total(r)]
        for c, column in enumerate(each.columns)
        for count in [each.counts[r][c]]
    ]
    records += [
        {
            "row": value_text(name),
            "column": COUNT_COLUMN,
            "text": str(each.total(r)),
            "panel": panel_header(each.title, width),
            "hover": f"{value_text(name)}: n = {each.total(r)}",
        }
        for each in found
        for r, name in enumerate(each.rows)
    ]
    return records


def _confusion_layers(base: Any, shades: Any, *, numbered: bool) -> list[Any]:
    """Return the layers from back to front; with numbers if there is room."""
    entries = base.transform_filter(f"datum.column != '{COUNT_COLUMN}'")
    layers: list[Any] = [
        entries.mark_rect(stroke="white", strokeWidth=1.5).encode(color=shades),
        base.transform_filter("datum.own").mark_rect(filled=False, stroke=INK, strokeWidth=1.2),
        base.transform_filter(f"datum.column == '{COUNT_COLUMN}'")
        .mark_text(fontSize=ENTRY_COUNT_SIZE, color=QUIET_INK)
        .encode(text="text:N"),
    ]
    if numbered:
        ink = alt.condition("datum.share > 0.6", alt.value("white"), alt.value(INK))
        quiet = alt.condition("datum.share > 0.6", alt.value("#dddddd"), alt.value(QUIET_INK))
        shares = entries.mark_text(fontSize=SHARE_SIZE, dy=-5)
        counts = entries.mark_text(fontSize=ENTRY_COUNT_SIZE, dy=8)
        layers.append(shares.encode(text="text:N", color=ink))
        layers.append(counts.encode(text="below:N", color=quiet))
    return layers


PROMPT_TITLE_HEIGHT = 22
"""Height of the line above a prompt."""


def overlay_chart(result: ExperimentResult, report: spec.Report) -> Any:
    """Draw one chart per numeric measure, with prompts below one another."""
    charts: list[Any] = []
    for shown in build_overlays(result, report).values():
        parts = [_maps_chart(shown)] if shown.has_images else []
        if not shown.has_images or shown.texts():
            parts.append(_tokens_chart(shown))
        drawn = parts[0] if len(parts) == 1 else alt.vconcat(*parts)
        chart = add_title(drawn, result, shown.data)
        said = list(shown.notes)
        if shown.has_images:
            said.append(f"full colour at ±{shown.write(shown.limit)}")
        chart.title.subtitle = [*chart.title.subtitle, *said]
        charts.append(chart)
    return stack_charts(charts, result)


def _tokens_chart(shown: Overlay) -> Any:
    write = shown.write
    tokens: list[dict[str, Any]] = []
    titles: list[dict[str, Any]] = []
    top = 0
    for text in shown.texts():
        titles.append(
            {"x": 0, "y": top + PROMPT_TITLE_HEIGHT / 2, "text": f"prompt {text.prompt + 1}"}
        )
        top += PROMPT_TITLE_HEIGHT
        columns = token_columns(text, write)
        widths, left = box_widths(columns), first_box_x(text)
        places = box_positions(widths, left)
        for title, values in text.rows:
            titles.append({"x": 0, "y": top + BOX_HEIGHT / 2, "text": title})
            for token, column, value, width, (line, x) in zip(
                text.tokens, columns, values, widths, places, strict=True
            ):
                shade, y = diverging_colour(value, shown.limit), top + line * TOKEN_LINE_HEIGHT
                tokens.append(
                    {
                        "token": column.text,
                        "effect": column.number(value),
                        "hover": hover_text(token, column.number(value)),
                        "left": x,
                        "right": x + width,
                        "middle": x + width / 2,
                        "top": y,
                        "bottom": y + BOX_HEIGHT,
                        "within": y + BOX_HEIGHT / 2,
                        "below": y + BOX_HEIGHT + 8,
                        "shade": css_colour(shade),
                        "ink": text_colour(shade),
                    }
                )
            top += TOKEN_LINE_HEIGHT * (1 + max((line for line, _ in places), default=0))
    size = max((token["right"] for token in tokens), default=0), top
    return _place_layers(tokens, titles, size)


def _maps_chart(shown: Overlay) -> Any:
    """Draw images and their maps side by side, in lines, with numbers as tooltips."""
    write = shown.write
    images: list[dict[str, Any]] = []
    patches: list[dict[str, Any]] = []
    titles: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    top, right = 0.0, 0.0
    for each in shown.images():
        size = drawn_size(each)
        titles.append({"x": 0, "y": top + PROMPT_TITLE_HEIGHT / 2, "text": each.title})
        top += PROMPT_TITLE_HEIGHT
        for line in figure_lines(each):
            for place, (title, values) in enumerate(line):
                x = place * (max(size[0], DRAWN_SIDE) + IMAGE_GAP)
                captions.append({"x": x, "y": top + PROMPT_TITLE_HEIGHT / 2, "text": title})
                corner = (x, top + PROMPT_TITLE_HEIGHT)
                images.append(_image_layer(each, values, corner, size))
                if values is not None:
                    patches += _patch_layer(values, shown.limit, write, corner, size)
                right = max(right, x + size[0])
            top += PROMPT_TITLE_HEIGHT + size[1] + IMAGE_GAP
    return _drawn_maps(images, patches, (titles, captions), (right, top))


def _image_layer(
    maps: ImageMaps, values: Floats | None, corner: tuple[float, float], size: tuple[float, float]
) -> dict[str, Any]:
    pixels = maps.pixels if values is None else pale_image(maps.pixels)
    (x, y), (width, height) = corner, size
    return {
        "url": png_data_url(pixels, size),
        "middle": x + width / 2,
        "within": y + height / 2,
        "width": width,
        "height": height,
    }


def _patch_layer(
    values: Floats,
    limit: float,
    write: Callable[[float], str],
    corner: tuple[float, float],
    size: tuple[float, float],
) -> Iterator[dict[str, Any]]:
    for row, col, (x, y, across, down) in patch_boxes(values.shape, size):
        value = float(values[row, col])
        known = math.isfinite(value)
        shade, opacity = patch_cover(value, limit) if known else ((140, 140, 140), 0.5)
        yield {
            "left": corner[0] + x,
            "right": corner[0] + x + across,
            "top": corner[1] + y,
            "bottom": corner[1] + y + down,
            "shade": css_colour(shade),
            "opacity": opacity,
            "hover": f"row {row + 1} col {col + 1}: {write(value) if known else 'no value'}",
        }


def _drawn_maps(
    images: list[dict[str, Any]],
    patches: list[dict[str, Any]],
    said: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    size: tuple[float, float],
) -> Any:
    """Combine the layers; `said` are the titles of images and the captions of maps."""
    x, y = _position_scales(size)
    pictures = [
        alt.Chart(alt.Data(values=[each]))
        .mark_image(width=each["width"], height=each["height"], aspect=False)
        .encode(x=x("middle"), y=y("within"), url="url:N")
        for each in images
    ]
    covers = (
        add_hover(alt.Chart(alt.Data(values=patches)))
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
    titles, captions = (_label_layer(each, x, y) for each in said)
    captions = captions.mark_text(align="left", fontSize=11, color=INK, limit=DRAWN_SIDE)
    layers = alt.layer(*pictures, covers, titles, captions)
    return layers.properties(width=size[0], height=size[1])


def _place_layers(tokens: list[dict[str, Any]], titles: list[dict[str, Any]], size: Any) -> Any:
    """Combine layers in points of the picture, so that both scales equal the side lengths."""
    x, y = _position_scales(size)
    placed = add_hover(alt.Chart(alt.Data(values=tokens)))
    shades = placed.mark_rect(cornerRadius=3).encode(
        x=x("left"),
        x2="right:Q",
        y=y("top"),
        y2="bottom:Q",
        color=alt.Color("shade:N", scale=None),
    )
    words = placed.mark_text(font=MONO_FONT, fontSize=13).encode(
        x=x("middle"), y=y("within"), text="token:N", color=alt.Color("ink:N", scale=None)
    )
    numbers = placed.mark_text(font=MONO_FONT, fontSize=10, color=QUIET_INK).encode(
        x=x("middle"), y=y("below"), text="effect:N"
    )
    layers = alt.layer(shades, words, numbers, _label_layer(titles, x, y))
    return layers.properties(width=size[0], height=size[1])


FieldEncoder = Callable[[str], Any]


def _position_scales(size: tuple[float, float]) -> tuple[FieldEncoder, FieldEncoder]:
    """Return encoders of fields as horizontal and vertical points of the picture."""
    width, height = size
    across = alt.Scale(domain=[0, width], nice=False, zero=False)
    down = alt.Scale(domain=[height, 0], nice=False, zero=False)

    def x(field: str) -> Any:
        return alt.X(f"{field}:Q", scale=across, axis=None)

    def y(field: str) -> Any:
        return alt.Y(f"{field}:Q", scale=down, axis=None)

    return x, y


def _label_layer(titles: list[dict[str, Any]], x: FieldEncoder, y: FieldEncoder) -> Any:
    return (
        alt.Chart(alt.Data(values=titles))
        .mark_text(align="left", fontSize=12, color=INK)
        .encode(x=x("x"), y=y("y"), text="text:N")
    )
