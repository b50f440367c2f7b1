"""Recovery from syntax errors: every error is reported and every valid statement retained."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from mechdsl.base import limits
from mechdsl.base.records import close_names, closest_name
from mechdsl.base.text import STRING_PATTERN, Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.habits import Rewrite, find_rewrites
from mechdsl.diagnostics.syntax import (
    MisspeltWord,
    UnexpectedCharacter,
    UnexpectedToken,
    UnterminatedString,
    WrongVersion,
)
from mechdsl.syntax import ast
from mechdsl.syntax.mistakes.messages import (
    BLOCK_CONTENTS,
    Lexeme,
    Mistake,
    balance_brackets,
    block_start,
    explain_habit,
    explain_misplaced,
    explain_mistake,
    explain_rewrite,
    first_words,
    match_brackets,
    statement_starts,
)
from mechdsl.syntax.parser import ParserError, keywords, run_parser, skip_space
from mechdsl.syntax.tree_builder import LANGUAGE_VERSION, RegisteredWords, WordSubstitution

_WORD_GUESSES = 8
"""Maximum number of suggestions for one word; words of two letters all resemble each other."""

_EDGES = ("first", "last")


def guess_words(mistake: Mistake) -> Iterator[tuple[Lexeme, str]]:
    """Yield words of the statement with their possible corrections, the likeliest first."""
    statement = mistake.statement
    stopped = next(
        (i for i, piece in enumerate(statement) if piece.start >= mistake.offset), len(statement)
    )
    # The parser may have read the word as a name or as its lookahead.
    order = [stopped, stopped - 1, stopped + 1, *range(stopped - 2, -1, -1)]
    known = frozenset(word for word in keywords().values() if word.isalpha())
    for at in order:
        if not 0 <= at < len(statement) or statement[at].kind != "word":
            continue
        word = statement[at]
        if word.text in known and at not in (stopped, stopped + 1):
            continue
        words = frozenset(first_words(mistake.kind, mistake.words)) if at == 0 else known
        wanted = {keywords().get(name) for name in mistake.accepts if at == stopped}
        alike = sorted(_near(word.text, words - {word.text}), key=lambda each: each not in wanted)
        for meant in alike[:_WORD_GUESSES]:
            yield word, meant


@lru_cache(1000)
def _near(word: str, known: frozenset[str]) -> list[str]:
    return close_names(word, known)


def explain_misspelling(mistake: Mistake, word: Lexeme, meant: str) -> Diagnostic:
    """Return the message for a statement that parses with `meant` in place of `word`."""
    if word.text in keywords().values():
        found, said = f"`{word.text}`", f"did you mean `{meant}`?"
        span = Span(mistake.source, word.start, word.end)
        if word is mistake.token:
            return explain_habit(mistake) or explain_misplaced(mistake, said, word=word)
        return UnexpectedToken(found=found, expected=f"`{meant}`", hint=said, span=span)
    end = word.end
    following = mistake.source.text[end:]
    if meant in _EDGES and following[:1] == "-":  # `lat-item`
        tail = next((p for p in mistake.statement if p.start == end + 1), None)
        if tail is not None:
            end, meant = tail.end, f"{meant}-{tail.text}"
    span = Span(mistake.source, word.start, end)
    return MisspeltWord(word=span.text, meant=meant, span=span)


def _blank(match: re.Match[str]) -> str:
    return " " * len(match[0])


def _quoted(match: re.Match[str]) -> str:
    return f'"{match[0][1:-1]}"'


def _padded(text: str) -> Callable[[re.Match[str]], str]:
    def stand_in(match: re.Match[str]) -> str:
        return text.ljust(len(match[0]))

    return stand_in


def _percent(match: re.Match[str]) -> str:
    number = match[0].rstrip("% \t")
    return f"{number}%".ljust(len(match[0]))


def _first_number(match: re.Match[str]) -> str:
    number = re.match(r"[0-9]+", match[0])
    return (number[0] if number else "").ljust(len(match[0]))


def _arrow(match: re.Match[str]) -> str:
    return "->" if len(match[0]) == 2 else " "


def _letters(match: re.Match[str]) -> str:
    return "x" * len(match[0])


@dataclass(frozen=True)
class Slip:
    """A pattern, the fix to report, and a replacement that lets parsing continue."""

    pattern: str
    hint: str
    stand_in: Callable[[re.Match[str]], str] = _blank
    shown: int | None = None
    """Number of marked characters; None marks all."""


SLIPS: tuple[Slip, ...] = (
    Slip(r'[“”„«»][^“”„«»"\n]*[“”„«»]', 'put texts in straight quotes: `"…"`', _quoted, 1),
    Slip(r"[‘’'][^‘’'\"\n]*[‘’']", 'put texts in straight quotes: `"…"`', _quoted, 1),
    Slip(r"[“”„«»‘’']", 'put texts in straight quotes: `"…"`'),
    Slip(r";", "remove it: a statement ends where the next one begins"),
    Slip(r"//[^\n]*", "a comment starts with `#`", _blank, 2),
    Slip(r"/\*.*?\*/", "a comment starts with `#` and ends at the end of the line", _blank, 2),
    Slip(r":=", "write `=` in a definition", _padded("=")),
    Slip(r"==", "write a single `=` for equality", _padded("=")),
    Slip(r"&&?", "write `and`", _padded("or")),
    Slip(r"\|\|?", "write `or`", _padded("or")),
    Slip(r"[0-9]+[ \t]+%", "write the percent sign right after the number: `50%`", _percent),
    Slip(r"[0-9]+[ \t]*[–—][ \t]*[0-9]+", "a range is written `10..20`", _first_number),
    Slip(r"[0-9]+[ \t]*…[ \t]*[0-9]+", "a range is written `10..20`", _first_number),
    Slip(r"…", "a range is written `10..20`"),
    Slip(r"≥", "write `>=`", _padded(">")),
    Slip(r"≤", "write `<=`", _padded("<")),
    Slip(r"≠", "write `!=`", _padded("=")),
    Slip(r"[×·]", "write `*`", _padded("*")),
    Slip(r"÷", "write `/`", _padded("/")),
    Slip(r"[−–—]", "write `-`", _padded("-")),
    Slip(r"[→⟶] ?", "write `->`", _arrow, 1),
    Slip(r"[^\W\dA-Za-z_]\w*", "use only the letters a to z, digits and `_` in names", _letters, 1),
    Slip(r"![^=\S]|!(?=\w)", "write `not`", _blank, 1),
    Slip(r"""[^\s\w"#{}()\[\].,:=+\-*/<>!%]""", "leave it out"),
)
"""Patterns tried in this order at each position outside texts and comments."""

_PATTERN = re.compile(
    rf'(?P<text>{STRING_PATTERN})|(?P<comment>#[^\n]*)|(?P<open>"(?:[^"\\\n]|\\[^\n]|\\$)*)|'
    + "|".join(f"(?P<slip{i}>{slip.pattern})" for i, slip in enumerate(SLIPS)),
    re.MULTILINE | re.DOTALL,
)


def replace_slips(source: Source) -> tuple[str, list[Diagnostic]]:
    """Replace every slip by text of the same length, and comments by blanks.

    Returns:
        The text and the diagnostics of its slips.
    """
    diagnostics: list[Diagnostic] = []

    def replace(match: re.Match[str]) -> str:
        if match["text"] is not None:
            return match[0]
        if match["comment"] is not None:
            return _blank(match)
        if match["open"] is not None:
            diagnostics.append(UnterminatedString(span=Span(source, match.start(), match.end())))
            return _close(source.text, match)
        slip = SLIPS[int((match.lastgroup or "slip0")[4:])]
        end = match.end() if slip.shown is None else match.start() + slip.shown
        char = match[0][: slip.shown]
        span = Span(source, match.start(), end)
        diagnostics.append(UnexpectedCharacter(char=char.strip(), hint=slip.hint, span=span))
        return slip.stand_in(match)

    return _PATTERN.sub(replace, source.text), diagnostics


def _close(text: str, match: re.Match[str]) -> str:
    """Close an unterminated text before the brackets that it has most likely swallowed."""
    raw = match[0]
    line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
    missing = 0
    tail = len(raw)
    for opener, closer in ("()", "[]"):
        missing += max(0, line.count(opener) - line.count(closer))
    while missing and tail > 1 and raw[tail - 1] in ")] \t,":
        tail -= 1
        missing -= raw[tail] in ")]"
    if tail == len(raw):
        # No characters remain except the last one of the text itself.
        inner = raw[1:-1].replace("\\", " ")
        return f'"{inner}"' if len(raw) > 1 else " "
    inner = raw[1 : tail - 1].replace("\\", " ")
    return f'"{inner}"'.ljust(tail) + raw[tail:]


_PLACEHOLDER = re.compile(r"\{\s*([A-Za-z_]\w*)")

_MADE = {"split": ("train", "test"), "answer": ("answer",), "wrong": ("wrong",)}
"""Names that a line defines implicitly."""


def lost_statement(mistake: Mistake) -> ast.LostStatement:
    """Convert a statement to a lost one with the names that it may define. Anything that looks like
    a definition counts, because the defining word may be the misspelt one."""
    words = mistake.statement
    names: set[str] = set()
    if mistake.kind == "experiment_lines":  # names of loops, runs and observations
        begin = ("for", "run", "as")
        names.update(after.text for word, after in pairwise(words) if word.text in begin)
    elif words:
        known = first_words(mistake.kind, mistake.words)
        begins = words[0].text in known
        meant = words[0].text if begins else closest_name(words[0].text, known)
        if meant is not None:
            names.update(_MADE.get(meant, ()))
        elif len(words) == 1 or words[1].text not in ("=", "in", ","):  # each is possible
            names.update(*_MADE.values())
        names.update(piece.text for piece in words[begins:2] if piece.kind == "word")
        listed: list[str] = []
        for piece in words[begins:]:
            if piece.text in ("=", "in"):
                names.update(listed)
            if piece.kind == "word":
                listed.append(piece.text)
            elif piece.text != ",":
                listed.clear()
            if piece.kind == "string":
                names.update(_PLACEHOLDER.findall(piece.text))
    span = Span(mistake.source, mistake.begin, mistake.end)
    return ast.LostStatement(frozenset(names), span=span)


_VERSION = re.compile(r"mech\b[ \t]*(?P<number>[\w.]*)")

_FIRST_WORD = re.compile(r"(?P<word>[A-Za-z]\w*)[ \t]+[0-9]+\b")

MAX_GUESSES = 1000
"""Maximum number of word substitutions tried per file."""

MAX_HABITS = 4
"""Maximum number of habits rewritten in one statement."""

MAX_GUESSED_LENGTH = 2000
"""Maximum length, in characters, of a statement in which words are substituted."""


def recover(
    source: Source, stopped: int, words: RegisteredWords
) -> tuple[ast.File, list[Diagnostic]]:
    """Parse the valid statements of a text and those whose meaning is clear.

    Args:
        stopped: The offset at which the parser stopped.
        words: Words in addition to those of the grammar.

    Returns:
        The tree and the diagnostics of all errors.
    """
    text, diagnostics = replace_slips(source)
    text, unbalanced = balance_brackets(source, text)
    reader = _Recovery(source, text, match_brackets(text), words, [*diagnostics, *unbalanced])
    begin, version = reader.version()
    lines = reader.lines("top_lines", begin, len(text))
    if not reader.diagnostics:
        # Each part is valid by itself, so only the position is known.
        span = Span(source, stopped, min(stopped + 1, len(text)))
        reader.diagnostics.append(
            UnexpectedToken(found=f"`{span.text.strip()}`", expected="something else", span=span)
        )
    statements = ([version] if version else []) + lines
    lost = [
        *reader.lost,
        *(ast.LostStatement(span=problem.span) for problem in unbalanced if problem.span),
    ]
    file = ast.File(tuple(statements), lost=tuple(lost), span=Span(source, 0, len(text)))
    return file, _causes(reader.diagnostics)


def _causes(diagnostics: list[Diagnostic]) -> list[Diagnostic]:
    """Drop errors that merely follow from others.

    An unterminated text has swallowed the rest of its line. Tokens after a meaningless sign may be
    valid after the correct one. Where the parser resumes in the middle of a line with an error, it
    knows less about the rest than the first error reported.
    """
    open_texts = [d.span for d in diagnostics if isinstance(d, UnterminatedString) and d.span]
    swallowed = {span.line for span in open_texts}
    signs = [d.span for d in diagnostics if isinstance(d, UnexpectedCharacter) and d.span]
    following = {skip_space(span.source.text, span.end) for span in signs}
    following |= {span.start for span in signs}
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
        # A white-space token is the position of an inserted bracket.
        return isinstance(diagnostic, UnexpectedToken) and (
            span.start in following
            or span.text.isspace()
            or (not diagnostic.hint and span.start > first_on[span.line])
        )

    return [d for d in diagnostics if not follows(d)]


@dataclass
class _Recovery:
    source: Source
    text: str
    """The source with slips replaced; offsets are unchanged."""
    pieces: list[Lexeme]
    words: RegisteredWords
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])
    lost: list[ast.LostStatement] = field(default_factory=list[ast.LostStatement])
    guesses_left: int = MAX_GUESSES
    hinted_end: int = -1
    """End of the last statement that ended too early, if a hint states how to write the rest."""

    def version(self) -> tuple[int, ast.Version | None]:
        """Return where the statements begin, and the version before them."""
        begin = skip_space(self.text)
        match = _VERSION.match(self.text, begin)
        other = _FIRST_WORD.match(self.text, begin)
        if (
            match is None
            and other is not None
            and closest_name(other["word"], ["mech"]) is not None
        ):
            span = Span(self.source, begin, other.end("word"))
            self.diagnostics.append(MisspeltWord(word=span.text, meant="mech", span=span))
            return other.end(), None
        if match is None:
            problem, place = "the file does not start with `mech 1`", "first statement"
            word = re.compile(r"[^\s]*").match(self.text, begin)
            end = word.end() if word else begin
            return self._wrong_version(problem, place, Span(self.source, begin, end)), None
        span = Span(self.source, begin, match.end())
        number = match["number"]
        if number == str(LANGUAGE_VERSION):
            return match.end(), ast.Version(LANGUAGE_VERSION, span=span)
        problem = f"version {number} of the language is not supported"
        if not number.isdigit():
            problem = "`mech` must be followed by the version of the language"
        place = f"this mechdsl reads version {LANGUAGE_VERSION}"
        self._wrong_version(problem, place, span)
        # In `mech model …` the number is missing; in `mech v1` it is wrong.
        return (match.end() if number[-1:].isdigit() else begin + len("mech")), None

    def _wrong_version(self, problem: str, place: str, span: Span) -> int:
        self.diagnostics.append(WrongVersion(problem=problem, place=place, span=span))
        return span.start

    def lines(self, kind: str, begin: int, end: int, depth: int = 0) -> list[Any]:
        """Parse the valid statements of one type between two offsets."""
        lines: list[Any] = []
        inside = self._between(begin, end)
        starts = statement_starts(self.text, inside, kind, depth, self.words)
        heads = [inside[i].start for i in starts]
        while begin < end and len(self.diagnostics) <= limits.SYNTAX_ERRORS:
            try:
                return lines + self._read(kind, begin, end)
            except ParserError as error:
                mistake = self._locate(kind, begin, end, heads, error)
            try:
                lines += self._read(kind, begin, mistake.begin)
            except ParserError as error:
                # The first word of the next statement was read as a missing part of this one.
                mistake = self._locate(kind, begin, mistake.begin, heads, error)
                lines += self._before(kind, begin, mistake.begin)
            lines += self._mistaken(kind, depth, mistake)
            begin = max(mistake.end, begin + 1)
        return lines

    def _between(self, begin: int, end: int) -> list[Lexeme]:
        first = bisect_left(self.pieces, begin, key=_offset)
        return self.pieces[first : bisect_left(self.pieces, end, key=_offset)]

    def _read(self, kind: str, begin: int, end: int) -> list[Any]:
        nodes, diagnostics = run_parser(
            self.source, self.text[begin:end], begin, kind, words=self.words
        )
        self.diagnostics += diagnostics
        return list(nodes)

    def _before(self, kind: str, begin: int, end: int) -> list[Any]:
        """Parse the text before a mistake, which is valid unless its beginning was misjudged."""
        try:
            return self._read(kind, begin, end)
        except ParserError:
            self.lost.append(ast.LostStatement(span=Span(self.source, begin, end)))
            return []

    def _locate(
        self, kind: str, begin: int, end: int, heads: list[int], error: ParserError
    ) -> Mistake:
        """Find the statement that an error belongs to; `heads` are the starts of statements."""
        offset = begin + error.offset
        number = bisect_right(heads, offset) if offset < end else bisect_left(heads, end)
        head = heads[number - 1] if number and heads[number - 1] >= begin else begin
        following = min(heads[number], end) if number < len(heads) else end
        accepts = self._accepts(kind, head, offset, error)
        if head == offset and "$END" not in accepts and number > 1 and head > begin:
            # A statement begins here, but the previous one is unfinished.
            head, following = max(heads[number - 2], begin), offset
        after = bisect_left(self.pieces, offset, key=_offset)
        token = self.pieces[after] if after < len(self.pieces) else None
        if head < offset < following and token is not None and token.first and "$END" in accepts:
            head = offset  # the preceding text is complete
        before = self.pieces[after - 1] if after else None
        return Mistake(
            source=self.source,
            words=self.words,
            kind=kind,
            begin=head,
            end=following,
            offset=offset,
            token=token if token is not None and token.start < end else None,
            before=before if before is not None and before.start >= begin else None,
            statement=self._between(head, following),
            accepts=accepts,
            lexed=error.terminal,
        )

    def _accepts(self, kind: str, own: int, offset: int, error: ParserError) -> frozenset[str]:
        """Return the terminals accepted at the error; for a change, filtered by its signature."""
        before = [piece.text for piece in self._between(own, offset)]
        changes = self.words.changes
        signature = changes.get(before[0]) if before and kind == "change_lines" else None
        return error.accepts if signature is None else signature.accepts(before, error.accepts)

    def _mistaken(self, kind: str, depth: int, mistake: Mistake) -> list[Any]:
        """Report a mistake; return the statement if its meaning is clear, or a block's lines."""
        first = mistake.statement[0].text if mistake.statement else ""
        brace = block_start(mistake.statement, first)
        if brace is not None and brace.start < mistake.offset <= (brace.partner or 0):
            return self._kept(kind, depth, mistake, first) or []
        if (nodes := self._habitual(kind, depth, mistake, first)) is not None:
            return nodes
        for word, meant in self._guesses(mistake):
            begins = meant if word is mistake.statement[0] else first
            at = word.start - mistake.begin
            reading = WordSubstitution(at, at + len(word.text), meant)
            nodes = self._kept(kind, depth, mistake, begins, reading)
            if nodes is not None:
                self.diagnostics.append(explain_misspelling(mistake, word, meant))
                return nodes
        problem = explain_mistake(mistake)
        rest_of_line = mistake.begin == self.hinted_end and not mistake.statement[0].first
        if not rest_of_line:
            self.diagnostics.append(problem)
        hinted = isinstance(problem, UnexpectedToken) and bool(problem.hint)
        self.hinted_end = mistake.end if mistake.cut_short and hinted else -1
        nodes = self._kept(kind, depth, mistake, first, named=True) if brace is not None else None
        if nodes is None:
            self.lost.append(lost_statement(mistake))
        return nodes or []

    def _habitual(self, kind: str, depth: int, mistake: Mistake, first: str) -> list[Any] | None:
        """Report habits at a mistake, and parse the statement without them.

        Returns:
            The block with its valid lines, empty for other statements; None without a habit.
        """
        rewrite = self._rewrite(kind, mistake, first)
        if rewrite is None:
            return None
        self.diagnostics.append(explain_rewrite(mistake, rewrite))
        nodes: list[Any] | None = None
        if block_start(mistake.statement, first) is not None:
            reading = WordSubstitution(rewrite.start, rewrite.end, rewrite.text)
            nodes = self._kept(kind, depth, mistake, first, reading)
        if nodes is None:
            self.lost.append(lost_statement(mistake))
        return nodes or []

    def _rewrite(self, kind: str, mistake: Mistake, first: str) -> Rewrite | None:
        """Return the replacement of habits after which the parser gets further."""
        brace = block_start(mistake.statement, first)
        end = mistake.end if brace is None else brace.start
        tail = "" if brace is None else "{}"
        text = self.text[mistake.begin : end].rstrip()
        stop = min(mistake.offset - mistake.begin, len(text))
        if len(text) > MAX_GUESSED_LENGTH:
            return None
        done: Rewrite | None = None
        for _ in range(MAX_HABITS):
            each, further = self._step(kind, text, tail, stop, self.text[: mistake.begin])
            if each is None:
                break
            done = each if done is None else done.joined(each, text)
            if further is None:
                break
            text, stop = each.put_into(text), further
        return done

    def _step(
        self, kind: str, text: str, tail: str, stop: int, before: str
    ) -> tuple[Rewrite | None, int | None]:
        """Return the first replacement after which the parser gets further, and where it stops."""
        for each in find_rewrites(text, stop, stop, UnexpectedToken.code, before):
            if not self.guesses_left:
                break
            self.guesses_left -= 1
            further = self._stop(kind, each.put_into(text) + tail)
            new_end = each.start + len(each.text)
            if each.end - each.start == len(text):
                passed = stop
            elif stop <= skip_space(text, each.end):
                passed = new_end
            else:
                passed = stop + new_end - each.end
            if further is None or further > passed:
                return each, further
        return None, None

    def _stop(self, kind: str, text: str) -> int | None:
        """Return the offset where the parser stops in a text; None if the text is valid."""
        try:
            run_parser(self.source, text, start=kind, words=self.words)
        except ParserError as error:
            return error.offset
        return None

    def _guesses(self, mistake: Mistake) -> Iterator[tuple[Lexeme, str]]:
        for guess in guess_words(mistake):
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
        reading: WordSubstitution | None = None,
        *,
        named: bool = False,
    ) -> list[Any] | None:
        """Parse the statement of a mistake; None if it is invalid. A block has its valid lines.

        Args:
            first: The word that the statement's first word is read as.
            named: Reduce the text before the brace to the block's name.
        """
        brace = block_start(mistake.statement, first)
        if brace is None or brace.partner is None:
            if reading is not None and mistake.end - mistake.begin > MAX_GUESSED_LENGTH:
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
        body = self.lines(BLOCK_CONTENTS[first], brace.end, brace.partner, depth + 1)
        return None if nodes is None else [_filled(nodes[0], tuple(body))]

    def _nodes(
        self, kind: str, mistake: Mistake, text: str, reading: WordSubstitution | None
    ) -> list[Any] | None:
        try:
            nodes, diagnostics = run_parser(
                self.source, text, mistake.begin, kind, reading, self.words
            )
        except ParserError:
            return None
        self.diagnostics += diagnostics
        return list(nodes)


def _offset(piece: Lexeme) -> int:
    return piece.start


def _filled(node: Any, body: tuple[Any, ...]) -> Any:
    """Return a block with the given lines."""
    if isinstance(node, ast.PromptsDef):
        return replace(node, lines=body)
    if isinstance(node, ast.Corrupt):
        return replace(node, changes=body)
    if isinstance(node, ast.For):
        return replace(node, body=body)
    if isinstance(node, ast.ModelDef):
        return replace(node, edits=body)
    return replace(node, statements=body)
