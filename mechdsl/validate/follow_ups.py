"""What only seems wrong because a line with an error of syntax isn't there."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from mechdsl.base.registry import nearest
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import (
    BadPlaceholder,
    MisspeltWord,
    Unclosed,
    UnterminatedString,
)
from mechdsl.diagnostics.e02_names import MissingLine, UnknownName, UnknownWord
from mechdsl.diagnostics.e03_coordinates import UNUSED_LOOP, BadLoopValue
from mechdsl.diagnostics.e03_positions import UnknownSpan
from mechdsl.diagnostics.e05_data import CorruptionWithoutEffect, UnknownText, UnknownValue
from mechdsl.diagnostics.e06_experiment import (
    EffectNeedsSource,
    EffectWithoutRule,
    NoMeasure,
    PatchWithoutSource,
)
from mechdsl.diagnostics.e06_statistics import BadReport, UnreadableExpectation
from mechdsl.syntax import ast
from mechdsl.syntax.reserved import AXIS_WORDS

WORD = re.compile(r"[^\W\d]\w*")
QUOTED = re.compile(r"`([^\W\d]\w*)`")
POSITION_AXES = ("position", "item", "from_position")
"""Axes that a line may be the cause of without having the word."""
ABSENT = (
    CorruptionWithoutEffect,
    EffectNeedsSource,
    EffectWithoutRule,
    MissingLine,
    NoMeasure,
    PatchWithoutSource,
)
"""What a line of the same block may be the cause of."""
UNKNOWN = (UnknownName, UnknownSpan, UnknownText, UnknownValue)
"""What a line may have defined."""


class BrokenLines:
    """The lines of a file with errors of syntax."""

    def __init__(self, syntax: Sequence[Diagnostic], tree: ast.File) -> None:
        self.errors = [error for error in syntax if error.severity == "error"]
        self.source = tree.span.source
        self.starts = sorted(statement.span.line for statement in tree.statements)

    def axes(self, span: Span) -> frozenset[str]:
        """Axes that the broken lines of a block may have given it."""
        beside = self.beside(span)
        words = _words(beside)
        found = {axis for axis in AXIS_WORDS if nearest(axis, words)}  # however misspelt
        found.update(f"to_{axis}" for axis in tuple(found))
        return frozenset(found.union(POSITION_AXES)) if beside else frozenset()

    def cause(self, diagnostic: Diagnostic) -> bool:
        """Whether one of them may be why this is said."""
        if not self.errors:
            return False
        if isinstance(diagnostic, BadPlaceholder):  # in a text that was never closed
            return any(isinstance(error, UnterminatedString) for error in self.errors)
        unused = isinstance(diagnostic, BadLoopValue) and diagnostic.reason == UNUSED_LOOP
        if unused or isinstance(diagnostic, ABSENT):
            return bool(self.beside(diagnostic.span))
        if isinstance(diagnostic, BadReport | UnreadableExpectation):
            beside = self.beside(diagnostic.span)
            names = QUOTED.findall(diagnostic.reason)
            return bool(beside) and (not names or not _words(beside).isdisjoint(names))
        if isinstance(diagnostic, UnknownWord):
            words = _words(self.errors)
            return diagnostic.kind != "component" and diagnostic.word in words
        if not isinstance(diagnostic, UNKNOWN):
            return False
        words = _words(self.errors)
        if isinstance(diagnostic, UnknownName) and diagnostic.kind == "part":
            return "split" in words
        if isinstance(diagnostic, UnknownName) and diagnostic.kind == "run" and "answer" in words:
            return True  # `accuracy` knows runs with an answer
        return not words.isdisjoint(WORD.findall(diagnostic.name))

    def beside(self, span: Span | None) -> list[Diagnostic]:
        """What is wrong in the block in which something stands; what leaves it open where a block
        ends is wrong everywhere."""
        own = self.block(span)
        return [e for e in self.errors if isinstance(e, Unclosed) or self.block(e.span) in (own, 0)]

    def block(self, span: Span | None) -> int:
        """The number of a statement at the top of the file, from 1; 0 for another file."""
        if span is None or span.source is not self.source:
            return 0
        return bisect_right(self.starts, span.line)


def _words(errors: Iterable[Diagnostic]) -> set[str]:
    """What the broken lines say, and what is most likely meant."""
    found: set[str] = set()
    for error in errors:
        if error.span is not None:
            found.update(WORD.findall(error.span.source.line_text(error.span.line)))
        if isinstance(error, MisspeltWord):
            found.add(error.meant)
    return found
