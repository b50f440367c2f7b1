"""What only seems wrong because a line with an error of syntax isn't there."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from mechdsl.base.registry import nearest
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


def without_follow_ups(
    found: Iterable[Diagnostic], syntax: Sequence[Diagnostic], tree: ast.File
) -> list[Diagnostic]:
    """What is wrong whether or not the lines with errors of syntax are put right."""
    errors = [error for error in syntax if error.severity == "error"]
    if not errors:
        return list(found)
    return [each for each in found if not _FollowUps(errors, tree).has(each)]


class _FollowUps:
    def __init__(self, errors: Sequence[Diagnostic], tree: ast.File) -> None:
        self.errors = errors
        self.source = tree.span.source
        self.starts = sorted(statement.span.line for statement in tree.statements)

    def has(self, diagnostic: Diagnostic) -> bool:
        """Whether a broken line may be why this is said."""
        if isinstance(diagnostic, BadPlaceholder):  # in a text that was never closed
            return any(isinstance(error, UnterminatedString) for error in self.errors)
        unused = isinstance(diagnostic, BadLoopValue) and diagnostic.reason == UNUSED_LOOP
        if unused or isinstance(diagnostic, ABSENT):
            return bool(self.beside(diagnostic))
        if isinstance(diagnostic, BadReport | UnreadableExpectation):
            beside = self.beside(diagnostic)
            names = QUOTED.findall(diagnostic.reason)
            words = _words(beside)
            axes = [axis for axis in AXIS_WORDS if nearest(axis, words)]  # however misspelt
            words.update(axes, POSITION_AXES)
            return bool(beside) and (not names or not words.isdisjoint(names))
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

    def beside(self, diagnostic: Diagnostic) -> list[Diagnostic]:
        """The broken lines of the block in which something is said."""
        return [error for error in self.errors if self.block(error) in (self.block(diagnostic), -1)]

    def block(self, diagnostic: Diagnostic) -> int:
        """The number of a statement at the top of the file; -1 for another file, and for what
        leaves it open where a block ends."""
        span = diagnostic.span
        if span is None or span.source is not self.source or isinstance(diagnostic, Unclosed):
            return -1
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
