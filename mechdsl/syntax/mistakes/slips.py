"""Slips that need no grammar to be seen: signs of other languages, quotes, closed by nothing.

Each is reported and replaced by as many characters that fit, so that the parser can go on and
every later position stays right.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from mechdsl.base.source import STRING, Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import UnexpectedCharacter, UnterminatedString


def _blank(match: re.Match[str]) -> str:
    return " " * len(match[0])


def _quoted(match: re.Match[str]) -> str:
    return f'"{match[0][1:-1]}"'


def _padded(text: str) -> Callable[[re.Match[str]], str]:
    def stand_in(match: re.Match[str]) -> str:
        return text.ljust(len(match[0]))

    return stand_in


def _percent(match: re.Match[str]) -> str:
    number = match[0].rstrip("% \t")
    return f"{number}%".ljust(len(match[0]))


def _first_number(match: re.Match[str]) -> str:
    number = re.match(r"[0-9]+", match[0])
    return (number[0] if number else "").ljust(len(match[0]))


def _arrow(match: re.Match[str]) -> str:
    return "->" if len(match[0]) == 2 else " "


def _letters(match: re.Match[str]) -> str:
    return "x" * len(match[0])


@dataclass(frozen=True)
class Slip:
    """What is matched, what to write instead, and what stands in for it meanwhile."""

    pattern: str
    hint: str
    stand_in: Callable[[re.Match[str]], str] = _blank
    shown: int | None = None
    """How many characters are marked; all of them where None."""


SLIPS: tuple[Slip, ...] = (
    Slip(r'[“”„«»][^“”„«»"\n]*[“”„«»]', 'texts stand between straight quotes: `"…"`', _quoted, 1),
    Slip(r"[‘’'][^‘’'\"\n]*[‘’']", 'texts stand between straight quotes: `"…"`', _quoted, 1),
    Slip(r"[“”„«»‘’']", 'texts stand between straight quotes: `"…"`'),
    Slip(r";", "leave it out: a statement ends where the next one begins"),
    Slip(r"//[^\n]*", "a comment starts with `#`", _blank, 2),
    Slip(r"/\*.*?\*/", "a comment starts with `#` and ends with its line", _blank, 2),
    Slip(r":=", "a definition is written with `=`", _padded("=")),
    Slip(r"==", "equality is a single `=`", _padded("=")),
    Slip(r"&&?", "write `and`", _padded("or")),
    Slip(r"\|\|?", "write `or`", _padded("or")),
    Slip(r"[0-9]+[ \t]+%", "write the percent sign right behind its number: `50%`", _percent),
    Slip(r"[0-9]+[ \t]*[–—][ \t]*[0-9]+", "a range is written `10..20`", _first_number),
    Slip(r"[0-9]+[ \t]*…[ \t]*[0-9]+", "a range is written `10..20`", _first_number),
    Slip(r"…", "a range is written `10..20`"),
    Slip(r"≥", "write `>=`", _padded(">")),
    Slip(r"≤", "write `<=`", _padded("<")),
    Slip(r"≠", "write `!=`", _padded("=")),
    Slip(r"[×·]", "write `*`", _padded("*")),
    Slip(r"÷", "write `/`", _padded("/")),
    Slip(r"[−–—]", "write `-`", _padded("-")),
    Slip(r"[→⟶] ?", "write `->`", _arrow, 1),
    Slip(r"[^\W\dA-Za-z_]\w*", "names are made of the letters a to z, digits and `_`", _letters, 1),
    Slip(r"![^=\S]|!(?=\w)", "write `not`", _blank, 1),
    Slip(r"""[^\s\w"#{}()\[\].,:=+\-*/<>!%]""", "leave it out"),
)
"""Tried in this order at each place outside texts and comments."""

_PATTERN = re.compile(
    rf'(?P<text>{STRING})|(?P<comment>#[^\n]*)|(?P<open>"(?:[^"\\\n]|\\[^\n]|\\$)*)|'
    + "|".join(f"(?P<slip{i}>{slip.pattern})" for i, slip in enumerate(SLIPS)),
    re.MULTILINE | re.DOTALL,
)


def without_slips(source: Source) -> tuple[str, list[Diagnostic]]:
    """The text with every slip replaced by something of the same length, and what they were.

    Comments become blanks.
    """
    diagnostics: list[Diagnostic] = []

    def replace(match: re.Match[str]) -> str:
        if match["text"] is not None:
            return match[0]
        if match["comment"] is not None:
            return _blank(match)
        if match["open"] is not None:
            diagnostics.append(UnterminatedString(span=Span(source, match.start(), match.end())))
            return _close(source.text, match)
        slip = SLIPS[int((match.lastgroup or "slip0")[4:])]
        end = match.end() if slip.shown is None else match.start() + slip.shown
        char = match[0][: slip.shown]
        span = Span(source, match.start(), end)
        diagnostics.append(UnexpectedCharacter(char=char.strip(), hint=slip.hint, span=span))
        return slip.stand_in(match)

    return _PATTERN.sub(replace, source.text), diagnostics


def _close(text: str, match: re.Match[str]) -> str:
    """The text that never ends, closed before the brackets it has most likely swallowed."""
    raw = match[0]
    line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
    missing = 0
    tail = len(raw)
    for opener, closer in ("()", "[]"):
        missing += max(0, line.count(opener) - line.count(closer))
    while missing and tail > 1 and raw[tail - 1] in ")] \t,":
        tail -= 1
        missing -= raw[tail] in ")]"
    if tail == len(raw):
        # No room but the last character of the text itself.
        inner = raw[1:-1].replace("\\", " ")
        return f'"{inner}"' if len(raw) > 1 else " "
    inner = raw[1 : tail - 1].replace("\\", " ")
    return f'"{inner}"'.ljust(tail) + raw[tail:]
