"""One run of the parser over a text or a part of one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lark.exceptions import UnexpectedInput

from mechdsl.base.source import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.syntax.grammar import parser
from mechdsl.syntax.transform import CONTEXT, Context, Reading


@dataclass
class ParserStopped(Exception):
    """The parser met something it has no place for."""

    offset: int
    """In the parsed text; its length where the text ends too early."""
    terminal: str
    """What the lexer took the place for: `$END` at the end, nothing for an unknown character."""
    length: int
    parser: Any
    """Of lark, as it stands there."""

    @cached_property
    def accepts(self) -> frozenset[str]:
        """The terminals that could have stood there; each has to be tried, which takes long."""
        return frozenset(self.parser.accepts() if self.parser else ())


def attempt(
    source: Source,
    text: str,
    base: int = 0,
    start: str = "start",
    reading: Reading | None = None,
) -> tuple[Any, list[Diagnostic]]:
    """Parse `text`, which stands in the source at offset `base`, one of its words perhaps read as
    another one.

    Returns what the start rule makes and what was refused although its shape is right.
    Raises ParserStopped at the first error of syntax.
    """
    context = Context(source, base, reading)
    if reading is not None:
        text = reading.put_into(text)
    token = CONTEXT.set(context)
    try:
        lark: Any = parser()
        return lark.parse(text, start=start), context.diagnostics
    except UnexpectedInput as error:
        raise _stopped(text, error) from None
    finally:
        CONTEXT.reset(token)


def _stopped(text: str, error: Any) -> ParserStopped:
    token: Any = getattr(error, "token", None)
    interactive: Any = getattr(error, "interactive_parser", None)
    if token is None:
        return ParserStopped(error.pos_in_stream, "", 1, interactive)
    if token.type == "$END":
        return ParserStopped(len(text), "$END", 0, interactive)
    return ParserStopped(token.start_pos, token.type, len(token), interactive)
