"""An SVG canvas, with the colours, fonts, widths and file formats that all drawings share.

A pixel of a drawing is 1/96 inch in every format, as in browsers. Fonts come with vl-convert
(Liberation Sans); PDF embeds them, and SVG names fonts with equal letter widths.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from unicodedata import east_asian_width

from mechdsl.base.text import escape_hidden, escape_xml
from mechdsl.show.reports.drawing import call_drawing

NARROW_LETTERS, THIN_LETTERS, WIDE_LETTERS = (
    set("ijl.,:;'|! ·"),
    set("fIrt()[]-/\\"),
    set("mwMW%@…→"),
)


def text_width(text: str, size: float) -> float:
    """Estimate the width of a text in Helvetica, in points, rounded up."""
    return size * sum(map(_letter_width, text))


def _letter_width(char: str) -> float:
    if char in NARROW_LETTERS:
        return 0.28
    if char in THIN_LETTERS:
        return 0.34
    if char in WIDE_LETTERS or east_asian_width(char) in "WF":
        return 1.0
    return 0.75 if char.isupper() else 0.585


INK, QUIET_INK = "#222222", "#666666"

FONT = "Liberation Sans, Arial, Helvetica, sans-serif"

PIXELS_PER_INCH, POINTS_PER_INCH = 96, 72

PNG_DPI = 300

COLUMN_WIDTHS = {1: 3.25, 2: 6.75}
"""Width of a picture in a paper, in inches, by the number of columns that it spans."""

PAGE_SCALE = 0.85
"""Scale of pictures in a paper, where labels of 11 pixels have 7 points."""

NARROW_PAGE = 500
"""Page width in unscaled pixels below which a legend is under its chart."""


@dataclass(frozen=True)
class PageLayout:
    """The width that a picture may have, in unscaled pixels; None: any width."""

    width: float | None = None
    margin: float = 0.0
    """Width of axes, legends and white space, which is not available to marks."""

    @property
    def is_narrow(self) -> bool:
        return self.width is not None and self.width < NARROW_PAGE

    def room(self, most: float) -> float:
        """Return the width for marks, at most `most`."""
        return most if self.width is None else max(MIN_ROOM, min(most, self.width - self.margin))

    def characters(self, most: int, size: float) -> int:
        """Return the number of characters of a font size in a line, at most `most`."""
        return most if self.width is None else min(most, int(self.width / (0.56 * size)))


MIN_ROOM = 120
"""Minimum width for marks; a picture that needs more is scaled down."""

_ANY_WIDTH = PageLayout()

_LAYOUT: ContextVar[PageLayout] = ContextVar("_LAYOUT", default=_ANY_WIDTH)


def page_layout() -> PageLayout:
    """Return the layout of the picture that is being drawn."""
    return _LAYOUT.get()


@contextmanager
def drawn_for(layout: PageLayout) -> Generator[None]:
    """Draw with a layout in this context."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def page_width(columns: int) -> float:
    """Return the width of a picture over one or two columns, in unscaled pixels."""
    return COLUMN_WIDTHS[columns] * PIXELS_PER_INCH / PAGE_SCALE


SVG_SIZE = re.compile(r'(?<=\s)(width|height|viewBox)="([^"]*)"')


def svg_size(svg: str) -> tuple[float, float]:
    """Return the width and the height of a drawing in pixels."""
    size = dict(SVG_SIZE.findall(svg[: svg.index(">")]))
    return float(size["width"]), float(size["height"])


def write_picture(svg: str, path: Path, columns: int | None = None) -> None:
    """Write a drawing as SVG, or as PNG or PDF by the file's extension.

    On a page of a paper, a narrower drawing keeps the page's font size, with white space to the
    right; a wider one is scaled down.

    Args:
        svg: The drawing, with a width and a height in pixels.
        path: The file.
        columns: Columns of a paper that the picture spans; None: its own size.

    Raises:
        DrawingError: If it can't be converted.
    """
    suffix, inch = path.suffix.lower(), 1 / PIXELS_PER_INCH
    width, height = svg_size(svg)
    if columns is not None:
        width = max(width, page_width(columns))
        inch = COLUMN_WIDTHS[columns] / width
        background = f'<rect width="{width:.2f}" height="{height:.2f}" fill="white"/>'
        svg = _resize(svg, (width, height), inch, "in", background)
    if suffix not in (".png", ".pdf"):
        path.write_text(svg, encoding="utf-8")
        return
    if suffix == ".png":
        scale = POINTS_PER_INCH / PIXELS_PER_INCH
        path.write_bytes(call_drawing("svg_to_png", svg, scale=scale, ppi=PNG_DPI))
        return
    # In a PDF, vl-convert takes a pixel for a point.
    sized = _resize(svg, (width, height), POINTS_PER_INCH * inch, "")
    path.write_bytes(call_drawing("svg_to_pdf", sized))


def _resize(
    svg: str, size: tuple[float, float], scale: float, unit: str, background: str = ""
) -> str:
    """Return a drawing of `size` pixels that is displayed at another size.

    Args:
        svg: The drawing.
        size: Its width and height in pixels, all of which are visible.
        scale: The displayed size of a pixel in `unit`.
        unit: `in`, or empty for pixels.
        background: A shape below all others.
    """
    end = svg.index(">")
    width, height = size
    return (
        f'{SVG_SIZE.sub("", svg[:end])} width="{width * scale:.6g}{unit}" '
        f'height="{height * scale:.6g}{unit}" viewBox="0 0 {width:.2f} {height:.2f}">'
        f"{background}{svg[end + 1 :]}"
    )


TITLE_CHARACTERS, FACT_CHARACTERS = 80, 110
"""Characters per line above a chart."""

CANVAS_WIDTH, CANVAS_MARGIN = 860, 20
"""Maximum width and margin of a picture; lines wrap to the width."""

CANVAS_TITLE_SIZE = 12
"""Font size of text before a line and above a prompt."""


@dataclass
class Canvas:
    """Collects shapes; `y` is the top of the next one."""

    y: float = CANVAS_MARGIN / 2
    right: float = 0
    shapes: list[str] = field(default_factory=list[str])

    def words(self, text: str, size: int, ink: str, weight: str = "normal") -> None:
        """Add a paragraph, wrapped into lines."""
        for line in wrap(
            escape_hidden(text),
            page_layout().characters(
                FACT_CHARACTERS if size < CANVAS_TITLE_SIZE else TITLE_CHARACTERS, size
            ),
        ):
            self.y += size + 4
            self.line(line, CANVAS_MARGIN, self.y, size, ink, weight)
            self.y += 3

    def heads(self, first: str, *facts: str) -> None:
        """Add a title and the facts below it."""
        self.words(first, 15, INK, "bold")
        for fact in facts:
            self.words(fact, 11, QUIET_INK)

    def line(
        self, text: str, x: float, y: float, size: int, ink: str, weight: str = "normal"
    ) -> None:
        """Add one line of text that begins at x."""
        self.right = max(self.right, x + text_width(text, size))
        self.shapes.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{ink}" '
            f'font-weight="{weight}">{escape_xml(text)}</text>'
        )

    def svg(self) -> str:
        """Return the document."""
        width, height = self.right + CANVAS_MARGIN, self.y
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'font-family="{FONT}"><rect width="100%" height="100%" fill="white"/>'
            f"{''.join(self.shapes)}</svg>"
        )

    def save(self, path: Path, columns: int | None = None) -> None:
        """Write the picture; see `write_picture`."""
        write_picture(self.svg(), path, columns)


MONO_FONT = "DejaVu Sans Mono, Menlo, Consolas, monospace"
