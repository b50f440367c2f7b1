"""Text: source files and the spans in them, and wording of messages, names, counts and sizes."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

MAX_NAMES = 12
"""Maximum number of names shown from a list."""

MAX_WIDTH = 40
"""Maximum number of characters shown of a name."""


class HintedError(Exception):
    """An error with a reason and a hint for the user, both in lower case."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def shorten(name: str) -> str:
    """Return the name, or its beginning if it is long."""
    return name if len(name) <= MAX_WIDTH else f"{name[: MAX_WIDTH - 1]}…"


def quote(text: str) -> str:
    """Quote a text for a message, with its white space visible."""
    shown = text if len(text) <= MAX_WIDTH else text[: MAX_WIDTH - 3] + "…"
    return "`" + shown.replace("\n", "\\n").replace("\t", "\\t") + "`"


def name_list(names: Iterable[str]) -> str:
    """Return `` `a`, `b`, `c` ``, empty for no names; long lists are truncated."""
    shown_names = list(islice(names, MAX_NAMES + 1))
    more = " …" if len(shown_names) > MAX_NAMES else ""
    return ", ".join(f"`{shorten(name)}`" for name in shown_names[:MAX_NAMES]) + more


POSITION_SEPARATOR = " at "
"""Separator between a measure's name and the position that distinguishes it from others."""


def measure_names(label: str) -> tuple[str, ...]:
    """Return the names that refer to a measure: `ld at item 1 token` and `ld`.

    A text in quotes may contain ` at `; its prefix then isn't the name of a metric.
    """
    parts = label.split(POSITION_SEPARATOR)
    return tuple(POSITION_SEPARATOR.join(parts[:end]) for end in range(len(parts), 0, -1))


SHUFFLED_SUFFIX = " shuffled"
"""Suffix of the name of another block's run if its rows are shuffled."""


def find_run(name: str, runs: Collection[str]) -> str | None:
    """Return the name of a run of another block, preferably the run paired by number; None if
    neither exists."""
    return next((run for run in (name, name + SHUFFLED_SUFFIX) if run in runs), None)


def count_noun(count: int, noun: str) -> str:
    """Format a count with its noun: `1 row`, `12 rows`, `1,200 values of a`."""
    return f"{count:,} {noun if count == 1 else plural_noun(noun)}"


def plural_noun(noun: str) -> str:
    """Return the plural: `rows`, `patches`, `values of a`."""
    word, of, name = noun.partition(" of ")
    return f"{word}{'es' if word.endswith('ch') else 's'}{of}{name}"


class Percent(float):
    """A percentage: `5%` is 5.0 in arithmetic and on plots, and `5%` as text."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"{float(self):g}%"


def mixes_counts_and_shares(values: Iterable[object]) -> bool:
    """Whether some values are percentages and others aren't, so that they have no common scale."""
    return len({isinstance(value, Percent) for value in values}) == 2


@cache
def hidden_characters() -> re.Pattern[str]:
    """Compile the pattern of hidden characters.

    They are Unicode's categories Cc, Cf, Cs, Zl and Zp, and non-characters. Compiled only if a text
    has any, because it would cost a millisecond at each start.
    """
    return re.compile(
        "["
        "\x00-\x1f\x7f-\x9f"  # C0, DEL, C1: the start of ESC, CSI and OSC sequences
        "\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e"
        "\u200b-\u200f\u2028-\u202e\u2060-\u206f"  # zero-width, line ends, directions
        "\ufeff\ufff9-\ufffb"
        "\ud800-\udfff"  # surrogates, which no encoding accepts
        "\ufdd0-\ufdef\ufffe\uffff"  # not characters, and not XML
        "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
        "\U000e0001\U000e0020-\U000e007f"
        + "".join(
            f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}"
            for plane in range(1 << 16, 17 << 16, 1 << 16)
        )
        + "]"
    )


def escape_hidden(text: str, keep: str = "") -> str:
    """Escape hidden characters as in Python: `\\x1b`, `\\u202e`; not those of `keep`."""
    if text.isprintable():
        return text
    return hidden_characters().sub(
        lambda match: match[0] if match[0] in keep else _written(match[0]), text
    )


def _written(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def escape_xml(text: str) -> str:
    """Escape a text for HTML and SVG, between tags or in quotes."""
    from html import escape  # slow: a table of two thousand names, not needed for checks

    return escape(escape_hidden(text))


def dump_json(value: Any, indent: int | None = None) -> str:
    """Format a value as standard JSON: letters unchanged, hidden characters as `\\u001b`.

    Raises ValueError for NaN and infinity, which JSON doesn't support.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    if (text if indent is None else text.replace("\n", "")).isprintable():  # the common case
        return text
    # Characters that json leaves unescaped are inside strings, except the indent's line breaks.
    return hidden_characters().sub(
        lambda match: match[0] if match[0] == "\n" else _json_escape(match[0]), text
    )


def escape_unencodable(text: str, encoding: str | None) -> str:
    """Escape non-ASCII letters of a JSON text if the encoding lacks any of them."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "".join(char if char.isascii() else _json_escape(char) for char in text)
    return text


def _json_escape(text: str) -> str:
    """Escape each character as JSON's `\\uXXXX`, as a surrogate pair beyond 16 bits."""
    units = text.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def shown_token(token: str) -> str:
    """Return a token without surrounding white space; white space by name: `␣`, `\\n`."""
    return escape_hidden(token.strip() or repr(token)[1:-1].replace(" ", "␣") or "∅")


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)B?", re.IGNORECASE)


def parse_size(text: str) -> int | None:
    """Convert `5GB`, `500 MB`, `1.5T` or `1000` to bytes; None if the text isn't a size."""
    match = _SIZE.fullmatch(text.strip())
    return None if match is None else int(float(match[1]) * _UNITS[match[2].upper()])


def format_size(size: int) -> str:
    """Format a size: `5.2 MB`, with one decimal below 10."""
    unit = next(u for u in ("T", "G", "M", "K", "") if size >= _UNITS[u] or not u)
    if not unit:
        return f"{size} bytes" if size != 1 else "1 byte"
    amount = size / _UNITS[unit]
    name = "k" if unit == "K" else unit
    return f"{amount:.1f} {name}B" if amount < 9.95 else f"{amount:.0f} {name}B"


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
        return _BETWEEN.sub(lambda match: match[1] or " ", self.text).strip()

    def to(self, other: Span) -> Span:
        """Return the span from the start of this one to the end of the other."""
        return Span(self.source, min(self.start, other.start), max(self.end, other.end))
