"""What only seems wrong because another line of the file can't be read."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence

from mechdsl.base.registry import nearest
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import BadPlaceholder, NotSupported, UnterminatedString
from mechdsl.diagnostics.e02_names import MissingLine, UnknownName
from mechdsl.diagnostics.e03_coordinates import UNUSED_LOOP, BadLoopValue
from mechdsl.diagnostics.e05_data import CorruptionWithoutEffect, NoRows, NoTemplate
from mechdsl.diagnostics.e06_experiment import (
    EffectNeedsSource,
    EffectWithoutRule,
    NoMeasure,
    PatchWithoutSource,
)
from mechdsl.diagnostics.e06_statistics import BadReport, UnreadableExpectation
from mechdsl.program.spec import Program
from mechdsl.syntax import ast
from mechdsl.syntax.reserved import AXIS_WORDS

_MISSING = (
    CorruptionWithoutEffect,
    EffectNeedsSource,
    EffectWithoutRule,
    MissingLine,
    NoMeasure,
    NoRows,
    NoTemplate,
    PatchWithoutSource,
)
"""Something that a block doesn't say. With an error in it, it isn't finished yet."""
_POSITION_AXES = ("position", "item", "from_position")
"""Axes that a line may be the cause of without having the word."""
_QUOTED = re.compile(r"`([^`]*)`")
_WORD = re.compile(r"[^\W\d]\w*")


def without_follow_ups(
    found: Sequence[Diagnostic], tree: ast.File, program: Program
) -> list[Diagnostic]:
    """What is wrong whether or not the lines with errors of syntax, which stay, are put right."""
    lines = _UnreadLines(found, tree, program)
    return [each for each in found if each.span is None or not lines.may_cause(each, each.span)]


class _UnreadLines:
    """Lines with an error of syntax, and those that are lost by it."""

    def __init__(self, found: Sequence[Diagnostic], tree: ast.File, program: Program) -> None:
        kinds = ast.ExperimentDef | ast.PromptsDef
        self.source = tree.span.source
        self.starts = [each.span.start for each in tree.statements if isinstance(each, kinds)]
        self.names = {name for lost in program.lost for name in lost.names}
        self.torn: dict[int, set[str]] = defaultdict(set)
        """The words of what is lost, by the block where it stood."""
        for lost in program.lost:
            self.torn[self.block(lost.span)].update(_WORD.findall(lost.span.text))
        of_text = [(each, each.span) for each in found if each.span and _of_text(each)]
        self.wrong = {self.block(span) for _, span in of_text}
        self.unclosed = {
            (span.source, span.line)
            for each, span in of_text
            if isinstance(each, UnterminatedString)
        }

    def block(self, span: Span) -> int:
        """The number of the block that something stands in, or behind: its closing brace may be
        what is wrong. Before the first one and in other files it is 0."""
        return bisect_right(self.starts, span.start) if span.source is self.source else 0

    def may_cause(self, diagnostic: Diagnostic, span: Span) -> bool:
        block = self.block(span)
        match diagnostic:
            case BadPlaceholder():  # in a text that was never closed
                return (span.source, span.line) in self.unclosed
            case BadLoopValue(reason=reason) if reason == UNUSED_LOOP:
                return block in self.torn
            case BadReport(reason=reason) | UnreadableExpectation(reason=reason):
                return block in self.torn and self._may_have_made(reason, self.torn[block])
            case UnknownName(kind="run") if "answer" in self.names:
                return True  # `accuracy` knows runs with an answer
            case _ if isinstance(diagnostic, _MISSING):
                return block in self.wrong
            case _:
                return not _of_text(diagnostic) and not self.names.isdisjoint(
                    _quoted(diagnostic.message)
                )

    def _may_have_made(self, reason: str, words: set[str]) -> bool:
        """Whether an axis or measure that a report or an expectation lacks may come from lines with
        these words."""
        lacking = _quoted(reason)
        axes = {axis for axis in AXIS_WORDS if nearest(axis, words)}  # however misspelt
        made = {*words, *axes, *_POSITION_AXES, *self.names}
        return not lacking or not made.isdisjoint(lacking)


def _of_text(diagnostic: Diagnostic) -> bool:
    return diagnostic.code.startswith("E01") and not isinstance(diagnostic, NotSupported)


def _quoted(message: str) -> list[str]:
    return [word for text in _QUOTED.findall(message) for word in _WORD.findall(text)]
