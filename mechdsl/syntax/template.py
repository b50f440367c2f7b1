"""Texts with placeholders: `"Part 1: {fruits} Count 1:"`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mechdsl.base.source import Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import BadPlaceholder
from mechdsl.syntax import ast
from mechdsl.syntax.attempt import ParserStopped, attempt
from mechdsl.syntax.scan import outline
from mechdsl.syntax.transform import unescape


@dataclass(frozen=True)
class Placeholder:
    """`{x}`, `{s2 = s}`, `{count - 1}`: a value, and the name of the span it becomes.

    `name` is None where the placeholder is an expression that no name was given to.
    """

    name: str | None
    expr: ast.Expr
    span: Span


TemplatePiece = str | Placeholder

_LITERAL = re.compile(r"(?:[^{}]|\{\{|\}\})+")
_TEXT = r'\\"(?:[^"\\]|\\[^"])*\\"|"[^"]*"'
_QUOTED = re.compile(_TEXT)
_INNER = re.compile(rf"(?:{_TEXT}|[^{{}}])*")
"""Up to the brace that ends a placeholder; braces of texts within it don't."""


def parse_template(text: ast.String) -> tuple[list[TemplatePiece], list[Diagnostic]]:
    """Literal texts (escapes resolved) and placeholders of a text, in order.

    Spans point into the file. Codes: E0113 for what is no placeholder, E0106 and E0114 for
    expressions with a reserved name or a number that is too large. A wrong one is left out.
    """
    reader = _TemplateReader(*_raw(text))
    reader.read()
    return reader.pieces, reader.diagnostics


def _raw(text: ast.String) -> tuple[Source, str, int, bool]:
    """The text as written in the file, where it starts, and whether it has escapes.

    A text that stands in no file (from Python) is its own source.
    """
    written = text.span.text
    # The last character is a quote, or what stands in for one that is missing.
    if len(written) >= 2 and written[0] == '"' and unescape(written[1:-1]) == text.value:
        return text.span.source, written[1:-1], text.span.start + 1, True
    return Source(text.value), text.value, 0, False


class _TemplateReader:
    def __init__(self, source: Source, raw: str, base: int, escaped: bool) -> None:
        self.source = source
        self.raw = raw
        self.base = base
        self.escaped = escaped
        self.pieces: list[TemplatePiece] = []
        self.diagnostics: list[Diagnostic] = []

    def read(self) -> None:
        position = 0
        while position < len(self.raw):
            literal = _LITERAL.match(self.raw, position)
            if literal is not None:
                self._literal(literal[0])
                position = literal.end()
            elif self.raw[position] == "}":
                problem, place = "a `}` without a `{` before it", "closes nothing"
                self._refuse(problem, place, position, position + 1)
                position += 1
            else:
                position = self._placeholder(position)

    def _literal(self, raw: str) -> None:
        text = raw.replace("{{", "{").replace("}}", "}")
        self.pieces.append(unescape(text) if self.escaped else text)

    def _refuse(self, problem: str, place: str, start: int, end: int) -> None:
        span = Span(self.source, self.base + start, self.base + end)
        self.diagnostics.append(BadPlaceholder(problem=problem, place=place, span=span))

    def _placeholder(self, start: int) -> int:
        """Read the placeholder that opens at `start`; returns where the text goes on."""
        found = _INNER.match(self.raw, start + 1)
        end = found.end() if found else start + 1
        if self.raw[end : end + 1] != "}":
            self._refuse("this placeholder is never closed", "opened here", start, start + 1)
            return end
        inner = self.raw[start + 1 : end]
        if not inner.strip():
            self._refuse("this placeholder is empty", "no name", start, end + 1)
            return end + 1
        self._expression(inner, start, end)
        return end + 1

    def _expression(self, inner: str, start: int, end: int) -> None:
        base = self.base + start + 1
        text = self._unquoted(inner) if self.escaped else inner
        if outline(Source(text)).problem is not None or "#" in _QUOTED.sub("", inner):
            self._refuse("this placeholder is no expression", "not an expression", start, end + 1)
            return
        try:
            clause, diagnostics = attempt(self.source, text, base, "placeholder")
        except ParserStopped as error:
            self._refuse(*self._stopped(error, inner, start + 1))
            return
        self.diagnostics += diagnostics
        if diagnostics:
            return
        name, value = clause.value
        own = name or value
        label = own.id if isinstance(own, ast.Name) else None
        span = Span(self.source, self.base + start, self.base + end + 1)
        self.pieces.append(Placeholder(label, value, span))

    def _unquoted(self, inner: str) -> str:
        """The expression with `\\"` as `"`, every character at its place."""

        def quotes(match: re.Match[str]) -> str:
            return f' "{match[0][2:-2]}" ' if match[0].startswith("\\") else match[0]

        return _QUOTED.sub(quotes, inner)

    def _stopped(self, error: ParserStopped, inner: str, base: int) -> tuple[str, str, int, int]:
        offset = error.offset
        if offset >= len(inner.rstrip()):
            end = base + len(inner)
            return "the expression of this placeholder breaks off", "incomplete", end, end
        length = error.length
        found = inner[offset : offset + length]
        problem = f"unexpected `{found}` in this placeholder"
        return problem, "no part of an expression", base + offset, base + offset + length
