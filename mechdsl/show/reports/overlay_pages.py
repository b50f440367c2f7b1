"""Overlays: effects at the tokens or image patches of prompts, as pages and pictures.

The colour over a patch is denser the further its number is from 0: blue above, red below, as in all
maps. A patch without a number is hatched.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np
from rich.cells import cell_len

from mechdsl.base.arrays import Floats
from mechdsl.base.text import escape_hidden, escape_xml, shown_token
from mechdsl.program import spec
from mechdsl.results.experiment_result import (
    ANSWER_TOKENS_KEY,
    DEFAULT_SHOWN_PROMPTS,
    ExperimentResult,
    SeenImage,
)
from mechdsl.show.reports.canvas import (
    CANVAS_MARGIN,
    CANVAS_TITLE_SIZE,
    CANVAS_WIDTH,
    FONT,
    INK,
    MONO_FONT,
    QUIET_INK,
    Canvas,
    PageLayout,
    drawn_for,
    page_layout,
    page_width,
    text_width,
)
from mechdsl.show.reports.colours import (
    NEGATIVE_COLOUR,
    POSITIVE_COLOUR,
    Colour,
    diverging_colour,
    effect_scale,
    needs_white_text,
)
from mechdsl.show.reports.grid import UPWARD_AXES, grid_panels, value_title
from mechdsl.show.reports.text import heading_facts, map_format, measure_name, missing_note
from mechdsl.statistics.measurements import MeasureData, effect_parts
from mechdsl.vocab.metrics import EFFECTS

if TYPE_CHECKING:
    from mechdsl.images.pixels import Pixels


@dataclass(frozen=True)
class ShadedPrompt:
    """One prompt with a number at each token, NaN at tokens that no cell hits."""

    prompt: int
    tokens: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]
    """(Coordinates along other axes, numbers)."""
    images: tuple[SeenImage, ...] = ()
    """The images that some of the tokens are in."""

    def without_images(self) -> ShadedPrompt | None:
        """Return the tokens of text; None if no cell hits any in a prompt with images."""
        inside = {n for image in self.images for n in range(*image.span)}
        words = [n for n in range(len(self.tokens)) if n not in inside]
        if inside and not any(math.isfinite(values[n]) for _, values in self.rows for n in words):
            return None
        rows = tuple((title, tuple(values[n] for n in words)) for title, values in self.rows)
        return ShadedPrompt(self.prompt, tuple(self.tokens[n] for n in words), rows)


@dataclass(frozen=True, eq=False)
class ImageMaps:
    """An image, and the numbers of cells at its patches."""

    title: str
    pixels: Pixels
    maps: tuple[tuple[str, Floats], ...]
    """(Name of the cells, a number for each patch, NaN without one, shape [row, col])."""


@dataclass(frozen=True)
class Overlay:
    """The prompts of one measure, for the terminal, pages, pictures and charts."""

    data: MeasureData
    prompts: tuple[ShadedPrompt, ...]
    limit: float
    """The largest absolute number, which has the full colour."""
    notes: tuple[str, ...]
    """What is shown, and why a prompt's number isn't the ratio of that prompt."""
    has_images: bool

    @property
    def write(self) -> Callable[[float], str]:
        """The format of the numbers."""
        return map_format([self.limit])

    def images(self) -> list[ImageMaps]:
        """Return the images with their numbers."""
        return [
            image_maps(prompt, image, self.write)
            for prompt in self.prompts
            for image in prompt.images
        ]

    def texts(self) -> list[ShadedPrompt]:
        """Return the tokens outside images, of prompts in which cells hit any."""
        texts = (prompt.without_images() for prompt in self.prompts)
        return [text for text in texts if text is not None]


def build_overlays(result: ExperimentResult, report: spec.Report) -> Mapping[int, Overlay]:
    """Return the prompts of each measure except categories."""
    overlays: dict[int, Overlay] = {}
    for measure, data in result.computed():
        if data.kind == "category":
            continue
        values = prompt_effects(result, measure)
        there = np.isfinite(values).any(axis=0)
        if result.seen:
            there = there & np.array([bool(images) for images in result.seen])
        hit = np.flatnonzero(there)[: report.top or DEFAULT_SHOWN_PROMPTS]
        shaded = tuple(_shade_prompt(result, values, int(prompt)) for prompt in hit if result.hits)
        numbers = [
            abs(x)
            for shaded_prompt in shaded
            for _, row in shaded_prompt.rows
            for x in row
            if x == x
        ]
        notes = tuple(_overlay_notes(result, data, len(shaded)))
        limit = max(numbers, default=0.0)
        overlays[measure] = Overlay(data, shaded, limit, notes, bool(result.seen))
    return overlays


def prompt_effects(result: ExperimentResult, measure: int) -> Floats:
    """Return each prompt's contribution to the cell's effect, their mean. Shape [cell, prompt].

    The denominator is the mean over prompts, because that of a single prompt may be close to 0.
    """
    data = result.measures[measure]
    effect = EFFECTS[data.effect]
    rows = effect_parts(data, effect, slice(None))
    values = np.where(rows.present, rows.numerator, np.nan)
    if rows.denominator is None:
        return values
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = rows.denominator.sum(1) / rows.present.sum(1)
    return np.asarray(effect.divide(values, mean[:, None]), dtype=np.float64)


def _shade_prompt(result: ExperimentResult, values: Floats, prompt: int) -> ShadedPrompt:
    tokens = result.texts[prompt]
    others = [axis for axis in result.axes if axis != "position"]
    panels = grid_panels(result, ("position",))
    if len(others) == 1 and others[0] in UPWARD_AXES:  # layer 0 is the bottom row, as in maps
        panels.reverse()
    rows: list[tuple[str, tuple[float, ...]]] = []
    for panel in panels:
        at: list[list[float]] = [[] for _ in tokens]
        for cell in panel.cells.values():
            for token in result.hits[cell][prompt]:
                at[token].append(float(values[cell, prompt]))
        # Positions may overlap: a token has the mean over those that hit it.
        rows.append((panel.title, tuple(float(np.mean(x)) if x else math.nan for x in at)))
    return ShadedPrompt(prompt, tokens, tuple(rows), result.seen[prompt] if result.seen else ())


def _overlay_notes(result: ExperimentResult, data: MeasureData, prompts: int) -> list[str]:
    """Describe a figure, and why a prompt's number isn't the ratio of that prompt."""
    images = bool(result.seen)
    if not prompts:
        what = "images" if images else "tokens"
        return [f"no {what} to show: these results don't contain them"]
    count = f"{prompts} of {result.prompts}"
    said = [
        f"{count} prompts, each shown separately; tokens of {result.base}; tokens without a "
        "number belong to no cell"
    ]
    if images:
        said = [
            f"the parts of images that the model reads, of {count} prompts, each shown separately; "
            f"numbers are of patches of {result.base}"
        ]
    if any(cell.queries for cell in result.cells):
        said.append("numbers of attention are at the keys")
    if any(cell.keys for cell in result.cells):
        said.append("numbers of attention are at the queries")
    effect = EFFECTS[data.effect]
    if ANSWER_TOKENS_KEY in result.conventions:
        said.append("only tokens of the prompts, not those of the answer after them")
    if effect.denominator is not None and not data.per_prompt:
        said.append(
            f"{effect.name} of a prompt: divided by the mean of {effect.divisor}, not by "
            "the prompt's own value"
        )
    return said


def image_maps(
    shaded_prompt: ShadedPrompt, seen: SeenImage, write: Callable[[float], str]
) -> ImageMaps:
    """Return the numbers at the patches of an image of a prompt; numbers of its other tokens are
    appended to the name of the map."""
    maps: list[tuple[str, Floats]] = []
    others = [n for n in range(*seen.span) if n not in seen.tokens]
    for title, values in shaded_prompt.rows:
        numbers = [
            f"{shaded_prompt.tokens[n]}: {write(values[n])}"
            for n in others
            if math.isfinite(values[n])
        ]
        named = " · ".join(part for part in (title, *numbers) if part)
        patches = np.array([values[n] for n in seen.tokens]).reshape(seen.rows, seen.cols)
        maps.append((named or "effect", patches))
    alone = len(shaded_prompt.tokens) == len(range(*seen.span))
    said = (
        f"image {shaded_prompt.prompt + 1}: " if alone else f"prompt {shaded_prompt.prompt + 1}, "
    )
    return ImageMaps(said + seen.title, seen.pixels, tuple(maps))


DRAWN_SIDE, MAX_DRAWN_SIDE = 154, 480
"""Longer side of a drawn image, and maximum for one with many patches."""

MIN_PATCH_SIDE = 7
"""Minimum side of a patch in pixels."""

IMAGE_GAP = 12
"""Distance between two images."""

MAX_COVER = 0.82
"""Maximum opacity of the colour over a patch."""

PALE_RANGE = (204, 244)
"""Darkest and brightest pixel of the image below, so that shades depend mostly on the numbers."""

LUMINANCE_WEIGHTS = (0.299, 0.587, 0.114)

LEGEND_WIDTH = 160
"""Width of the scale."""

HATCH_PATTERN = (
    '<pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse">'
    '<path d="M0 5L5 0" stroke="#8c8c8c" stroke-width="0.8"/></pattern>'
)


def patch_cover(value: float, limit: float) -> tuple[Colour, float]:
    """Return the colour over a patch and its opacity, 0 to 1."""
    share = min(1.0, abs(value) / limit) if limit > 0 else 0.0
    return (POSITIVE_COLOUR if value > 0 else NEGATIVE_COLOUR), MAX_COVER * share


def pale_image(pixels: Pixels) -> Pixels:
    """Return the image in pale grey, so that colours over it match the scale."""
    grey = pixels.astype(np.float64) @ np.array(LUMINANCE_WEIGHTS)
    low, high = float(grey.min()), float(grey.max())
    pale = (
        np.interp(grey, [low, high], PALE_RANGE)
        if high > low
        else np.full(grey.shape, PALE_RANGE[1])
    )
    return np.repeat(pale.round().astype(np.uint8)[:, :, None], 3, axis=2)


def drawn_size(maps: ImageMaps) -> tuple[float, float]:
    """Return the (width, height) of a drawn image."""
    patches = max((values.shape for _, values in maps.maps), default=(1, 1))
    height, width = maps.pixels.shape[:2]
    side = min(MAX_DRAWN_SIDE, max(DRAWN_SIDE, MIN_PATCH_SIDE * max(patches)))
    scale = side / max(height, width)
    return width * scale, height * scale


def patch_boxes(
    patches: tuple[int, int], size: tuple[float, float]
) -> Iterator[tuple[int, int, tuple[float, float, float, float]]]:
    """Yield (row, column, (x, y, width, height)) per patch; `size` is the image's (width,
    height)."""
    rows, cols = patches
    across, down = size[0] / cols, size[1] / rows
    for row in range(rows):
        for col in range(cols):
            yield row, col, (col * across, row * down, across, down)


def image_figure(
    pixels: Pixels,
    values: Floats | None,
    limit: float,
    write: Callable[[float], str],
    size: tuple[float, float],
) -> str:
    """Draw one image at (0, 0) as SVG; without values it is unchanged.

    Args:
        pixels: 0 to 255, shape [height, width, 3].
        values: Shape [row, col].
        limit: The number with maximum opacity.
        size: (width, height) of the drawing.
    """
    width, height = size
    frame = f'width="{width:.1f}" height="{height:.1f}"'
    shown = pixels if values is None else pale_image(pixels)
    parts = [f'<image {frame} preserveAspectRatio="none" href="{png_data_url(shown, size)}"/>']
    rows, cols = (0, 0) if values is None else values.shape
    for row, col, (x, y, across, down) in patch_boxes((rows, cols), size) if rows else ():
        value = math.nan if values is None else float(values[row, col])
        said, fill = "no value", 'fill="url(#hatch)"'
        if math.isfinite(value):
            (red, green, blue), opacity = patch_cover(value, limit)
            said, fill = write(value), f'fill="rgb({red},{green},{blue})"'
            fill += f' fill-opacity="{opacity:.3f}"'
        parts.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{across:.2f}" height="{down:.2f}" {fill}>'
            f"<title>row {row + 1} col {col + 1}: {escape_xml(said)}</title></rect>"
        )
    parts.append(f'<rect {frame} fill="none" stroke="#bbbbbb" stroke-width="0.6"/>')
    return "".join(parts)


def png_data_url(pixels: Pixels, size: tuple[float, float]) -> str:
    """Encode pixels as an embedded PNG; small images are enlarged, as viewers would blur them."""
    from PIL import Image

    times = max(1, math.ceil(2 * size[0] / pixels.shape[1]))
    large = pixels.repeat(times, axis=0).repeat(times, axis=1) if times > 1 else pixels
    written = BytesIO()
    Image.fromarray(np.ascontiguousarray(large)).save(written, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode('ascii')}"


def scale_legend(
    limit: float,
    write: Callable[[float], str],
    *,
    hatched: bool,
    ends: tuple[float, float] | None = None,
    title: str = "",
) -> tuple[str, float]:
    """Draw the scale at (0, 0), with a sample of hatching if used; return it with its width.

    Args:
        limit: The number with maximum opacity.
        write: Format of the numbers.
        hatched: Whether patches without a number are hatched.
        ends: The smallest and largest number; by default both are `limit` away from 0.
        title: What the numbers are, with their unit.
    """
    scale = effect_scale(*(ends or (-limit, limit)))
    steps, span = 40, scale.high - scale.low
    parts: list[str] = []
    for step in range(steps):
        value = scale.low + (step + 0.5) / steps * span
        (red, green, blue), opacity = patch_cover(value, limit)
        parts.append(
            f'<rect x="{step * LEGEND_WIDTH / steps:.2f}" '
            f'width="{LEGEND_WIDTH / steps + 0.05:.2f}" height="10" '
            f'fill="rgb({red},{green},{blue})" fill-opacity="{opacity:.3f}"/>'
        )
    for value in scale.labels:
        x = LEGEND_WIDTH * (value - scale.low) / span
        anchor = "start" if value == scale.low else "end" if value == scale.high else "middle"
        parts.append(_svg_text(write(value) if value else "0", x, 22, anchor))
    width = float(LEGEND_WIDTH)
    if title:
        parts.append(_svg_text(title, width + 12, 9, "start"))
        width += 12 + text_width(title, 10)
    if hatched:
        said = "no number here"
        parts.append(
            f'<rect x="{width + 20:.1f}" width="16" height="10" fill="url(#hatch)" '
            f'stroke="#bbbbbb" stroke-width="0.6"/>'
            f"{_svg_text(said, width + 42, 9, 'start')}"
        )
        width += 42 + text_width(said, 10)
    return "".join(parts), width


def _svg_text(text: str, x: float, y: float, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="10" text-anchor="{anchor}" fill="{QUIET_INK}">'
        f"{escape_xml(text)}</text>"
    )


def _number_range(shown: Sequence[ImageMaps]) -> tuple[float, float]:
    """Return the smallest and the largest number of all maps."""
    every = np.concatenate([values.ravel() for maps in shown for _, values in maps.maps])
    finite = every[np.isfinite(every)]
    return float(finite.min(initial=0.0)), float(finite.max(initial=0.0))


def is_hatched(shown: Sequence[ImageMaps]) -> bool:
    """Whether any patch has no number."""
    return any(np.isnan(values).any() for maps in shown for _, values in maps.maps)


def image_figures(maps: ImageMaps) -> list[tuple[str, Floats | None]]:
    """Return the original image, then the image under each map."""
    return [("image", None), *maps.maps]


def figure_lines(maps: ImageMaps) -> list[list[tuple[str, Floats | None]]]:
    """Split the figures of an image into lines within the maximum width."""
    every, column = image_figures(maps), max(drawn_size(maps)[0], DRAWN_SIDE)
    room = page_layout().room(CANVAS_WIDTH) - 2 * CANVAS_MARGIN
    count = max(1, int((room + IMAGE_GAP) // (column + IMAGE_GAP)))
    return [every[start : start + count] for start in range(0, len(every), count)]


# --- the picture ----------------------------------------------------------------------------------


def draw_maps(
    canvas: Canvas,
    shown: Sequence[ImageMaps],
    limit: float,
    write: Callable[[float], str],
    title: str = "",
) -> None:
    """Draw each image next to its maps, in lines, and the scale with its title below all."""
    canvas.shapes.append(f"<defs>{HATCH_PATTERN}</defs>")
    for maps in shown:
        canvas.words(maps.title, CANVAS_TITLE_SIZE, INK, "bold")
        canvas.y += 4
        _draw_line(canvas, maps, limit, write)
    if any(maps.maps for maps in shown):
        scale, width = scale_legend(
            limit, write, hatched=is_hatched(shown), ends=_number_range(shown), title=title
        )
        canvas.shapes.append(
            f'<g transform="translate({CANVAS_MARGIN},{canvas.y + 4:.1f})">{scale}</g>'
        )
        canvas.right = max(canvas.right, CANVAS_MARGIN + width)
        canvas.y += 34


def _draw_line(
    canvas: Canvas, maps: ImageMaps, limit: float, write: Callable[[float], str]
) -> None:
    width, height = drawn_size(maps)
    column = max(width, DRAWN_SIDE)
    for line in figure_lines(maps):
        captions = [
            wrap(escape_hidden(title), max(8, int(column / 6.4))) or [""] for title, _ in line
        ]
        top = canvas.y + 13 * max(map(len, captions))
        for place, ((_, values), caption) in enumerate(zip(line, captions, strict=True)):
            x = CANVAS_MARGIN + place * (column + IMAGE_GAP)
            for number, text in enumerate(reversed(caption)):
                canvas.line(text, x, top - 4 - 13 * number, 11, INK)
            shapes = image_figure(maps.pixels, values, limit, write, (width, height))
            canvas.shapes.append(f'<g transform="translate({x:.1f},{top:.1f})">{shapes}</g>')
            canvas.right = max(canvas.right, x + width)
        canvas.y = top + height + IMAGE_GAP


# --- the page -------------------------------------------------------------------------------------

MAP_STYLE = f"""\
.maps {{ display: flex; flex-wrap: wrap; gap: {IMAGE_GAP}px; align-items: flex-end; }}
figure {{ margin: 0; }}
figcaption {{ font-size: 12px; margin-bottom: 3px; }}
"""


def maps_html(
    shown: Sequence[ImageMaps], limit: float, write: Callable[[float], str], title: str = ""
) -> str:
    """Return the images for a page, where they wrap to its width and numbers are tooltips."""
    lines = [
        f'<svg width="0" height="0" style="position:absolute"><defs>{HATCH_PATTERN}</defs></svg>'
    ]
    for maps in shown:
        width, height = drawn_size(maps)
        lines.append(f'<h2>{escape_xml(maps.title)}</h2><div class="maps">')
        for title, values in image_figures(maps):
            shapes = image_figure(maps.pixels, values, limit, write, (width, height))
            lines.append(
                f'<figure><figcaption style="width:{width:.0f}px">{escape_xml(title)}</figcaption>'
                f'<svg role="img" aria-label="{escape_xml(title)}" width="{width:.1f}" '
                f'height="{height:.1f}">{shapes}</svg></figure>'
            )
        lines.append("</div>")
    if any(maps.maps for maps in shown):
        scale, width = scale_legend(
            limit, write, hatched=is_hatched(shown), ends=_number_range(shown), title=title
        )
        lines.append(
            f'<svg width="{width:.0f}" height="26" font-family="{FONT}" '
            f'style="margin-top:10px" role="img" aria-label="scale">{scale}</svg>'
        )
    return "\n".join(lines)


TOKEN_LETTER_WIDTH, TOKEN_DIGIT_WIDTH = 8.0, 6.3
"""Widths of a character of a token and of a number."""

BOX_HEIGHT, TOKEN_LINE_HEIGHT = 24, 44
"""Heights of a token's box, and of a line with its numbers."""

BOX_GAP = 2
"""Distance between two boxes."""

UNSHADED = (255, 255, 255)


def write_overlay(result: ExperimentResult, report: spec.Report, path: Path) -> None:
    """Write the overlay in the format of the file's extension."""
    overlays = build_overlays(result, report)
    if path.suffix.lower() == ".html":
        path.write_text(_page_html(result, overlays), encoding="utf-8")
        return
    if report.width is None:
        _picture(result, overlays).save(path)
        return
    with drawn_for(PageLayout(page_width(report.width))):
        _picture(result, overlays).save(path, report.width)


def _heading_lines(result: ExperimentResult, shown: Overlay) -> Iterator[str]:
    """Yield the title, then the lines below it."""
    yield f"{result.name}: {measure_name(shown.data)}"
    yield heading_facts(result, shown.data)
    yield from shown.notes
    missing = missing_note(result)
    if missing is not None:
        yield missing


def _empty_picture(result: ExperimentResult) -> tuple[str, str]:
    """Return the text of a picture if no measure could be computed."""
    return f"{result.name}: nothing to draw", missing_note(result) or ""


def css_colour(shade: Colour | None) -> str:
    """Format a background colour for HTML, SVG and charts."""
    return f"rgb{shade or UNSHADED}".replace(" ", "")


def text_colour(shade: Colour | None) -> str:
    """Return the colour of text on a background."""
    return "white" if shade is not None and needs_white_text(shade) else INK


# --- the page -----------------------------------------------------------------------------------

OVERLAY_STYLE = f"""
body {{ font-family: {FONT}; color: {INK}; margin: 24px; }}
h1 {{ font-size: 18px; margin: 24px 0 4px; }}
h2 {{ font-size: 13px; margin: 16px 0 4px; }}
p, small {{ color: {QUIET_INK}; font-size: 12px; margin: 2px 0; }}
.row {{ display: flex; margin: 2px 0; }}
.row > span {{ flex: 0 0 auto; min-width: 72px; padding: 3px 8px 0 0; font-size: 12px; }}
.row > div {{ display: flex; flex-wrap: wrap; gap: 2px; }}
.token {{ display: inline-block; text-align: center; font-family: {MONO_FONT}; font-size: 13px; }}
.token b {{ display: block; font-weight: normal; padding: 3px 5px; border-radius: 3px; }}
.token small {{ display: block; font-size: 10px; min-height: 13px; }}
{MAP_STYLE}"""


def _page_html(result: ExperimentResult, overlays: Mapping[int, Overlay]) -> str:
    body = "".join(_measure_html(result, shown) for shown in overlays.values())
    if not overlays:
        title, why = map(escape_xml, _empty_picture(result))
        body = f"<h1>{title}</h1><p>{why}</p>"
    title = escape_xml(result.name)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{OVERLAY_STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _measure_html(result: ExperimentResult, shown: Overlay) -> str:
    first, *facts = _heading_lines(result, shown)
    write = shown.write
    lines = [f"<h1>{escape_xml(first)}</h1>", *(f"<p>{escape_xml(fact)}</p>" for fact in facts)]
    if shown.has_images:
        lines.append(maps_html(shown.images(), shown.limit, write, value_title(shown.data)))
    for text in shown.texts():
        lines.append(f"<h2>prompt {text.prompt + 1}</h2>")
        columns = token_columns(text, write)
        for title, values in text.rows:
            label = f"<span>{escape_xml(title)}</span>" if title else ""
            tokens = "".join(
                _token_html(token, value, diverging_colour(value, shown.limit), column)
                for token, value, column in zip(text.tokens, values, columns, strict=True)
            )
            lines.append(f'<div class="row">{label}<div>{tokens}</div></div>')
    return "\n".join(lines)


@dataclass(frozen=True)
class TokenColumn:
    """One token of a prompt, with its numbers in all rows."""

    text: str
    letters: int
    digits: int
    write: Callable[[float], str]

    def number(self, value: float) -> str:
        return self.write(value) if math.isfinite(value) else ""


def token_columns(shaded_prompt: ShadedPrompt, write: Callable[[float], str]) -> list[TokenColumn]:
    """Return columns with the same width in every row, so that rows can be compared."""
    return [
        TokenColumn(
            shown_token(token),
            cell_len(shown_token(token)),
            max(len(write(row[i])) for _, row in shaded_prompt.rows),
            write,
        )
        for i, token in enumerate(shaded_prompt.tokens)
    ]


def box_widths(columns: Sequence[TokenColumn]) -> list[float]:
    """Return the widths of the tokens' boxes in a picture."""
    return [
        max(c.letters * TOKEN_LETTER_WIDTH + 10, c.digits * TOKEN_DIGIT_WIDTH + 4) for c in columns
    ]


def first_box_x(shaded_prompt: ShadedPrompt) -> float:
    """Return the left end of the first token, after the titles of the rows."""
    longest = max(text_width(title, CANVAS_TITLE_SIZE) for title, _ in shaded_prompt.rows)
    return longest + 12 if longest else 0


def box_positions(widths: Sequence[float], left: float) -> list[tuple[int, float]]:
    """Return the line and the left end of each box."""
    places: list[tuple[int, float]] = []
    line, x, right = 0, left, page_layout().room(CANVAS_WIDTH) - CANVAS_MARGIN
    for width in widths:
        if x > left and x + width > right:
            line, x = line + 1, left
        places.append((line, x))
        x += width + BOX_GAP
    return places


def hover_text(token: str, number: str) -> str:
    """Return the tooltip: the token with its spaces, and its number."""
    return f"{escape_hidden(repr(token))} {number or 'no value'}"


def _token_html(token: str, value: float, shade: Colour | None, column: TokenColumn) -> str:
    style = f"background:{css_colour(shade)};color:{text_colour(shade)}"
    number = column.number(value)
    width = f"min-width:{max(column.letters + 1, 0.8 * column.digits):.1f}ch"
    return (
        f'<span class="token" style="{width}" title="{escape_xml(hover_text(token, number))}">'
        f'<b style="{style}">{escape_xml(column.text)}</b><small>{number}</small></span>'
    )


# --- the picture --------------------------------------------------------------------------------


def _picture(result: ExperimentResult, overlays: Mapping[int, Overlay]) -> Canvas:
    canvas = Canvas()
    for shown in overlays.values():
        canvas.heads(*_heading_lines(result, shown))
        canvas.y += 8
        write = shown.write
        if shown.has_images:
            title = value_title(shown.data)
            draw_maps(canvas, shown.images(), shown.limit, write, title)
        for text in shown.texts():
            canvas.words(f"prompt {text.prompt + 1}", CANVAS_TITLE_SIZE, INK, "bold")
            canvas.y += 4
            _draw_prompt(canvas, text, shown.limit, write)
            canvas.y += 6
        canvas.y += 14
    if not overlays:
        canvas.heads(*_empty_picture(result))
    return canvas


def _draw_prompt(
    canvas: Canvas, shaded_prompt: ShadedPrompt, limit: float, write: Callable[[float], str]
) -> None:
    """Draw the tokens once per row of numbers, in aligned columns."""
    columns = token_columns(shaded_prompt, write)
    widths = box_widths(columns)
    places = box_positions(widths, CANVAS_MARGIN + first_box_x(shaded_prompt))
    for title, values in shaded_prompt.rows:
        if title:
            canvas.line(title, CANVAS_MARGIN, canvas.y + 16, CANVAS_TITLE_SIZE, INK)
        first = canvas.y
        for token, column, value, width, (line, x) in zip(
            shaded_prompt.tokens, columns, values, widths, places, strict=True
        ):
            canvas.y = first + line * TOKEN_LINE_HEIGHT
            said, shade = hover_text(token, column.number(value)), diverging_colour(value, limit)
            canvas.shapes.append(f"<g><title>{escape_xml(said)}</title>")
            canvas.shapes.append(
                _draw_token(column.text, column.number(value), shade, x, canvas.y, width)
            )
            canvas.shapes.append("</g>")
            canvas.right = max(canvas.right, x + width + BOX_GAP)
        canvas.y += TOKEN_LINE_HEIGHT


def _draw_token(
    text: str, number: str, shade: Colour | None, x: float, y: float, width: float
) -> str:
    middle = x + width / 2
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BOX_HEIGHT}" rx="3" '
        f'fill="{css_colour(shade)}"/>'
        f'<text x="{middle:.1f}" y="{y + 16:.1f}" font-size="13" text-anchor="middle" '
        f'font-family="{MONO_FONT}" fill="{text_colour(shade)}">{escape_xml(text)}</text>'
        f'<text x="{middle:.1f}" y="{y + BOX_HEIGHT + 12:.1f}" font-size="10" '
        f'text-anchor="middle" font-family="{MONO_FONT}" fill="{QUIET_INK}">{number}</text>'
    )
