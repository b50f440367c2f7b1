"""Reading a text that has errors: each is reported, every good statement is kept."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field, replace
from typing import Any

from mechdsl.base import limits
from mechdsl.base.source import Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import (
    UnexpectedCharacter,
    UnexpectedToken,
    UnterminatedString,
    WrongVersion,
)
from mechdsl.syntax import ast
from mechdsl.syntax.attempt import ParserStopped, attempt
from mechdsl.syntax.changes import SIGNATURES
from mechdsl.syntax.mistakes.messages import Mistake, explain
from mechdsl.syntax.mistakes.pieces import INSIDE, Piece, balance, block_of, matched, starts
from mechdsl.syntax.mistakes.slips import without_slips
from mechdsl.syntax.scan import skip_space
from mechdsl.syntax.transform import VERSION

_VERSION = re.compile(r"mech\b[ \t]*(?P<number>[\w.]*)")


def recover(source: Source, stopped: int) -> tuple[list[Any], list[Diagnostic]]:
    """The statements of a text that parse, and what is wrong with the others.

    stopped: the offset at which the parser gave up
    """
    text, diagnostics = without_slips(source)
    text, unbalanced = balance(source, text)
    reader = _Recovery(source, text, matched(text), [*diagnostics, *unbalanced])
    begin, version = reader.version()
    found = reader.lines("top_lines", begin, len(text))
    if not reader.diagnostics:
        # Each part is right by itself, so the place is all that is known.
        span = Span(source, stopped, min(stopped + 1, len(text)))
        reader.diagnostics.append(
            UnexpectedToken(found=f"`{span.text.strip()}`", expected="something else", span=span)
        )
    return ([version] if version else []) + found, _causes(reader.diagnostics)


def _causes(diagnostics: list[Diagnostic]) -> list[Diagnostic]:
    """Without what merely follows: an unclosed text has swallowed the rest of its line, what stands
    behind a sign without meaning would be fine behind the right one, and where the parser goes on
    in the middle of a line with an error, it knows less of the rest than the first error said.
    """
    open_texts = [d.span for d in diagnostics if isinstance(d, UnterminatedString) and d.span]
    swallowed = {span.line for span in open_texts}
    signs = [d.span for d in diagnostics if isinstance(d, UnexpectedCharacter) and d.span]
    behind = {skip_space(span.source.text, span.end) for span in signs}
    behind |= {span.start for span in signs}
    first_on: dict[int, int] = {}
    for span in (d.span for d in diagnostics if d.span is not None):
        first_on[span.line] = min(first_on.get(span.line, span.start), span.start)

    def follows(diagnostic: Diagnostic) -> bool:
        span = diagnostic.span
        if span is None or isinstance(diagnostic, UnterminatedString):
            return False
        if span.line in swallowed:
            first = min(s.start for s in open_texts if s.line == span.line)
            return span.start >= first
        # White space at fault is where a missing bracket was put in.
        return isinstance(diagnostic, UnexpectedToken) and (
            span.start in behind
            or span.text.isspace()
            or (not diagnostic.hint and span.start > first_on[span.line])
        )

    return [d for d in diagnostics if not follows(d)]


@dataclass
class _Recovery:
    source: Source
    text: str
    """The source with slips replaced, offsets unchanged."""
    pieces: list[Piece]
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])

    def version(self) -> tuple[int, ast.Version | None]:
        """Where the statements begin, and the version before them."""
        begin = skip_space(self.text)
        found = _VERSION.match(self.text, begin)
        if found is None:
            problem, place = "the file does not start with `mech 1`", "first statement"
            word = re.compile(r"[^\s]*").match(self.text, begin)
            end = word.end() if word else begin
            return self._wrong_version(problem, place, Span(self.source, begin, end)), None
        span = Span(self.source, begin, found.end())
        number = found["number"]
        if number == str(VERSION):
            return found.end(), ast.Version(VERSION, span=span)
        problem = f"version {number} of the language is not known"
        if not number.isdigit():
            problem = "`mech` needs the version of the language behind it"
        place = f"this mechdsl reads version {VERSION}"
        self._wrong_version(problem, place, span)
        # `mech model …` has lost its number, `mech v1` has a wrong one.
        return (found.end() if number[-1:].isdigit() else begin + len("mech")), None

    def _wrong_version(self, problem: str, place: str, span: Span) -> int:
        self.diagnostics.append(WrongVersion(problem=problem, place=place, span=span))
        return span.start

    def lines(self, kind: str, begin: int, end: int, depth: int = 0) -> list[Any]:
        """The good statements between two offsets, which hold statements of one kind."""
        found: list[Any] = []
        inside = self._between(begin, end)
        heads = [inside[i].start for i in starts(self.text, inside, kind, depth)]
        while begin < end and len(self.diagnostics) <= limits.SYNTAX_ERRORS:
            try:
                return found + self._read(kind, begin, end)
            except ParserStopped as error:
                mistake = self._locate(kind, begin, end, heads, error)
            try:
                found += self._read(kind, begin, mistake.begin)
            except ParserStopped as error:
                # The word that begins a statement was taken for a missing part of the one before.
                mistake = self._locate(kind, begin, mistake.begin, heads, error)
                found += self._before(kind, begin, mistake.begin)
            found += self._mistaken(kind, depth, mistake)
            begin = max(mistake.end, begin + 1)
        return found

    def _between(self, begin: int, end: int) -> list[Piece]:
        first = bisect_left(self.pieces, begin, key=_offset)
        return self.pieces[first : bisect_left(self.pieces, end, key=_offset)]

    def _read(self, kind: str, begin: int, end: int) -> list[Any]:
        nodes, diagnostics = attempt(self.source, self.text[begin:end], begin, kind)
        self.diagnostics += diagnostics
        return list(nodes)

    def _before(self, kind: str, begin: int, end: int) -> list[Any]:
        """What stands before a mistake is good, unless its beginning was misjudged."""
        try:
            return self._read(kind, begin, end)
        except ParserStopped:
            return []

    def _locate(
        self, kind: str, begin: int, end: int, heads: list[int], error: ParserStopped
    ) -> Mistake:
        """The statement that an error belongs to; `heads` are where statements begin."""
        offset = begin + error.offset
        number = bisect_right(heads, offset) if offset < end else bisect_left(heads, end)
        own = heads[number - 1] if number and heads[number - 1] >= begin else begin
        following = min(heads[number], end) if number < len(heads) else end
        accepts = self._accepts(kind, own, offset, error)
        if own == offset and "$END" not in accepts and number > 1 and own > begin:
            # A statement begins here, but the one before it isn't finished.
            own, following = max(heads[number - 2], begin), offset
        after = bisect_left(self.pieces, offset, key=_offset)
        token = self.pieces[after] if after < len(self.pieces) else None
        before = self.pieces[after - 1] if after else None
        return Mistake(
            source=self.source,
            kind=kind,
            begin=own,
            end=following,
            offset=offset,
            token=token if token is not None and token.start < end else None,
            before=before if before is not None and before.start >= begin else None,
            statement=self._between(own, following),
            accepts=accepts,
            lexed=error.terminal,
        )

    def _accepts(self, kind: str, own: int, offset: int, error: ParserStopped) -> frozenset[str]:
        """What could have stood there; of a change, what its own parts allow."""
        before = [piece.text for piece in self._between(own, offset)]
        signature = SIGNATURES.get(before[0]) if before and kind == "change_lines" else None
        return error.accepts if signature is None else signature.accepts(before, error.accepts)

    def _mistaken(self, kind: str, depth: int, mistake: Mistake) -> list[Any]:
        """Report a mistake; where it is in the lines of a block, the others of them are kept."""
        brace = block_of(mistake.statement)
        inner = INSIDE.get(mistake.statement[0].text) if mistake.statement else None
        if brace is None or brace.partner is None:
            self.diagnostics.append(explain(mistake))
            return []
        if inner is None or not brace.start < mistake.offset <= brace.partner:
            self.diagnostics.append(explain(mistake))
            if inner is not None:
                self.lines(inner, brace.end, brace.partner, depth + 1)
            return []
        body = self.lines(inner, brace.end, brace.partner, depth + 1)
        head = self.text[mistake.begin : brace.end]
        hollow = head + " " * (brace.partner - brace.end) + "}"
        try:
            nodes, diagnostics = attempt(self.source, hollow, mistake.begin, kind)
        except ParserStopped:
            return []
        self.diagnostics += diagnostics
        (node,) = nodes
        return [_filled(node, tuple(body))]


def _offset(piece: Piece) -> int:
    return piece.start


def _filled(node: Any, body: tuple[Any, ...]) -> Any:
    """A block with its lines put in."""
    if isinstance(node, ast.PromptsDef):
        return replace(node, lines=body)
    if isinstance(node, ast.Corrupt):
        return replace(node, changes=body)
    if isinstance(node, ast.For):
        return replace(node, body=body)
    return replace(node, statements=body)
