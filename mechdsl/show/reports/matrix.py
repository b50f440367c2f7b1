"""Matrices on coloured backgrounds, for reports that print maps.

The numbers are always printed, so that no information depends on colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import wrap

from rich.console import Console
from rich.style import Style
from rich.text import Text

Colour = tuple[int, int, int]

NEGATIVE_COLOUR, NEUTRAL_COLOUR, POSITIVE_COLOUR = (178, 24, 43), (247, 247, 247), (33, 102, 172)

HEADER_WIDTH = 12
"""Width that column headers wrap to, unless a word is longer."""

MAX_DARK_LUMINANCE = 140
"""Maximum luminance of a background with white text."""


def diverging_colour(value: float, limit: float) -> Colour | None:
    """Return a colour of a diverging scale: white at 0, full colour at `limit` and beyond."""
    if not math.isfinite(value) or limit <= 0:
        return None
    share = min(1.0, abs(value) / limit)
    end = POSITIVE_COLOUR if value > 0 else NEGATIVE_COLOUR
    red, green, blue = (
        round(a + (b - a) * share) for a, b in zip(NEUTRAL_COLOUR, end, strict=True)
    )
    return red, green, blue


def needs_white_text(background: Colour) -> bool:
    """Whether white text is more legible than black text on a background."""
    return (
        sum(w * c for w, c in zip((0.299, 0.587, 0.114), background, strict=True))
        <= MAX_DARK_LUMINANCE
    )


def cell_style(background: Colour | None) -> Style:
    """Return a style with legible text on a background."""
    if background is None:
        return Style()
    ink = "white" if needs_white_text(background) else "black"
    red, green, blue = background
    return Style(color=ink, bgcolor=f"rgb({red},{green},{blue})")


@dataclass(frozen=True)
class MatrixEntry:
    """One number, with room for a mark after it."""

    text: str = ""
    colour: Colour | None = None
    bold: bool = False


@dataclass(frozen=True)
class Matrix:
    """Entries with names of columns above and names of rows before them."""

    rows: Sequence[str]
    columns: Sequence[str]
    entries: Sequence[Sequence[MatrixEntry]]
    """Shape [row][column]."""
    rows_title: str = ""
    columns_title: str = ""
    header_colours: Sequence[Colour | None] = field(default_factory=tuple)
    """Colour of each column's name, if it has one."""
    number_width: int = 0
    """Minimum width of numbers, to align several matrices."""

    def print(self, console: Console) -> None:
        """Print the matrix, split by columns to fit the width."""
        headers = [_wrap_header(name) for name in self.columns]
        longest = max(len(name) for name in (self.rows_title, *self.rows))
        label_width = min(longest, max(10, len(self.rows_title), console.width // 3))
        # The column of the mark separates numbers.
        number_width = max(len(entry.text) for row in self.entries for entry in row)
        number_width = max(number_width, self.number_width)
        widths = [max(number_width, 1 + max(map(len, header))) for header in headers]
        room = console.width - label_width - 1
        if sum(widths) + len(widths) <= room:  # add a gap if it cuts nothing
            widths = [width + 1 for width in widths]
        for part in _split_columns(widths, room):
            if self.columns_title:
                title = f"{'':<{label_width}}  {self.columns_title}"
                console.print(Text(title, style="dim"), highlight=False)
            self._print_header(part, headers, widths, label_width, console)
            self._print_rows(part, widths, label_width, console)

    def _print_header(
        self,
        part: Sequence[int],
        headers: Sequence[Sequence[str]],
        widths: Sequence[int],
        label_width: int,
        console: Console,
    ) -> None:
        height = max(len(headers[column]) for column in part)
        for line in range(height):
            label = self.rows_title if line == height - 1 else ""
            text = Text().append(f"{label:<{label_width}} ", style="dim")
            for column in part:
                padded = [""] * (height - len(headers[column])) + list(headers[column])
                background = self.header_colours[column] if self.header_colours else None
                style = cell_style(background) + Style(bold=True)
                text.append(f"{padded[line]:>{widths[column] - 1}} ", style=style)
            _print_line(text, console)

    def _print_rows(
        self, part: Sequence[int], widths: Sequence[int], label_width: int, console: Console
    ) -> None:
        for row, entries in zip(self.rows, self.entries, strict=True):
            names = wrap(row, max(1, label_width)) or [""]
            text = Text().append(f"{names[0]:<{label_width}} ", style="bold")
            for column in part:
                entry = entries[column]
                bold = Style(bold=True) if entry.bold else Style()
                shown = f"{entry.text:>{widths[column]}}"
                text.append(shown, style=cell_style(entry.colour) + bold)
            _print_line(text, console)
            for more in names[1:]:
                console.print(Text(more, style="bold"), highlight=False)


def _print_line(text: Text, console: Console) -> None:
    if console.color_system is None:
        text.rstrip()
    console.print(text, highlight=False, soft_wrap=True)


def _wrap_header(header: str) -> list[str]:
    longest = max((len(word) for word in header.split()), default=1)
    return wrap(header, max(HEADER_WIDTH, longest)) or [""]


def _split_columns(widths: Sequence[int], room: int) -> list[list[int]]:
    """Split columns into groups that fit side by side."""
    parts: list[list[int]] = [[]]
    used = 0
    for column, width in enumerate(widths):
        if parts[-1] and used + width > room:
            parts.append([])
            used = 0
        parts[-1].append(column)
        used += width
    return parts
