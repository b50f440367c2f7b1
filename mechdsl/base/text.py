"""Text for messages, terminals and JSON: names, counts, sizes and escapes."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from functools import cache
from itertools import islice
from typing import Any

MAX_NAMES = 12
"""Names of a list that are shown."""

MAX_WIDTH = 40
"""Characters of a name that are shown."""


def shorten(name: str) -> str:
    """The name, or its beginning where it is long."""
    return name if len(name) <= MAX_WIDTH else f"{name[: MAX_WIDTH - 1]}…"


def quote(text: str) -> str:
    """A text for a message, its white space visible."""
    shown = text if len(text) <= MAX_WIDTH else text[: MAX_WIDTH - 3] + "…"
    return "`" + shown.replace("\n", "\\n").replace("\t", "\\t") + "`"


def name_list(names: Iterable[str]) -> str:
    """`` `a`, `b`, `c` ``, empty where there is none; of many the first ones."""
    found = list(islice(names, MAX_NAMES + 1))
    more = " …" if len(found) > MAX_NAMES else ""
    return ", ".join(f"`{shorten(name)}`" for name in found[:MAX_NAMES]) + more


POSITION_SEPARATOR = " at "
"""What stands between the name of a measure and the position that tells it from another."""


def measure_names(label: str) -> tuple[str, ...]:
    """What a measure may be called by: `ld at item 1 token` also by `ld`.

    A text in quotes may have an ` at ` of its own; what is cut off there is no metric's name.
    """
    parts = label.split(POSITION_SEPARATOR)
    return tuple(POSITION_SEPARATOR.join(parts[:end]) for end in range(len(parts), 0, -1))


SHUFFLED_SUFFIX = " shuffled"
"""What a run of another block is called by besides, whose rows are dealt."""


def find_run(name: str, runs: Collection[str]) -> str | None:
    """The run of this name: of the two that another block may have, the one that is paired by
    number; None where there is neither."""
    return next((run for run in (name, name + SHUFFLED_SUFFIX) if run in runs), None)


def count_noun(count: int, noun: str) -> str:
    """`1 row`, `12 rows`, `1,200 values of a`: a noun that takes an `s` behind its number."""
    return f"{count:,} {noun if count == 1 else plural_noun(noun)}"


def plural_noun(noun: str) -> str:
    """`rows`, `values of a`."""
    word, of, name = noun.partition(" of ")
    return f"{word}s{of}{name}"


class Percent(float):
    """`5%` is 5.0 in arithmetic and on plots, and `5%` as text."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"{float(self):g}%"


@cache
def hidden_characters() -> re.Pattern[str]:
    """Unicode's categories Cc, Cf, Cs, Zl and Zp, and what is no character. Made when text has any
    of it, as making it takes a millisecond of each start."""
    return re.compile(
        "["
        "\x00-\x1f\x7f-\x9f"  # C0, DEL, C1: ESC, CSI and OSC begin there
        "\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e"
        "\u200b-\u200f\u2028-\u202e\u2060-\u206f"  # zero-width, line ends, directions
        "\ufeff\ufff9-\ufffb"
        "\ud800-\udfff"  # halves of a character, which no encoding takes
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
    """The text with hidden characters as in Python: `\\x1b`, `\\u202e`; not those of `keep`."""
    if text.isprintable():
        return text
    return hidden_characters().sub(
        lambda found: found[0] if found[0] in keep else _written(found[0]), text
    )


def _written(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def escape_xml(text: str) -> str:
    """The text for HTML and SVG, between tags or in quotes."""
    from html import escape  # a table of two thousand names, which checking a file doesn't need

    return escape(escape_hidden(text))


def dump_json(value: Any, indent: int | None = None) -> str:
    """The value as standard JSON: letters as they are, hidden characters as `\\u001b`.

    Raises ValueError for NaN and infinity, which JSON doesn't have.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    if (text if indent is None else text.replace("\n", "")).isprintable():  # as most are
        return text
    # what json leaves as it is stands inside of strings, but for the line breaks of the indent
    return hidden_characters().sub(
        lambda found: found[0] if found[0] == "\n" else _json_escape(found[0]), text
    )


def escape_unencodable(text: str, encoding: str | None) -> str:
    """A JSON text that stays one where letters can't be encoded."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "".join(char if char.isascii() else _json_escape(char) for char in text)
    return text


def _json_escape(text: str) -> str:
    """Each character as JSON's `\\uXXXX`, in two halves beyond 16 bits."""
    units = text.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def shown_token(token: str) -> str:
    """A token without the white space around it, or that white space by name: `␣`, `\\n`."""
    return escape_hidden(token.strip() or repr(token)[1:-1].replace(" ", "␣") or "∅")


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)B?", re.IGNORECASE)


def parse_size(text: str) -> int | None:
    """`5GB`, `500 MB`, `1.5T` or `1000` in bytes; None for what is no size."""
    found = _SIZE.fullmatch(text.strip())
    return None if found is None else int(float(found[1]) * _UNITS[found[2].upper()])


def format_size(size: int) -> str:
    """`5.2 MB`, with a digit behind the point below 10."""
    unit = next(u for u in ("T", "G", "M", "K", "") if size >= _UNITS[u] or not u)
    if not unit:
        return f"{size} bytes" if size != 1 else "1 byte"
    amount = size / _UNITS[unit]
    name = "k" if unit == "K" else unit
    return f"{amount:.1f} {name}B" if amount < 9.95 else f"{amount:.0f} {name}B"
