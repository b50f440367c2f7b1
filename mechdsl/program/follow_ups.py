"""What is only said because another line of the file can't be read."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import BadPlaceholder, NotSupported, UnterminatedString
from mechdsl.diagnostics.e02_names import MissingLine
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
_UNDECIDED = (BadReport, UnreadableExpectation)
"""What may lack an axis or a measure of a line of its block that can't be read."""
_QUOTED = re.compile(r"`([^`]*)`")
_WORD = re.compile(r"[^\W\d]\w*")


def without_follow_ups(
    found: Sequence[Diagnostic], tree: ast.File, program: Program
) -> list[Diagnostic]:
    """What holds whatever the lines say that can't be read; E01xx always does."""
    blocks = _Blocks(tree)
    names = {name for lost in program.lost for name in lost.names}
    torn = {blocks.around(lost.span) for lost in program.lost}
    wrong = {blocks.around(each.span) for each in found if each.span and _of_text(each)}
    unclosed = {
        (each.span.source, each.span.line)
        for each in found
        if isinstance(each, UnterminatedString) and each.span
    }

    def follows(diagnostic: Diagnostic) -> bool:
        span = diagnostic.span
        if span is None:
            return False
        unused = isinstance(diagnostic, BadLoopValue) and diagnostic.reason == UNUSED_LOOP
        if unused or isinstance(diagnostic, _UNDECIDED):
            return blocks.around(span) in torn
        if isinstance(diagnostic, _MISSING):
            return blocks.around(span) in wrong
        if isinstance(diagnostic, BadPlaceholder):
            return (span.source, span.line) in unclosed
        if _of_text(diagnostic):
            return False
        quoted = _QUOTED.findall(diagnostic.message)
        return any(not names.isdisjoint(_WORD.findall(text)) for text in quoted)

    return [each for each in found if not follows(each)]


def _of_text(diagnostic: Diagnostic) -> bool:
    return diagnostic.code.startswith("E01") and not isinstance(diagnostic, NotSupported)


class _Blocks:
    """The experiments and prompts of a file, in order."""

    def __init__(self, tree: ast.File) -> None:
        kinds = ast.ExperimentDef | ast.PromptsDef
        self.source = tree.span.source
        self.starts = [each.span.start for each in tree.statements if isinstance(each, kinds)]

    def around(self, span: Span) -> int:
        """The number of the block that something stands in, or behind: its closing brace may be
        what is wrong. Before the first one and in other files it is 0."""
        return bisect_right(self.starts, span.start) if span.source is self.source else 0
