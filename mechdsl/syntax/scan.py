"""A look at a text before it is parsed: comments, brackets, limits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mechdsl.base import limits
from mechdsl.base.source import STRING, Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import EmptyFile, NotText, TooLarge
from mechdsl.syntax import ast

_MARKS = re.compile(rf"{STRING}|#[^\n]*|\w+|[^\w\s]")
_PLACEHOLDER = re.compile(r"(?<!\{)(?:\{\{)*\{(?!\{)")
_SPLIT = "keep data in a file of its own and name it with `rows`, or write several files"
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
    if "\0" in text:
        return Outline(problem=NotText(path=source.name, reason="it holds a NUL byte"))
    if (problem := _too_long(source)) is not None:
        return Outline(problem=problem)
    comments: list[ast.Comment] = []
    depth = words = placeholders = 0
    for mark in _MARKS.finditer(text):
        piece = mark[0]
        if piece[0] == "#":
            comments.append(_comment(source, mark.start(), mark.end()))
            continue
        if piece[0] == '"':
            placeholders += len(_PLACEHOLDER.findall(piece))
        elif piece in "{([":
            depth += 1
        elif piece in "})]":
            depth = max(0, depth - 1)
        words += 1
        passed = None
        if depth > limits.BRACKETS:
            passed = (
                f"brackets are nested more than {limits.BRACKETS} deep",
                "close brackets before opening more",
            )
        elif len(piece) > limits.NAME and (piece[0].isalpha() or piece[0] == "_"):
            passed = (
                f"this name has {len(piece):,} characters, the limit is {limits.NAME}",
                "choose a shorter name",
            )
        elif words > limits.WORDS:
            passed = f"the file has more than {limits.WORDS:,} words and signs", _SPLIT
        elif placeholders > limits.PLACEHOLDERS:
            passed = (
                f"the texts of the file have more than {limits.PLACEHOLDERS:,} placeholders",
                "make a list with `list(…)`, or keep the texts in a file that `rows` names",
            )
        if passed is not None:
            place = "the limit is passed here"
            span = Span(source, mark.start(), mark.end())
            problem = TooLarge(what=passed[0], place=place, hint=passed[1], span=span)
            return Outline(problem=problem)
    if skip_space(text) == len(text):
        return Outline(tuple(comments), EmptyFile(span=Span(source, 0, 0)))
    return Outline(tuple(comments))


def _too_long(source: Source) -> Diagnostic | None:
    """E0109 for what can be told without reading."""
    counts = (
        ("characters", len(source.text), limits.CHARACTERS),
        ("lines", source.text.count("\n"), limits.LINES),
    )
    for what, count, most in counts:
        if count > most:
            return TooLarge(
                what=f"the file has {count:,} {what}, the limit is {most:,}",
                place="a file this large is not read",
                hint=_SPLIT,
                span=Span(source, 0, 0),
            )
    return None


def _comment(source: Source, start: int, end: int) -> ast.Comment:
    text = source.text[start:end].rstrip()
    line_start = source.text.rfind("\n", 0, start) + 1
    own_line = not source.text[line_start:start].strip()
    return ast.Comment(text, own_line, span=Span(source, start, start + len(text)))
