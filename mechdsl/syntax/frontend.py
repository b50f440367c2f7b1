"""Parse a file's text into a syntax tree; a user's text never raises an exception."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from mechdsl.base import limits
from mechdsl.base.text import Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.files import NotMechFile
from mechdsl.diagnostics.syntax import NotText, ReservedName, TooLarge, Unreadable
from mechdsl.syntax import ast
from mechdsl.syntax.parser import ParserError, run_parser, scan_text, skip_space
from mechdsl.syntax.tree_builder import RegisteredWords

_FIRST_LINE = re.compile(r"mech\s+\d")


def parse(source: Source, words: RegisteredWords) -> tuple[ast.File, list[Diagnostic]]:
    """Parse a text.

    A statement with an error stays in the tree if its meaning is clear (a misspelt word of the
    language); otherwise it is one of the tree's lost statements.

    Args:
        words: Words in addition to those of the grammar.

    Returns:
        The tree and all syntax errors in source order (E0101 to E0111 and E0114, except E0108).
    """
    scan = scan_text(source)
    if scan.problem is not None:
        return ast.File((), scan.comments, span=Span(source, 0, 0)), [scan.problem]
    try:
        file, diagnostics = run_parser(source, source.text, words=words)
    except ParserError as error:
        # Half of this package handles syntax errors; valid files start faster without it.
        from mechdsl.syntax.mistakes.recovery import recover

        file, diagnostics = recover(source, error.offset, words)
    return replace(file, comments=scan.comments), _reported(diagnostics)


def _reported(diagnostics: list[Diagnostic]) -> list[Diagnostic]:
    """Sort diagnostics by position, remove duplicates and limit their number."""
    problems = sorted(dict.fromkeys(diagnostics), key=lambda d: d.span.start if d.span else -1)
    # A name rejected at its definition is not reported again at its uses.
    refused = {d.name: d for d in reversed(problems) if isinstance(d, ReservedName)}
    problems = [d for d in problems if not isinstance(d, ReservedName) or refused[d.name] is d]
    if len(problems) <= limits.SYNTAX_ERRORS:
        return problems
    more = TooLarge(
        what=f"more than {limits.SYNTAX_ERRORS} syntax errors",
        place="further errors start here",
        hint="is this a `.mech` file?",
        span=problems[limits.SYNTAX_ERRORS].span,
    )
    return [*problems[: limits.SYNTAX_ERRORS], more]


def parse_setting(text: str) -> ast.Expr | None:
    """Parse the value of `--set name=VALUE`; None if it isn't an expression."""
    source = Source(text)
    if scan_text(source).problem is not None:
        return None
    try:
        clause, diagnostics = run_parser(source, text, start="placeholder")
    except ParserError:
        return None
    name, value = clause.value
    return None if name is not None or diagnostics else value


def read_source(path: Path) -> tuple[Source | None, list[Diagnostic]]:
    """Read the text of a file.

    Codes: E0112 if it can't be read, E0110 if it isn't text, E0534 if it isn't a mechdsl file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = "it is a folder" if os.path.isdir(path) else (error.strerror or str(error)).lower()
        return None, [Unreadable(path=str(path), reason=reason)]
    text, problems = _decoded(data, str(path))
    if text is None:
        return None, problems
    if not _is_mech(path, text):  # no message may quote another file's content
        return None, [NotMechFile(path=str(path))]
    return Source(text, path), []


def decode_stdin(data: bytes) -> tuple[Source | None, list[Diagnostic]]:
    """Decode the bytes of standard input; E0110 if they aren't text."""
    text, problems = _decoded(data, "<stdin>")
    return None if text is None else Source(text, origin="stdin"), problems


def _decoded(data: bytes, name: str) -> tuple[str | None, list[Diagnostic]]:
    """Decode a text and normalise its line endings. `name`: the file's name in messages."""
    if b"\0" in data:
        return None, [NotText(path=name, reason="it contains a NUL byte")]
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return None, [NotText(path=name, reason=f"byte {error.start} is not UTF-8")]
    return text.replace("\r\n", "\n").replace("\r", "\n"), []


def _is_mech(path: Path, text: str) -> bool:
    """Check the name of the file (of a link's target), or else its first line."""
    return (
        path.resolve().suffix.lower() == ".mech"
        or _FIRST_LINE.match(text, skip_space(text)) is not None
    )
