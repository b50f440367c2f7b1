"""Maps over images: a number for each patch, drawn on the image in grey.

A patch is covered the more, the further its number is from 0: blue above, red below, as in all
maps. One without a number is hatched.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from textwrap import wrap

import numpy as np

from mechdsl.base.arrays import Floats
from mechdsl.base.visible import visible, xml_text
from mechdsl.show.reports.chart_labels import text_width
from mechdsl.show.reports.charts import FONT, INK, QUIET
from mechdsl.show.reports.matrix import NEGATIVE, POSITIVE, Colour
from mechdsl.show.reports.svg_canvas import MARGIN, TITLE, WIDTH, Canvas
from mechdsl.show.reports.token_shades import ImageMaps, Pixels

SIDE, MOST_SIDE = 154, 480
"""Of an image that is drawn: its longer side, and that of one with many patches."""
PATCH = 7
"""Pixels of a patch, at least."""
GAP = 12
"""Between two images."""
COVER = 0.82
"""How much a patch with the greatest number is covered."""
PALE = (204, 244)
"""The darkest and the brightest pixel below: a shade must hang on its number more than on these."""
LUMINANCE = (0.299, 0.587, 0.114)
LEGEND = 160
"""Width of the scale."""
HATCH = (
    '<pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse">'
    '<path d="M0 5L5 0" stroke="#8c8c8c" stroke-width="0.8"/></pattern>'
)


def cover(value: float, limit: float) -> tuple[Colour, float]:
    """The colour over a patch, and how much of the image it hides, 0 to 1."""
    share = min(1.0, abs(value) / limit) if limit > 0 else 0.0
    return (POSITIVE if value > 0 else NEGATIVE), COVER * share


def below(pixels: Pixels) -> Pixels:
    """The image in pale grey, so that colours on it are those of the scale."""
    grey = pixels.astype(np.float64) @ np.array(LUMINANCE)
    low, high = float(grey.min()), float(grey.max())
    pale = np.interp(grey, [low, high], PALE) if high > low else np.full(grey.shape, PALE[1])
    return np.repeat(pale.round().astype(np.uint8)[:, :, None], 3, axis=2)


def drawn_size(each: ImageMaps) -> tuple[float, float]:
    """(width, height) of an image as it is drawn."""
    patches = max((values.shape for _, values in each.maps), default=(1, 1))
    height, width = each.pixels.shape[:2]
    side = min(MOST_SIDE, max(SIDE, PATCH * max(patches)))
    scale = side / max(height, width)
    return width * scale, height * scale


def boxes(
    patches: tuple[int, int], size: tuple[float, float]
) -> Iterator[tuple[int, int, tuple[float, float, float, float]]]:
    """(row, column, (x, y, width, height)) of each patch. size: (width, height) of the image."""
    rows, cols = patches
    across, down = size[0] / cols, size[1] / rows
    for row in range(rows):
        for col in range(cols):
            yield row, col, (col * across, row * down, across, down)


def figure(
    pixels: Pixels,
    values: Floats | None,
    limit: float,
    write: Callable[[float], str],
    size: tuple[float, float],
) -> str:
    """The shapes of one image from (0, 0) on, in SVG; without values as it is.

    pixels: [height, width, 3], 0 to 255. values: [row, col]. limit: the number that is covered
    most. size: (width, height) in which it is drawn.
    """
    width, height = size
    frame = f'width="{width:.1f}" height="{height:.1f}"'
    shown = pixels if values is None else below(pixels)
    parts = [f'<image {frame} preserveAspectRatio="none" href="{png_address(shown, size)}"/>']
    rows, cols = (0, 0) if values is None else values.shape
    for row, col, (x, y, across, down) in boxes((rows, cols), size) if rows else ():
        value = math.nan if values is None else float(values[row, col])
        said, fill = "no value", 'fill="url(#hatch)"'
        if math.isfinite(value):
            (red, green, blue), opacity = cover(value, limit)
            said, fill = write(value), f'fill="rgb({red},{green},{blue})"'
            fill += f' fill-opacity="{opacity:.3f}"'
        parts.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{across:.2f}" height="{down:.2f}" {fill}>'
            f"<title>row {row + 1} col {col + 1}: {xml_text(said)}</title></rect>"
        )
    parts.append(f'<rect {frame} fill="none" stroke="#bbbbbb" stroke-width="0.6"/>')
    return "".join(parts)


def png_address(pixels: Pixels, size: tuple[float, float]) -> str:
    """Pixels as PNG within the file. What is small is enlarged here: viewers would blur it."""
    from PIL import Image

    times = max(1, math.ceil(2 * size[0] / pixels.shape[1]))
    large = pixels.repeat(times, axis=0).repeat(times, axis=1) if times > 1 else pixels
    written = BytesIO()
    Image.fromarray(np.ascontiguousarray(large)).save(written, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode('ascii')}"


def legend(limit: float, write: Callable[[float], str], *, hatched: bool) -> tuple[str, float]:
    """The scale from (0, 0) on, and how wide it is; with what is hatched, if anything is."""
    steps = 40
    parts: list[str] = []
    for step in range(steps):
        (red, green, blue), opacity = cover((2 * (step + 0.5) / steps - 1) * limit, limit)
        parts.append(
            f'<rect x="{step * LEGEND / steps:.2f}" width="{LEGEND / steps + 0.05:.2f}" '
            f'height="10" fill="rgb({red},{green},{blue})" fill-opacity="{opacity:.3f}"/>'
        )
    for text, x, anchor in (
        (write(-limit), 0, "start"),
        ("0", LEGEND / 2, "middle"),
        (write(limit), LEGEND, "end"),
    ):
        parts.append(_text(text, x, 22, anchor))
    width = float(LEGEND)
    if hatched:
        said = "no number there"
        parts.append(
            f'<rect x="{LEGEND + 20}" width="16" height="10" fill="url(#hatch)" stroke="#bbbbbb" '
            f'stroke-width="0.6"/>{_text(said, LEGEND + 42, 9, "start")}'
        )
        width += 42 + text_width(said, 10)
    return "".join(parts), width


def _text(text: str, x: float, y: float, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="10" text-anchor="{anchor}" fill="{QUIET}">'
        f"{xml_text(text)}</text>"
    )


def is_hatched(shown: Sequence[ImageMaps]) -> bool:
    """Whether a patch has no number."""
    return any(np.isnan(values).any() for each in shown for _, values in each.maps)


def figures_of(each: ImageMaps) -> list[tuple[str, Floats | None]]:
    """The image as it is, then under each map."""
    return [("image", None), *each.maps]


def lines_of(each: ImageMaps) -> list[list[tuple[str, Floats | None]]]:
    """The same in lines that are no wider than a picture may be."""
    every, column = figures_of(each), max(drawn_size(each)[0], SIDE)
    count = max(1, int((WIDTH - 2 * MARGIN + GAP) // (column + GAP)))
    return [every[start : start + count] for start in range(0, len(every), count)]


# --- the picture ----------------------------------------------------------------------------------


def draw_maps(
    canvas: Canvas, shown: Sequence[ImageMaps], limit: float, write: Callable[[float], str]
) -> None:
    """Each image beside its maps, in lines, and the scale below all."""
    canvas.shapes.append(f"<defs>{HATCH}</defs>")
    for each in shown:
        canvas.words(each.title, TITLE, INK, "bold")
        canvas.y += 4
        _draw(canvas, each, limit, write)
    if any(each.maps for each in shown):
        scale, width = legend(limit, write, hatched=is_hatched(shown))
        canvas.shapes.append(f'<g transform="translate({MARGIN},{canvas.y + 4:.1f})">{scale}</g>')
        canvas.right = max(canvas.right, MARGIN + width)
        canvas.y += 34


def _draw(canvas: Canvas, each: ImageMaps, limit: float, write: Callable[[float], str]) -> None:
    width, height = drawn_size(each)
    column = max(width, SIDE)
    for line in lines_of(each):
        captions = [wrap(visible(title), max(8, int(column / 6.4))) or [""] for title, _ in line]
        top = canvas.y + 13 * max(map(len, captions))
        for place, ((_, values), caption) in enumerate(zip(line, captions, strict=True)):
            x = MARGIN + place * (column + GAP)
            for number, text in enumerate(reversed(caption)):
                canvas.line(text, x, top - 4 - 13 * number, 11, INK)
            shapes = figure(each.pixels, values, limit, write, (width, height))
            canvas.shapes.append(f'<g transform="translate({x:.1f},{top:.1f})">{shapes}</g>')
            canvas.right = max(canvas.right, x + width)
        canvas.y = top + height + GAP


# --- the page -------------------------------------------------------------------------------------

MAP_STYLE = f""".maps {{ display: flex; flex-wrap: wrap; gap: {GAP}px; align-items: flex-end; }}
figure {{ margin: 0; }}
figcaption {{ font-size: 12px; margin-bottom: 3px; }}
"""


def page_of_maps(shown: Sequence[ImageMaps], limit: float, write: Callable[[float], str]) -> str:
    """The same for a page, where images wrap to its width; numbers stand under the pointer."""
    lines = [f'<svg width="0" height="0" style="position:absolute"><defs>{HATCH}</defs></svg>']
    for each in shown:
        width, height = drawn_size(each)
        lines.append(f'<h2>{xml_text(each.title)}</h2><div class="maps">')
        for title, values in figures_of(each):
            shapes = figure(each.pixels, values, limit, write, (width, height))
            lines.append(
                f'<figure><figcaption style="width:{width:.0f}px">{xml_text(title)}</figcaption>'
                f'<svg role="img" aria-label="{xml_text(title)}" width="{width:.1f}" '
                f'height="{height:.1f}">{shapes}</svg></figure>'
            )
        lines.append("</div>")
    if any(each.maps for each in shown):
        scale, width = legend(limit, write, hatched=is_hatched(shown))
        lines.append(
            f'<svg width="{width:.0f}" height="26" font-family="{FONT}" '
            f'style="margin-top:10px" role="img" aria-label="scale">{scale}</svg>'
        )
    return "\n".join(lines)
