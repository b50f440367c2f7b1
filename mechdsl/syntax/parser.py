# pyright: reportPrivateUsage=false
"""The LALR parser, its lexer, limit checks before parsing, and templates with placeholders."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from lark import Lark, Token
from lark.common import LexerConf
from lark.exceptions import UnexpectedCharacters, UnexpectedInput
from lark.grammar import NonTerminal, Rule, RuleOptions, Terminal
from lark.lexer import Lexer, PatternStr, TerminalDef
from lark.parsers.lalr_analysis import IntParseTable, Reduce, Shift
from lark.parsers.lalr_parser import LALR_Parser, _Parser

from mechdsl.base import limits
from mechdsl.base.records import Record
from mechdsl.base.runtime import pause_garbage_collection
from mechdsl.base.text import STRING_PATTERN, Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.syntax import BadPlaceholder, EmptyFile, NotText, TooLarge
from mechdsl.syntax import ast
from mechdsl.syntax.ast import unescape
from mechdsl.syntax.parser_tables import load_tables
from mechdsl.syntax.tree_builder import (
    PARSE_CONTEXT,
    ParseContext,
    RegisteredWords,
    TreeBuilder,
    WordSubstitution,
)

CONTEXTUAL_PRIORITY = 3
"""Priority from which on terminals are read only where the parser accepts them."""


_Contextual = tuple[str, Callable[[str, int], re.Match[str] | None]]
"""The name of a terminal, and the function that matches it at an offset."""


class MechLexer(Lexer):
    """Lark's contextual lexer with four differences, none of which affects a valid file.

    Literals, names and punctuation are read everywhere, so that a misplaced one reaches the parser
    and its message names the word. A keyword is always a whole word. One regular expression serves
    all states, which saves compiling one per state. Words of changes and verbs of rules that the
    grammar doesn't contain are looked up in the `RegisteredWords` of the parse. Where a name is
    possible too, such a verb begins a rule only as the first word of its line.
    """

    def __init__(
        self,
        conf: LexerConf,
        states: dict[int, Collection[str]],
        always_accept: Collection[str] = (),
    ) -> None:
        terminals: list[TerminalDef] = sorted(
            conf.terminals, key=lambda t: (-t.priority, -t.pattern.max_width, -len(t.pattern.value))
        )
        self.ignored = frozenset(conf.ignore)
        words = {t.pattern.value: t.name for t in terminals if t.pattern.value.isalpha()}
        self.words = words
        names = set(words.values())
        plain = [t for t in terminals if t.priority < CONTEXTUAL_PRIORITY and t.name not in names]
        self.contextual: list[_Contextual] = [
            (t.name, re.compile(t.pattern.to_regexp()).match)
            for t in terminals
            if t.priority >= CONTEXTUAL_PRIORITY
        ]
        self.match = re.compile(
            "|".join(f"(?P<{t.name}>{t.pattern.to_regexp()})" for t in plain)
        ).match
        self.states = states
        self._accepted: dict[int, tuple[frozenset[str], list[_Contextual]]] = {}

    def _accepted_in(self, state: int) -> tuple[frozenset[str], list[_Contextual]]:
        """Return the terminals that a state accepts, and those of them that are contextual.

        Lark's lists of terminals are slow to search, and most states of a grammar are never used.
        """
        if state not in self._accepted:
            accepted = frozenset(self.states[state])
            contextual = [each for each in self.contextual if each[0] in accepted]
            self._accepted[state] = accepted, contextual
        return self._accepted[state]

    def lex(self, lexer_state: Any, parser_state: Any) -> Iterator[Token]:
        text: str = lexer_state.text.text
        position: int = lexer_state.text.start
        end: int = lexer_state.text.end
        words = PARSE_CONTEXT.get().words
        while position < end:
            token_match = self.match(text, position)
            if token_match is None:
                raise UnexpectedCharacters(text, position, 0, 0, state=parser_state)
            kind = token_match.lastgroup
            if kind in self.ignored:
                position = token_match.end()
                continue
            if kind == "NAME":
                accepted, contextual = self._accepted_in(parser_state.position)
                for name, match in contextual:
                    if special := match(text, position):
                        kind, token_match = name, special
                        break
                else:
                    word = token_match.group()
                    keyword = self.words.get(word)
                    if keyword in accepted:
                        kind = keyword
                    elif word in words.changes and "CHANGE" in accepted:
                        kind = "CHANGE"
                    elif word in words.verbs and "VERB" in accepted:
                        alone = "NAME" not in accepted or _first_of_line(text, position)
                        alone = alone or "STAR" in accepted  # after a span, not a number
                        kind = "VERB" if alone else kind
            start, position = position, token_match.end()
            token = Token(kind or "", token_match.group(), start, end_pos=position)
            lexer_state.last_token = token
            yield token


def _first_of_line(text: str, position: int) -> bool:
    return not text[text.rfind("\n", 0, position) + 1 : position].strip()


class MechParser(LALR_Parser):
    """Lark's parser, built from saved tables in half the time: a rule is looked up once instead of
    at each of its twenty thousand reductions in the tables."""

    @classmethod
    def deserialize(cls, data: Any, memo: Any, callbacks: Any, debug: bool = False) -> MechParser:
        tokens = data["tokens"]
        reductions = {number: (Reduce, rule) for number, rule in memo.items()}
        states = {
            state: {
                tokens[token]: reductions[target["@"]] if reduces else (Shift, target)
                for token, (reduces, target) in actions.items()
            }
            for state, actions in data["states"].items()
        }
        made = cls.__new__(cls)
        made._parse_table = IntParseTable(states, data["start_states"], data["end_states"])
        made.parser = _Parser(made._parse_table, callbacks, debug)
        return made


class TableRule(Rule):
    """A rule that is compared by identity: saved tables have each rule once, and lark would hash a
    rule's symbols at each of its reductions."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@cache
def load_parser() -> Lark:
    """Return the process's parser, built at first use."""
    loader: Any = Lark
    with pause_garbage_collection():
        tables = load_tables()
        return loader._load_from_dict(
            tables["data"],
            _objects(tables["memo"]),
            transformer=TreeBuilder(),
            _plugins={"ContextualLexer": MechLexer, "LALR_Parser": MechParser},
        )


def _objects(memo: Mapping[int, Any]) -> dict[int, Rule | TerminalDef]:
    """Build the rules and terminals of saved tables, which lark then uses unchanged.

    Lark would look up the class and the fields of a symbol at each of its thousands of occurrences;
    here equal symbols and options become one object.
    """
    kinds: dict[str, Any] = {
        kind.__name__: kind for kind in (Terminal, NonTerminal, RuleOptions, TerminalDef)
    }
    made: dict[int, Any] = {}

    def part(saved: Any) -> Any:
        # By identity, because `from_json` shares one dictionary among equal parts.
        if id(saved) not in made:
            made[id(saved)] = kinds[saved["__type__"]].deserialize(saved, {})
        return made[id(saved)]

    return {
        number: TableRule(
            part(saved["origin"]),
            list(map(part, saved["expansion"])),
            saved["order"],
            saved["alias"],
            part(saved["options"]),
        )
        if saved["__type__"] == "Rule"
        else part(saved)
        for number, saved in memo.items()
    }


@cache
def keywords() -> dict[str, str]:
    """Return the words and signs of the language by terminal name."""
    return {
        terminal.name: terminal.pattern.value
        for terminal in load_parser().terminals
        if isinstance(terminal.pattern, PatternStr)
    }


@dataclass
class ParserError(Exception):
    """An unexpected token or character."""

    offset: int
    """Offset in the parsed text; its length if the text ends too early."""
    terminal: str
    """Terminal of the unexpected token: `$END` at the end, empty for an unknown character."""
    length: int
    parser: Any
    """Lark's interactive parser in the state of the error."""

    @cached_property
    def accepts(self) -> frozenset[str]:
        """Terminals accepted instead; slow, because each one has to be tried."""
        return frozenset(self.parser.accepts() if self.parser else ())


def run_parser(
    source: Source,
    text: str,
    base: int = 0,
    start: str = "start",
    reading: WordSubstitution | None = None,
    words: RegisteredWords | None = None,
) -> tuple[Any, list[Diagnostic]]:
    """Parse `text`, which begins at offset `base` of the source.

    Args:
        reading: A word to parse as a different one.
        words: Words in addition to those of the grammar, for texts with statements.

    Returns:
        The result of the start rule, and errors in statements of a valid shape.

    Raises:
        ParserError: At the first syntax error.
    """
    context = ParseContext(source, words or RegisteredWords(), base, reading)
    if reading is not None:
        text = reading.put_into(text)
    token = PARSE_CONTEXT.set(context)
    try:
        lark: Any = load_parser()
        return lark.parse(text, start=start), context.diagnostics
    except UnexpectedInput as error:
        raise _stopped(text, error) from None
    finally:
        PARSE_CONTEXT.reset(token)


def _stopped(text: str, error: Any) -> ParserError:
    token: Any = getattr(error, "token", None)
    interactive: Any = getattr(error, "interactive_parser", None)
    if token is None:
        return ParserError(error.pos_in_stream, "", 1, interactive)
    if token.type == "$END":
        return ParserError(len(text), "$END", 0, interactive)
    return ParserError(token.start_pos, token.type, len(token), interactive)


_MARKS = re.compile(rf"{STRING_PATTERN}|#[^\n]*|\w+|[^\w\s]")

_PLACEHOLDER = re.compile(r"(?<!\{)(?:\{\{)*\{(?!\{)")

_SPLIT = "move data to a separate file and name it with `rows`, or split the file"

_SPACE = re.compile(r"(?:\s|#[^\n]*)*")


class TextScan(Record):
    """Result of `scan_text`; a text with a `problem` is not parsed."""

    comments: tuple[ast.Comment, ...] = ()
    problem: Diagnostic | None = None


def skip_space(text: str, start: int = 0) -> int:
    """Return the offset of the first character that is neither white space nor comment."""
    match = _SPACE.match(text, start)
    return match.end() if match else start


def scan_text(source: Source) -> TextScan:
    """Collect the comments of a text, or the reason not to parse it (E0109, E0110, E0111)."""
    text = source.text
    if "\0" in text:
        return TextScan(problem=NotText(path=source.name, reason="it contains a NUL byte"))
    if (problem := _too_long(source)) is not None:
        return TextScan(problem=problem)
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
                f"this name has {len(piece):,} characters; the limit is {limits.NAME}",
                "choose a shorter name",
            )
        elif words > limits.WORDS:
            passed = f"the file has more than {limits.WORDS:,} tokens", _SPLIT
        elif placeholders > limits.PLACEHOLDERS:
            passed = (
                f"the texts of the file have more than {limits.PLACEHOLDERS:,} placeholders",
                "build a list with `list(…)`, or move the texts to a file and name it with `rows`",
            )
        if passed is not None:
            place = "the limit is exceeded here"
            span = Span(source, mark.start(), mark.end())
            problem = TooLarge(what=passed[0], place=place, hint=passed[1], span=span)
            return TextScan(problem=problem)
    if skip_space(text) == len(text):
        return TextScan(tuple(comments), EmptyFile(span=Span(source, 0, 0)))
    return TextScan(tuple(comments))


def _too_long(source: Source) -> Diagnostic | None:
    """Return E0109 if the text exceeds a limit that needs no lexing."""
    counts = (
        ("characters", len(source.text), limits.CHARACTERS),
        ("lines", source.text.count("\n"), limits.LINES),
    )
    for what, count, most in counts:
        if count > most:
            return TooLarge(
                what=f"the file has {count:,} {what}; the limit is {most:,}",
                place="mechdsl doesn't read larger files",
                hint=_SPLIT,
                span=Span(source, 0, 0),
            )
    return None


def _comment(source: Source, start: int, end: int) -> ast.Comment:
    text = source.text[start:end].rstrip()
    line_start = source.text.rfind("\n", 0, start) + 1
    own_line = not source.text[line_start:start].strip()
    return ast.Comment(text, own_line, span=Span(source, start, start + len(text)))


class Placeholder(Record):
    """A placeholder such as `{x}`, `{s2 = s}` or `{count - 1}`: a value and its span's name.

    `name` is None for an expression without a name.
    """

    name: str | None
    expr: ast.Expr
    span: Span


TemplatePiece = str | Placeholder

_LITERAL = re.compile(r"(?:[^{}]|\{\{|\}\})+")

_TEXT = r'\\"(?:[^"\\]|\\[^"])*\\"|"[^"]*"'

_QUOTED = re.compile(_TEXT)

_INNER = re.compile(rf"(?:{_TEXT}|[^{{}}])*")
"""Text up to the brace that ends a placeholder; braces in quoted texts are skipped."""


def parse_template(text: ast.String) -> tuple[list[TemplatePiece], list[Diagnostic]]:
    """Split a template into literal texts (escapes resolved) and placeholders, in order.

    Spans point into the file. Codes: E0113 for an invalid placeholder, E0106 and E0114 for
    expressions with a reserved name or too large a number. Invalid placeholders are omitted.
    """
    reader = _TemplateReader(*_raw(text))
    reader.read()
    return reader.pieces, reader.diagnostics


def _raw(text: ast.String) -> tuple[Source, str, int, bool]:
    """Return the source, the text as written in it, its offset, and whether it has escapes.

    A text that isn't in a file (from Python) is its own source.
    """
    written = text.span.text
    # The last character is a quote, or the replacement of a missing one.
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
        """Read the placeholder that opens at `start`; return the offset after it."""
        match = _INNER.match(self.raw, start + 1)
        end = match.end() if match else start + 1
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
        if scan_text(Source(text)).problem is not None or "#" in _QUOTED.sub("", inner):
            self._refuse(
                "this placeholder is not an expression", "not an expression", start, end + 1
            )
            return
        try:
            clause, diagnostics = run_parser(self.source, text, base, "placeholder")
        except ParserError as error:
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
        """Replace `\\"` by `"` in the expression; offsets don't change."""

        def quotes(match: re.Match[str]) -> str:
            return f' "{match[0][2:-2]}" ' if match[0].startswith("\\") else match[0]

        return _QUOTED.sub(quotes, inner)

    def _stopped(self, error: ParserError, inner: str, base: int) -> tuple[str, str, int, int]:
        offset = error.offset
        if offset >= len(inner.rstrip()):
            end = base + len(inner)
            return "the expression in this placeholder is incomplete", "incomplete", end, end
        length = error.length
        text = inner[offset : offset + length]
        problem = f"unexpected `{text}` in this placeholder"
        return problem, "not part of an expression", base + offset, base + offset + length
