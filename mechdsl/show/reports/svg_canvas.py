"""A picture of shapes from top to bottom, as SVG."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap

from mechdsl.base.visible import visible, xml_text
from mechdsl.show.reports.chart_labels import text_width
from mechdsl.show.reports.charts import FACT_LINE, FONT, INK, PNG_SCALE, QUIET, TITLE_LINE

WIDTH, MARGIN = 860, 20
"""Of a picture at most; what stands in lines wraps to it."""
TITLE = 12
"""Size of the letters in front of a line and above a prompt."""


@dataclass
class Canvas:
    """Shapes so far; `y` is where the next one goes."""

    y: float = MARGIN / 2
    right: float = 0
    shapes: list[str] = field(default_factory=list[str])

    def words(self, text: str, size: int, ink: str, weight: str = "normal") -> None:
        """A paragraph, in lines."""
        for line in wrap(visible(text), FACT_LINE if size < TITLE else TITLE_LINE):
            self.y += size + 4
            self.line(line, MARGIN, self.y, size, ink, weight)
            self.y += 3

    def heads(self, first: str, *facts: str) -> None:
        """A title, and what stands below it."""
        self.words(first, 15, INK, "bold")
        for fact in facts:
            self.words(fact, 11, QUIET)

    def line(
        self, text: str, x: float, y: float, size: int, ink: str, weight: str = "normal"
    ) -> None:
        """One line of text from x on."""
        self.right = max(self.right, x + text_width(text, size))
        self.shapes.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{ink}" '
            f'font-weight="{weight}">{xml_text(text)}</text>'
        )

    def svg(self) -> str:
        """All of it."""
        width, height = self.right + MARGIN, self.y
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'font-family="{FONT}"><rect width="100%" height="100%" fill="white"/>'
            f"{''.join(self.shapes)}</svg>"
        )

    def save(self, path: Path) -> None:
        """As SVG, or as PNG where the file ends so."""
        if path.suffix.lower() == ".png":
            import vl_convert

            path.write_bytes(vl_convert.svg_to_png(self.svg(), scale=PNG_SCALE))
        else:
            path.write_text(self.svg(), encoding="utf-8")
