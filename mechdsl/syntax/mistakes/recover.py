"""Reading a text that has errors: each is reported, every good statement is kept."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mechdsl.base import limits
from mechdsl.base.registry import nearest
from mechdsl.base.source import Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import (
    MisspeltWord,
    UnexpectedCharacter,
    UnexpectedToken,
    UnterminatedString,
    WrongVersion,
)
from mechdsl.syntax import ast
from mechdsl.syntax.attempt import ParserStopped, attempt
from mechdsl.syntax.changes import SIGNATURES
from mechdsl.syntax.mistakes.losses import lost_with
from mechdsl.syntax.mistakes.messages import Mistake, explain
from mechdsl.syntax.mistakes.pieces import INSIDE, Piece, balance, block_of, matched, starts
from mechdsl.syntax.mistakes.readings import guesses, misread
from mechdsl.syntax.mistakes.slips import without_slips
from mechdsl.syntax.scan import skip_space
from mechdsl.syntax.transform import VERSION, Reading

_VERSION = re.compile(r"mech\b[ \t]*(?P<number>[\w.]*)")
_FIRST_WORD = re.compile(r"(?P<word>[A-Za-z]\w*)[ \t]+[0-9]+\b")
GUESSES = 1000
"""How many words of a file are tried in the place of others."""
LONG = 2000
"""Characters of a statement in which no word is tried in the place of another."""


def recover(source: Source, stopped: int) -> tuple[ast.File, list[Diagnostic]]:
    """The statements of a text that parse or where it is clear what was meant, and all that is
    wrong.

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
    statements = ([version] if version else []) + found
    lost = [*reader.lost, *(ast.Lost(span=each.span) for each in unbalanced if each.span)]
    file = ast.File(tuple(statements), lost=tuple(lost), span=Span(source, 0, len(text)))
    return file, _causes(reader.diagnostics)


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
    lost: list[ast.Lost] = field(default_factory=list[ast.Lost])
    guesses_left: int = GUESSES

    def version(self) -> tuple[int, ast.Version | None]:
        """Where the statements begin, and the version before them."""
        begin = skip_space(self.text)
        found = _VERSION.match(self.text, begin)
        other = _FIRST_WORD.match(self.text, begin)
        if found is None and other is not None and nearest(other["word"], ["mech"]) is not None:
            span = Span(self.source, begin, other.end("word"))
            self.diagnostics.append(MisspeltWord(word=span.text, meant="mech", span=span))
            return other.end(), None
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
            self.lost.append(ast.Lost(span=Span(self.source, begin, end)))
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
        if own < offset < following and token is not None and token.first and "$END" in accepts:
            own = offset  # what stands before is complete, so this line is at fault
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
        """Report a mistake. The statement is kept where it is clear what was meant, and of a block
        the good lines."""
        first = mistake.statement[0].text if mistake.statement else ""
        brace = block_of(mistake.statement, first)
        if brace is not None and brace.start < mistake.offset <= (brace.partner or 0):
            return self._kept(kind, depth, mistake, first) or []
        for word, meant in self._guesses(mistake):
            begins = meant if word is mistake.statement[0] else first
            at = word.start - mistake.begin
            reading = Reading(at, at + len(word.text), meant)
            found = self._kept(kind, depth, mistake, begins, reading)
            if found is not None:
                self.diagnostics.append(misread(mistake, word, meant))
                return found
        self.diagnostics.append(explain(mistake))
        found = self._kept(kind, depth, mistake, first, named=True) if brace is not None else None
        if found is None:
            self.lost.append(lost_with(mistake))
        return found or []

    def _guesses(self, mistake: Mistake) -> Iterator[tuple[Piece, str]]:
        for guess in guesses(mistake):
            if not self.guesses_left:
                return
            self.guesses_left -= 1
            yield guess

    def _kept(
        self,
        kind: str,
        depth: int,
        mistake: Mistake,
        first: str,
        reading: Reading | None = None,
        *,
        named: bool = False,
    ) -> list[Any] | None:
        """The statement, or None where it doesn't parse; a block has its good lines.

        first: what its first word is read as. named: of what stands before a brace, the name alone.
        """
        brace = block_of(mistake.statement, first)
        if brace is None or brace.partner is None:
            if reading is not None and mistake.end - mistake.begin > LONG:
                return None
            return self._nodes(kind, mistake, self.text[mistake.begin : mistake.end], reading)
        head = self.text[mistake.begin : brace.start]
        if named:
            name = mistake.statement[1].end - mistake.begin
            head = head[:name].ljust(len(head))
        hollow = head + "{" + " " * (brace.partner - brace.end) + "}"
        nodes = self._nodes(kind, mistake, hollow, reading)
        if nodes is None and reading is not None:
            return None
        body = self.lines(INSIDE[first], brace.end, brace.partner, depth + 1)
        return None if nodes is None else [_filled(nodes[0], tuple(body))]

    def _nodes(
        self, kind: str, mistake: Mistake, text: str, reading: Reading | None
    ) -> list[Any] | None:
        try:
            nodes, diagnostics = attempt(self.source, text, mistake.begin, kind, reading)
        except ParserStopped:
            return None
        self.diagnostics += diagnostics
        return list(nodes)


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
