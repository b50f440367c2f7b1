"""The LALR parser: its saved tables, or the grammar file where they are missing or stale."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lark
from lark import Lark, Token
from lark.common import LexerConf
from lark.exceptions import UnexpectedCharacters
from lark.lexer import Lexer, PatternStr, TerminalDef

from mechdsl.base.garbage import uncollected
from mechdsl.syntax.reserved import CHANGE_WORDS
from mechdsl.syntax.transform import ToAst

STARTS = ("start", "top_lines", "data_lines", "change_lines", "experiment_lines", "placeholder")
"""What can be parsed by itself: a file, the inside of each kind of block, one expression."""

PACKAGE = Path(__file__).resolve().parent.parent
TABLES = PACKAGE / "syntax" / "tables.bin"
CONTEXTUAL_PRIORITY = 3
"""Terminals of this priority and above are read only where the parser accepts them."""


class MechLexer(Lexer):
    """Lark's contextual lexer with four differences, none of which changes a right file.

    Literals, names and punctuation are read wherever they stand, so that a wrong one reaches the
    parser and its message names the word; a keyword is only ever a whole word; one regular
    expression serves all states, which saves compiling one for each; words of changes that the
    grammar doesn't have are looked up in `CHANGE_WORDS`.
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
        self.contextual = [
            (t.name, re.compile(t.pattern.to_regexp()).match)
            for t in terminals
            if t.priority >= CONTEXTUAL_PRIORITY
        ]
        self.match = re.compile(
            "|".join(f"(?P<{t.name}>{t.pattern.to_regexp()})" for t in plain)
        ).match
        self.states = states

    def lex(self, lexer_state: Any, parser_state: Any) -> Iterator[Token]:
        text: str = lexer_state.text.text
        position: int = lexer_state.text.start
        end: int = lexer_state.text.end
        while position < end:
            found = self.match(text, position)
            if found is None:
                raise UnexpectedCharacters(text, position, 0, 0, state=parser_state)
            kind = found.lastgroup
            if kind in self.ignored:
                position = found.end()
                continue
            if kind == "NAME":
                accepted = self.states[parser_state.position]
                for name, match in self.contextual:
                    if name in accepted and (special := match(text, position)):
                        kind, found = name, special
                        break
                else:
                    word = found.group()
                    keyword = self.words.get(word)
                    if keyword in accepted:
                        kind = keyword
                    elif word in CHANGE_WORDS and "CHANGE" in accepted:
                        kind = "CHANGE"
            start, position = position, found.end()
            token = Token(kind or "", found.group(), start, end_pos=position)
            lexer_state.last_token = token
            yield token


def grammar_file() -> Path:
    """The grammar: inside the package in a wheel, beside it in an editable install."""
    inside = PACKAGE / "grammar" / "mech.lark"
    return inside if inside.exists() else PACKAGE.parent / "grammar" / "mech.lark"


def fingerprint(grammar: str) -> str:
    """What the saved tables must have been made from: the grammar, by a lark of this kind."""
    lark_version = ".".join(lark.__version__.split(".")[:2])
    return hashlib.sha256(f"{lark_version}\n{grammar}".encode()).hexdigest()


def build(grammar: str) -> dict[str, Any]:
    """The tables of a grammar, in plain lists, dictionaries and strings."""
    built: Any = Lark(
        grammar,
        parser="lalr",
        lexer="contextual",
        start=list(STARTS),
        keep_all_tokens=True,
        maybe_placeholders=False,
    )
    file = io.BytesIO()
    built.save(file)
    return {"grammar": fingerprint(grammar), **pickle.loads(file.getvalue())}


def saved_tables() -> dict[str, Any] | None:
    """The shipped tables; None where they are missing or belong to another grammar."""
    try:
        tables = pickle.loads(TABLES.read_bytes())
    except (OSError, pickle.UnpicklingError, EOFError):
        return None
    grammar = grammar_file()
    if grammar.exists() and fingerprint(grammar.read_text("utf-8")) != tables.get("grammar"):
        return None
    return tables


@cache
def parser() -> Lark:
    """The parser of this process, made at its first use."""
    tables = saved_tables() or build(grammar_file().read_text("utf-8"))
    loader: Any = Lark
    with uncollected():
        return loader._load_from_dict(
            tables["data"],
            tables["memo"],
            transformer=ToAst(),
            _plugins={"ContextualLexer": MechLexer},
        )


@cache
def keywords() -> dict[str, str]:
    """The words and signs of the language, by the names the parser gives them."""
    return {
        terminal.name: terminal.pattern.value
        for terminal in parser().terminals
        if isinstance(terminal.pattern, PatternStr)
    }
