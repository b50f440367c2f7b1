"""Source files and spans in them."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

STRING_PATTERN = r'"(?:[^"\\\n]|\\[^\n])*"'
"""A quoted text of the language."""

_BETWEEN = re.compile(rf"({STRING_PATTERN})|(?:\s|#[^\n]*)+")
"""Texts, and white space or comments between words."""


class AllowedFolders(NamedTuple):
    """Folders, including subfolders, that paths in a file may lead to; None: anywhere."""

    reads: tuple[Path, ...] | None = None
    writes: tuple[Path, ...] | None = None


@dataclass(frozen=True, eq=False)
class Source:
    """One `.mech` text and its origin. Compared by identity."""

    text: str
    path: Path | None = None
    """None for text that isn't from a file."""
    reach: AllowedFolders = field(default_factory=AllowedFolders)
    """An imported file has the folders of the file that imports it."""
    origin: str = "text"
    """Origin of a text without a path: `text` (from Python) or `stdin`."""

    @property
    def name(self) -> str:
        """The name in messages: the path as the user wrote it, else `<text>` or `<stdin>`."""
        return str(self.path) if self.path is not None else f"<{self.origin}>"

    def describe_line(self, line: int) -> str:
        """Return a line's location for messages in other files."""
        return f"on line {line} of {self.name}"

    @property
    def stem(self) -> str:
        """A folder name for the file's results."""
        return self.path.stem if self.path is not None else self.origin

    @property
    def folder(self) -> Path:
        """The folder that paths in the file are relative to."""
        return self.path.parent if self.path is not None else Path()

    @cached_property
    def _line_starts(self) -> list[int]:
        starts = [0]
        starts.extend(i + 1 for i, char in enumerate(self.text) if char == "\n")
        return starts

    def line_column(self, offset: int) -> tuple[int, int]:
        """Return 1-based line and column of a character offset."""
        line = bisect_right(self._line_starts, offset)
        return line, offset - self._line_starts[line - 1] + 1

    def line_text(self, line: int) -> str:
        """Return the text of a 1-based line, without its line break."""
        start = self._line_starts[line - 1]
        end = self._line_starts[line] if line < len(self._line_starts) else len(self.text)
        return self.text[start:end].rstrip("\r\n")


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` (exclusive) of a source."""

    source: Source = field(repr=False)
    start: int
    end: int

    @property
    def line(self) -> int:
        return self.source.line_column(self.start)[0]

    @property
    def column(self) -> int:
        return self.source.line_column(self.start)[1]

    @property
    def text(self) -> str:
        return self.source.text[self.start : self.end]

    @property
    def written(self) -> str:
        """The text on one line and without comments, as messages and tables quote it."""
        return _BETWEEN.sub(lambda found: found[1] or " ", self.text).strip()

    def to(self, other: Span) -> Span:
        """Return the span from the start of this one to the end of the other."""
        return Span(self.source, min(self.start, other.start), max(self.end, other.end))
