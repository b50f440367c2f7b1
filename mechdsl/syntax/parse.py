"""From text to the syntax tree; a user's text never raises."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from mechdsl.base import limits
from mechdsl.base.source import Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import NotText, ReservedName, TooLarge, Unreadable
from mechdsl.syntax import ast
from mechdsl.syntax.attempt import ParserStopped, attempt
from mechdsl.syntax.scan import outline


def parse(source: Source) -> tuple[ast.File, list[Diagnostic]]:
    """The tree of a text and everything wrong with its syntax, in the order of the text.

    Statements with an error are left out of the tree, the others are in it. Codes: E0101 to
    E0111 and E0114, without E0108.
    """
    found = outline(source)
    if found.problem is not None:
        return ast.File((), found.comments, span=Span(source, 0, 0)), [found.problem]
    try:
        file, diagnostics = attempt(source, source.text)
    except ParserStopped as error:
        # Half of this package is about wrong texts; right ones start faster without it.
        from mechdsl.syntax.mistakes.recover import recover

        statements, diagnostics = recover(source, error.offset)
        file = ast.File(tuple(statements), span=Span(source, 0, len(source.text)))
    return replace(file, comments=found.comments), _reported(diagnostics)


def _reported(diagnostics: list[Diagnostic]) -> list[Diagnostic]:
    """By position, each once, and no more than anyone reads."""
    found = sorted(dict.fromkeys(diagnostics), key=lambda d: d.span.start if d.span else -1)
    # A name that is refused where it is given is no news where it is used.
    refused = {d.name: d for d in reversed(found) if isinstance(d, ReservedName)}
    found = [d for d in found if not isinstance(d, ReservedName) or refused[d.name] is d]
    if len(found) <= limits.SYNTAX_ERRORS:
        return found
    more = TooLarge(
        what=f"more than {limits.SYNTAX_ERRORS} errors of syntax",
        place="more from here on",
        hint="is this a `.mech` file?",
        span=found[limits.SYNTAX_ERRORS].span,
    )
    return [*found[: limits.SYNTAX_ERRORS], more]


def parse_setting(text: str) -> ast.Expr | None:
    """The value of `--set name=VALUE`; None where it is no expression."""
    source = Source(text)
    if outline(source).problem is not None:
        return None
    try:
        clause, diagnostics = attempt(source, text, start="placeholder")
    except ParserStopped:
        return None
    name, value = clause.value
    return None if name is not None or diagnostics else value


def read_source(path: Path) -> tuple[Source | None, list[Diagnostic]]:
    """The text of a file; E0112 where it can't be read, E0110 where it isn't text."""
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = "it is a folder" if os.path.isdir(path) else (error.strerror or str(error)).lower()
        return None, [Unreadable(path=str(path), reason=reason)]
    if b"\0" in data:
        return None, [NotText(path=str(path), reason="it holds a NUL byte")]
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
        return None, [NotText(path=str(path), reason=reason)]
    return Source(text.replace("\r\n", "\n").replace("\r", "\n"), path), []
