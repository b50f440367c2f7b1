"""A look at a text before it is parsed: comments, brackets, limits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mechdsl.base.source import Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import EmptyFile, NotText, TooLarge
from mechdsl.syntax import ast

MAX_CHARACTERS = 2_000_000
MAX_BRACKETS = 200

STRING = r'"(?:[^"\\\n]|\\[^\n])*"'
_MARKS = re.compile(rf"{STRING}|#[^\n]*|[{{}}()\[\]]")
_SPACE = re.compile(r"(?:\s|#[^\n]*)*")


@dataclass(frozen=True)
class Outline:
    """What the look found; with `problem` the text is not worth parsing."""

    comments: tuple[ast.Comment, ...] = ()
    problem: Diagnostic | None = None


def skip_space(text: str, start: int = 0) -> int:
    """The offset of the first character that is neither white space nor comment."""
    found = _SPACE.match(text, start)
    return found.end() if found else start


def outline(source: Source) -> Outline:
    """Comments of a text, or the one reason not to read it (E0109, E0110, E0111)."""
    text = source.text
    if len(text) > MAX_CHARACTERS:
        return Outline(
            problem=TooLarge(
                what=f"the file has {len(text):,} characters, the limit is {MAX_CHARACTERS:,}",
                place="a file this large is not read",
                hint="keep data in a file of its own and name it with `rows`",
                span=Span(source, 0, 0),
            )
        )
    if "\0" in text:
        return Outline(problem=NotText(path=source.name, reason="it holds a NUL byte"))
    comments: list[ast.Comment] = []
    depth = 0
    for mark in _MARKS.finditer(text):
        char = mark[0][0]
        if char == "#":
            comments.append(_comment(source, mark.start(), mark.end()))
        elif char in "{([":
            depth += 1
        elif char in "})]":
            depth = max(0, depth - 1)
        if depth > MAX_BRACKETS:
            return Outline(
                problem=TooLarge(
                    what=f"brackets are nested more than {MAX_BRACKETS} deep",
                    place="the limit is passed here",
                    hint="close brackets before opening more",
                    span=Span(source, mark.start(), mark.end()),
                )
            )
    if skip_space(text) == len(text):
        return Outline(tuple(comments), EmptyFile(span=Span(source, 0, 0)))
    return Outline(tuple(comments))


def _comment(source: Source, start: int, end: int) -> ast.Comment:
    text = source.text[start:end].rstrip()
    line_start = source.text.rfind("\n", 0, start) + 1
    own_line = not source.text[line_start:start].strip()
    return ast.Comment(text, own_line, span=Span(source, start, start + len(text)))
