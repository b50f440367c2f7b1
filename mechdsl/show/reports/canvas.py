"""An SVG canvas, with the colours, fonts and text widths that all drawings share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from unicodedata import east_asian_width

from mechdsl.base.text import escape_hidden, escape_xml

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

FONT = "Helvetica Neue, Helvetica, Arial, sans-serif"

PNG_SCALE = 2.0

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
            escape_hidden(text), FACT_CHARACTERS if size < CANVAS_TITLE_SIZE else TITLE_CHARACTERS
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

    def save(self, path: Path) -> None:
        """Write the picture as SVG, or as PNG by the file's extension."""
        if path.suffix.lower() == ".png":
            import vl_convert

            path.write_bytes(vl_convert.svg_to_png(self.svg(), scale=PNG_SCALE))
        else:
            path.write_text(self.svg(), encoding="utf-8")


MONO_FONT = "DejaVu Sans Mono, Menlo, Consolas, monospace"
