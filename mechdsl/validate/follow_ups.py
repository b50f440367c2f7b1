"""What only seems wrong because another line of the file can't be read."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence

from mechdsl.base.registry import nearest
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import (
    BadPlaceholder,
    NotSupported,
    ReservedName,
    UnterminatedString,
)
from mechdsl.diagnostics.e02_names import BadArgument, MissingLine, UnknownName
from mechdsl.diagnostics.e03_coordinates import UNUSED_LOOP, BadLoopValue
from mechdsl.diagnostics.e05_answers import WRITES_NONE, NotInTheReply
from mechdsl.diagnostics.e05_data import (
    CorruptionWithoutEffect,
    NoRows,
    NoTemplate,
    UnknownValue,
)
from mechdsl.diagnostics.e06_experiment import (
    NOTHING_WRITTEN,
    EffectNeedsSource,
    EffectWithoutRule,
    NoEstimate,
    NoMeasure,
    PatchWithoutSource,
)
from mechdsl.diagnostics.e06_onward import BadPick
from mechdsl.diagnostics.e06_statistics import BadReport, UnreadableExpectation
from mechdsl.program.lower_prompts import NO_IMAGE
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


class BrokenLines:
    """The lines of a file with errors of syntax, and those that are lost by them."""

    def __init__(
        self, syntax: Sequence[Diagnostic], tree: ast.File, lost: Sequence[ast.Lost]
    ) -> None:
        """syntax: what is wrong with the texts, among others. lost: statements of the file and of
        what it imports."""
        kinds = ast.ExperimentDef | ast.PromptsDef
        self.source = tree.span.source
        self.starts = [each.span.start for each in tree.statements if isinstance(each, kinds)]
        self.names = {name for each in lost for name in each.names}
        self.refused = [each.name for each in syntax if isinstance(each, ReservedName)]
        """Words of the language that the file defines as names, which they can't be."""
        self.torn: dict[int, set[str]] = defaultdict(set)
        """The words of what is lost, by the block where it stood."""
        for each in lost:
            self.torn[self.block(each.span)].update(_WORD.findall(each.span.text))
        errors = [(each, each.span) for each in syntax if each.span and _of_text(each)]
        self.wrong = {self.block(span) for _, span in errors}
        self.unfinished = {
            each.name.id
            for each in tree.statements
            if isinstance(each, ast.ExperimentDef | ast.PromptsDef)
            and self.block(each.span) in self.wrong
        }
        """Blocks that something is wrong in."""
        self.unclosed = {
            (span.source, span.line)
            for each, span in errors
            if isinstance(each, UnterminatedString)
        }

    def block(self, span: Span) -> int:
        """The number of the block that something stands in, or behind: its closing brace may be
        what is wrong. Before the first one and in other files it is 0."""
        return bisect_right(self.starts, span.start) if span.source is self.source else 0

    def axes(self, span: Span) -> frozenset[str]:
        """Axes that the lost lines of a block may have given it."""
        words = self.torn.get(self.block(span))
        if words is None:
            return frozenset()
        found = {axis for axis in AXIS_WORDS if nearest(axis, words)}  # however misspelt
        return frozenset({*found, *(f"to_{axis}" for axis in found), *_POSITION_AXES})

    def cause(self, diagnostic: Diagnostic) -> bool:
        """Whether one of them may be why this is said of another line."""
        if diagnostic.span is None:
            return False
        block = self.block(diagnostic.span)
        match diagnostic:
            case BadPlaceholder(span=span):  # in a text that was never closed
                return (span.source, span.line) in self.unclosed if span else False
            case BadLoopValue(reason=reason) if reason == UNUSED_LOOP:
                return block in self.torn
            case NoEstimate(reason=reason) if reason == NOTHING_WRITTEN:
                return block in self.torn
            case BadReport(reason=reason) | UnreadableExpectation(reason=reason):
                lacking = _quoted(reason)
                made = {*self.names, *self.torn.get(block, ())}
                return (block in self.torn and not lacking) or not made.isdisjoint(lacking)
            case UnknownName(kind="run") if "answer" in self.names:
                return True  # `accuracy` knows runs with an answer
            case UnknownName(name=name) | UnknownValue(name=name) if nearest(name, self.refused):
                return True  # `model to = …`, meant as `toy`
            case BadArgument(reason=reason) if reason == NO_IMAGE:
                return block in self.wrong
            case BadPick(reason=reason) | BadArgument(reason=reason):
                return not self.unfinished.isdisjoint(_quoted(reason))
            case NotInTheReply(reason=reason) if reason == WRITES_NONE:
                return block in self.wrong
            case _ if isinstance(diagnostic, _MISSING):
                return block in self.wrong
            case _:
                return not _of_text(diagnostic) and not self.names.isdisjoint(
                    _quoted(diagnostic.message)
                )


def _of_text(diagnostic: Diagnostic) -> bool:
    return diagnostic.code.startswith("E01") and not isinstance(diagnostic, NotSupported)


def _quoted(message: str) -> list[str]:
    return [word for text in _QUOTED.findall(message) for word in _WORD.findall(text)]
