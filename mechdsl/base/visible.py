"""Text as it may be shown: what steers a terminal, or can't be seen, is written out.

Everything that prints or draws goes through here. Raw are only the files that programs read: CSV
(quoted), JSON (escaped by its own rules) and parquet.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any


@cache
def hidden() -> re.Pattern[str]:
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


def visible(text: str, keep: str = "") -> str:
    """The text with hidden characters as in Python: `\\x1b`, `\\u202e`; not those of `keep`."""
    if text.isprintable():
        return text
    return hidden().sub(lambda found: found[0] if found[0] in keep else _written(found[0]), text)


def _written(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def xml_text(text: str) -> str:
    """The text for HTML and SVG, between tags or in quotes."""
    from html import escape  # a table of two thousand names, which checking a file doesn't need

    return escape(visible(text))


def json_text(value: Any, indent: int | None = None) -> str:
    """The value as standard JSON: letters as they are, hidden characters as `\\u001b`.

    Raises ValueError for NaN and infinity, which JSON doesn't have.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    if (text if indent is None else text.replace("\n", "")).isprintable():  # as most are
        return text
    # what json leaves as it is stands inside of strings, but for the line breaks of the indent
    return hidden().sub(
        lambda found: found[0] if found[0] == "\n" else _json_escape(found[0]), text
    )


def encodable_json(text: str, encoding: str | None) -> str:
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
